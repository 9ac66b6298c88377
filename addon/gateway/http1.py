"""mitmproxy's HTTP/1, with bounds on what a client may make it keep, trailers dropped, and errors in our dialect."""

from typing import Any

import h11
from h11._readers import ChunkedReader
from mitmproxy import http
from mitmproxy.net.http.http1 import assemble_response
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http import _http1

from gateway.replies import Refusal, refuse

_make_body_reader = _http1.make_body_reader

# A head with every header a client might send is a few kB; 64 kB is what servers commonly take.
MAX_HEAD_BYTES = 64 << 10
# Clients don't pipeline LLM requests; what comes early is kept only this far.
MAX_PIPELINED_BYTES = 1 << 20


class TrailerlessReader(ChunkedReader):
    """Trailers break mitmproxy's HTTP/1 down, and the peer waits forever. A proxy may drop them (RFC 9110, 6.5.1)."""

    def __call__(self, buffer: Any) -> Any:
        event = super().__call__(buffer)
        return h11.EndOfMessage() if type(event) is h11.EndOfMessage else event


def make_body_reader(expected_size: int | None) -> Any:
    """mitmproxy's `make_body_reader`; None means chunked."""
    return TrailerlessReader() if expected_size is None else _make_body_reader(expected_size)


class BoundedHttp1Server(_http1.Http1Server):
    """mitmproxy's HTTP/1 server with bounds on what a client may make it keep."""

    def read_headers(self, event: events.ConnectionEvent) -> CommandGenerator[None]:
        is_data = isinstance(event, events.DataReceived) and len(self.buf) > MAX_HEAD_BYTES
        if is_data and b"\r\n\r\n" not in bytes(self.buf)[:MAX_HEAD_BYTES]:
            yield commands.SendData(self.conn, error_response(431, "The request's head is too large."))
            yield commands.CloseConnection(self.conn)
            self.state = self.done
            return
        yield from super().read_headers(event)

    def wait(self, event: events.Event) -> CommandGenerator[None]:
        if len(self.buf) > MAX_PIPELINED_BYTES:
            event = events.ConnectionClosed(self.conn)
        yield from super().wait(event)


def error_response(status_code: int, message: str = "") -> bytes:
    """mitmproxy's own refusals (malformed requests) in our dialect instead of an HTML page."""
    codes = {413: "request_too_large", 431: "request_too_large", 502: "upstream_unreachable"}
    reply = refuse(Refusal(status_code, codes.get(status_code, "invalid_request"), message[:300]), "")
    response = http.Response.make(reply.status, reply.body, {**reply.headers, "Connection": "close"})
    return bytes(assemble_response(response))


def take_over() -> None:
    """Have mitmproxy use ours in the two places that no subclass reaches. It looks these names up at each call."""
    _http1.make_error_response = error_response
    _http1.make_body_reader = make_body_reader
