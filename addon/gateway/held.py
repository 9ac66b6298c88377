"""An answer whose head has come, until it is clear whether it is the answer that its client gets.

A stream can go out with its first event, or with comments alone; anything else with its first byte. A status by which a
server says "not I, not now" is kept whole, in case that no other server can do better.
"""

import logging
from collections.abc import Mapping
from enum import Enum, auto

from mitmproxy import http
from mitmproxy.net.http.validate import validate_headers
from mitmproxy.proxy.layers.http import HttpEvent, ResponseData, ResponseEndOfMessage, ResponseHeaders, ResponseTrailers

from gateway import failover, sse
from gateway.failover import Failure

log = logging.getLogger(__name__)

# Of a server's own error.
MAX_ERROR_BYTES = 1 << 20
# Of a stream whose first event does not end: a client may have use for it after all.
MAX_FIRST_EVENT_BYTES = 1 << 16


class Verdict(Enum):
    WAIT = auto()
    PASS = auto()
    FAILED = auto()


class HeldAnswer:
    """`needs_event`: a stream of this endpoint that ends without an event has failed."""

    def __init__(self, head: ResponseHeaders, *, needs_event: bool) -> None:
        self.head = head
        self.is_whole = False
        self._needs_event = needs_event
        self._body = bytearray()
        self._after: list[HttpEvent] = []  # trailers, the end
        self._is_refusal = head.response.status_code in failover.RETRIED
        self._is_stream = is_readable_stream(head.response.headers)
        self._start, self._reader = sse.EventStart(), sse.EventReader()
        self._in_event = self._has_event = False

    def add(self, event: HttpEvent) -> Verdict:
        if isinstance(event, ResponseData):
            self._body += event.data
            return self._look_at(event.data)
        self._after.append(event)
        if isinstance(event, ResponseTrailers):
            return Verdict.WAIT
        self.is_whole = isinstance(event, ResponseEndOfMessage)
        lacks_event = self._is_stream and self._needs_event and not self._has_event
        return Verdict.FAILED if self._is_refusal or lacks_event else Verdict.PASS

    def _look_at(self, data: bytes) -> Verdict:
        if self._is_refusal:
            return Verdict.FAILED if len(self._body) > MAX_ERROR_BYTES else Verdict.WAIT
        if not self._is_stream:
            return Verdict.PASS
        try:
            self._in_event = self._in_event or self._start.is_in(data)
            self._has_event = self._has_event or any(block.data is not None for block in self._reader.feed(data))
        except Exception:
            log.exception("a stream's beginning can't be read: it goes on as it comes")
            return Verdict.PASS
        if self._in_event:
            is_enough = self._has_event or len(self._body) > MAX_FIRST_EVENT_BYTES
        else:
            is_enough = data.endswith((b"\n", b"\r"))  # comments, as far as they are whole
        return Verdict.PASS if is_enough else Verdict.WAIT

    def failure(self) -> Failure:
        """How it failed, whole or not."""
        if self._is_refusal:
            response = self.head.response
            return failover.answered(response.status_code, response.headers, bytes(self._body))
        return Failure("closed", "ended its stream without an event")

    def rest(self) -> list[HttpEvent]:
        """What came after the head."""
        body = [ResponseData(self.head.stream_id, bytes(self._body))] if self._body else []
        return [*body, *self._after]


def is_readable_stream(headers: Mapping[str, str]) -> bool:
    """Whether these are the headers of an event stream that we can read, and write events into."""
    is_plain = headers.get("content-encoding", "identity").lower() == "identity"
    return is_plain and "event-stream" in headers.get("content-type", "")


def is_valid(head: http.Response) -> bool:
    """Whether a server's head is one that can be passed on. An interim answer (1xx) is none that one can end with."""
    try:
        validate_headers(head)
    except ValueError:
        return False
    return head.status_code >= 200
