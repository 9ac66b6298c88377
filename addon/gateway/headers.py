"""Which headers go on: all but those of one hop (RFC 9110 section 7.6.1), keys, and what lets clients meddle."""

import re
from collections.abc import Iterable, Iterator

from gateway.auth import KEY_HEADERS
from gateway.replies import Refusal

Field = tuple[bytes, bytes]

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"upgrade",
    }
)
# X-Conversation-Id makes llama-server's streams readable and killable by others. Accept-Encoding is set by us: the
# meter must be able to read the answer. Expect is mitmproxy's to answer.
_NOT_FOR_SERVERS = frozenset(
    {
        b"host",
        b"content-length",
        b"transfer-encoding",
        b"expect",
        b"accept-encoding",
        b"x-conversation-id",
        b"http2-settings",
    }
    | {name.encode() for name in KEY_HEADERS}
)


def _named_by_connection(fields: Iterable[Field]) -> set[bytes]:
    return {
        token.strip().lower() for name, value in fields if name.lower() == b"connection" for token in value.split(b",")
    }


_NOT_IN_TARGET = re.compile(rb"[\x00-\x20\x7f]")
_CONTROL = re.compile(rb"[\x00\r\n]")


def check(method: str, target: bytes, fields: tuple[Field, ...]) -> None:
    """What one server reads as one thing and another as two: raises Refusal (400, 405). TRACE would show our key."""
    if method.upper() in ("TRACE", "TRACK"):
        raise Refusal(405, "method_not_allowed", f"{method.upper()} is not allowed.")
    if not target.startswith(b"/") or _NOT_IN_TARGET.search(target):
        raise Refusal(400, "invalid_request", "The request's target must be a path.")
    if any(_CONTROL.search(value) for _, value in fields):
        raise Refusal(400, "invalid_request", "A header holds a control character.")


def keys_in(fields: tuple[Field, ...]) -> dict[str, list[str]]:
    """The values of each header that may hold a key."""
    found: dict[str, list[str]] = {}
    for name, value in fields:
        lower = name.decode("latin-1").lower()
        if lower in KEY_HEADERS:
            found.setdefault(lower, []).append(value.decode("utf-8", "surrogateescape"))
    return found


def to_server(fields: tuple[Field, ...], content_length: int | None, host: str, api_key: str) -> Iterator[Field]:
    """A request's headers as the server shall see them. The body was read whole: its length replaces its framing.

    `content_length` None: a request without a body. `host`: the server's. `api_key`: the server's; empty for none.
    """
    dropped = _HOP_BY_HOP | _NOT_FOR_SERVERS | _named_by_connection(fields)
    yield b"Host", host.encode("latin-1")
    for name, value in fields:
        lower = name.lower()
        if lower not in dropped:
            yield name, value
    if content_length is not None:
        yield b"Content-Length", str(content_length).encode()
    yield b"Accept-Encoding", b"identity"
    if api_key:
        yield b"Authorization", b"Bearer " + api_key.encode()


def to_client(fields: tuple[Field, ...]) -> Iterator[Field]:
    """An answer's headers as the client shall see them. X-Request-ID is ours to set."""
    framing = {b"content-length", b"transfer-encoding"}
    dropped = (_HOP_BY_HOP | _named_by_connection(fields) | {b"x-request-id"}) - framing
    return ((name, value) for name, value in fields if name.lower() not in dropped)
