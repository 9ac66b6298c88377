"""An attempt has failed before its first event: what that says of its server.

Every such failure may be tried elsewhere. What a client did wrong is none: llama-server answers some of its clients'
mistakes with 500, so 500 is passed on and held against nobody.
"""

import email.utils
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

import msgspec

from gateway.servers import Server

# Statuses by which a server says: not I, not now.
RETRIED = frozenset({429, 502, 503, 504})
# The longest pause that a server may ask for.
MAX_PAUSE_S = 3600.0
_LOADING = b"Loading model"


class Failure(msgspec.Struct, frozen=True):
    """How an attempt failed; `message` is to be read after the server's name.

    `status`, `retry_after` and `body` are of a server's own answer (kind "answered").
    """

    kind: Literal["refused", "closed", "timed_out", "answered"]
    message: str
    status: int | None = None
    retry_after: str | None = None
    body: bytes = b""

    @property
    def is_loading(self) -> bool:
        return self.status == 503 and _LOADING in self.body


# What mitmproxy says of a connection that closed.
_CLOSED = ("server closed connection", "peer closed connection", "peer unexpectedly closed connection")
_ERRNO = re.compile(r"\[Errno -?\d+\] ")


def broken(message: str, *, timed_out: bool) -> Failure:
    """A connection broke. `message` is mitmproxy's: it may quote what the server sent, which is one user's alone."""
    if timed_out:
        return Failure("timed_out", "was silent for too long")
    is_closed = any(words in message for words in _CLOSED)
    return Failure("closed", "closed the connection" if is_closed else "sent what is no HTTP")


def not_connected(error: str) -> Failure:
    """A connection did not come about. `error` is the system's, or OpenSSL's; addresses in it are nobody's concern."""
    if "Connect call failed" in error or "Connection refused" in error:
        return Failure("refused", "refuses connections")
    return Failure("refused", f"can't be reached ({_ERRNO.sub('', error).partition(' (')[0][:200]})")


def answered(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    return Failure("answered", f"answered with HTTP {status}", status, headers.get("retry-after"), body)


def tell(server: Server, failure: Failure, now: float, utc_now: datetime) -> None:
    """Enter a failure into its server's health. `now`: of the monotonic clock."""
    health = server.health
    if failure.kind == "refused":
        health.refused(now, failure.message)
    elif failure.is_loading:
        health.probe_loading(now, "loads its model")
    elif seconds := pause_s(failure.retry_after, utc_now):
        health.asked_to_wait(now, seconds)
    elif failure.status != 429:  # busy is not broken
        health.failed(now, failure.message)


def pause_s(retry_after: str | None, utc_now: datetime) -> float:
    """Retry-After, seconds or a date (RFC 9110 section 10.2.3), in seconds from now. 0: none, or none readable."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_PAUSE_S)
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return 0.0
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return min(max((moment - utc_now).total_seconds(), 0.0), MAX_PAUSE_S)
