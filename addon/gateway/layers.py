"""What mitmproxy's hooks can't do, as subclasses of its HTTP layers (pinned to 12.2; `next_layer` puts them in).

- An upstream connection that is refused, or closes before the first byte of an answer, is no error yet: the addon is
  asked, and the same request may go out again. After a byte came back nothing is ever sent twice.
- llama-server closes its connection after every streamed answer without saying so: it is not used again.
- The end of an answer waits until the addon has settled the request.
- A refused request's body is dropped instead of kept.
"""

import logging
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mitmproxy import http
from mitmproxy.connection import Connection, Server
from mitmproxy.net.tls import starts_like_tls_record
from mitmproxy.proxy import commands, events, layer, tunnel
from mitmproxy.proxy.layer import CommandGenerator, NextLayer
from mitmproxy.proxy.layers import ClientTLSLayer, HttpLayer, modes
from mitmproxy.proxy.layers.http import (
    ErrorCode,
    GetHttpConnection,
    HTTPMode,
    HttpStream,
    RequestData,
    RequestEndOfMessage,
    RequestHeaders,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
    ResponseTrailers,
    SendHttp,
)

from gateway.exchange import Exchange
from gateway.http1 import BoundedHttp1Server
from gateway.relay import Relay
from gateway.replies import Refusal, refuse

log = logging.getLogger(__name__)


@dataclass
class UpstreamFailedHook(commands.StartHook):
    """No byte of an answer came. The addon gives the request a destination again, or sets `flow.response`."""

    name = "upstream_failed"
    flow: http.HTTPFlow


@dataclass
class AnswerEndsHook(commands.StartHook):
    """The server's answer has ended, the client's has not: the addon settles the request. Unsettled, it is cut."""

    name = "answer_ends"
    flow: http.HTTPFlow


def exchange_of(flow: http.HTTPFlow) -> Exchange | None:
    """The exchange that the addon opened for a flow. Not in `flow.metadata`: that is copied and serialised."""
    found = vars(flow).get("exchange")
    return found if isinstance(found, Exchange) else None


def open_exchange(flow: http.HTTPFlow, exchange: Exchange) -> None:
    vars(flow)["exchange"] = exchange


_FROM_SERVER = (ResponseHeaders, ResponseData, ResponseTrailers, ResponseEndOfMessage, ResponseProtocolError)
# What mitmproxy's HTTP/1 client says when a connection closes and nothing at all had come.
_CLOSED_WITHOUT_A_BYTE = "server closed connection"


class _Sink(layer.Layer):
    """Takes over a connection that nobody listens to any more."""

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        yield from ()


class GatewayStream(HttpStream):
    """One request and its answer."""

    def handle_protocol_error(self, event: RequestProtocolError | ResponseProtocolError) -> CommandGenerator[None]:
        if isinstance(event, ResponseProtocolError) and self._waits_for_answer():
            yield from self._ask_after_failure(event.message)
            return
        self._note_cut("client" if isinstance(event, RequestProtocolError) else "server")
        yield from super().handle_protocol_error(event)

    def _note_cut(self, side: str) -> None:
        flow = getattr(self, "flow", None)
        exchange = exchange_of(flow) if flow else None
        if exchange and exchange.cut_by is None:
            exchange.cut_by = side

    def _waits_for_answer(self) -> bool:
        return (
            self.server_state == self.state_wait_for_response_headers
            and self.client_state == self.state_done
            and exchange_of(self.flow) is not None
        )

    def state_consume_request_body(self, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, RequestData):
            exchange = exchange_of(self.flow)
            # One byte too many is enough to know; the rest is read and dropped, so that the client gets its answer.
            if self.flow.response or not exchange or len(self.request_body_buf) > exchange.max_body_bytes:
                return
        yield from super().state_consume_request_body(event)

    def make_server_connection(self) -> CommandGenerator[bool]:
        """Connect to where the addon sent the request; ask it again when the connection is refused."""
        while True:
            request = self.flow.request
            connection, error = yield GetHttpConnection(
                (request.host, request.port),
                request.scheme == "https",
                self.flow.server_conn.via,
                self.flow.server_conn.transport_protocol,
            )
            if not error:
                assert connection
                self.context.server = self.flow.server_conn = connection
                if exchange := exchange_of(self.flow):
                    exchange.connection_was_used = connection in self._http.used
                self._http.used.add(connection)
                return True
            exchange = exchange_of(self.flow)
            if exchange is None:
                failed = ResponseProtocolError(self.stream_id, error, ErrorCode.CONNECT_FAILED)
                yield from super().handle_protocol_error(failed)
                return False
            if (yield from self.check_killed(True)):  # the client left: the server did not refuse
                return False
            exchange.connection_refused = exchange.may_send_again = True
            if not (yield from self._wants_another_try(error)):
                return False

    def _ask_after_failure(self, message: str) -> CommandGenerator[None]:
        exchange = exchange_of(self.flow)
        assert exchange
        exchange.connection_refused = False
        exchange.may_send_again = message == _CLOSED_WITHOUT_A_BYTE
        if (yield from self._wants_another_try(message)):
            yield from self._send_again()

    def _wants_another_try(self, message: str) -> CommandGenerator[bool]:
        """True: the addon has chosen a server, send. False: the client has got its answer, or is gone."""
        exchange = exchange_of(self.flow)
        assert exchange
        exchange.failure = message
        yield UpstreamFailedHook(self.flow)
        if (yield from self.check_killed(True)):
            return False
        if exchange.failure is None and not self.flow.response:
            return True
        if not self.flow.response:  # the addon is gone or broken: nobody decided
            exchange.outcome = exchange.outcome or "unreachable"
            set_response(self.flow, Refusal(502, "upstream_unreachable", message))
        yield from self._leave_server()
        yield from self.send_response()
        return False

    def _leave_server(self) -> CommandGenerator[None]:
        """Nothing more is wanted from the server's connection, nor what of it queued up while the addon was asked."""
        old = self.context.server
        connections = self._http.connections
        if old in connections:
            connections[old] = _Sink(self.context.fork())
            yield commands.CloseConnection(old)
        self._paused_event_queue = deque(
            event for event in self._paused_event_queue if not isinstance(event, _FROM_SERVER)
        )

    def _send_again(self) -> CommandGenerator[None]:
        yield from self._leave_server()
        if not (yield from self.make_server_connection()):
            return
        request = self.flow.request
        body = request.raw_content
        yield SendHttp(RequestHeaders(self.stream_id, request, not body), self.context.server)
        if body:
            yield SendHttp(RequestData(self.stream_id, body), self.context.server)
        yield SendHttp(RequestEndOfMessage(self.stream_id), self.context.server)

    def state_wait_for_response_headers(self, event: events.Event) -> CommandGenerator[None]:
        assert isinstance(event, ResponseHeaders)
        headers = event.response.headers
        if "event-stream" in headers.get("content-type", "") or "close" in headers.get("connection", "").lower():
            self._http.spent.add(self.context.server)
        yield from super().state_wait_for_response_headers(event)

    def state_stream_response_body(self, event: events.Event) -> CommandGenerator[None]:
        assert self.flow.response
        relay, exchange = self.flow.response.stream, exchange_of(self.flow)
        if not isinstance(relay, Relay) or exchange is None:
            yield from super().state_stream_response_body(event)
        elif isinstance(event, ResponseData):
            try:
                data, ended = relay.feed(event.data), relay.ended
            except Exception:
                yield from self._cut("a fault in the relay: the answer is cut")
                return
            if ended and not (yield from self._settle(exchange)):
                return
            if data:
                if self._keeps_bodies:
                    self.response_body_buf += data
                yield SendHttp(ResponseData(self.stream_id, data), self.context.client)
        elif isinstance(event, ResponseEndOfMessage):
            try:
                relay.close()
                rest = relay.finish()
            except Exception:
                yield from self._cut("a fault in the relay: the answer is cut")
                return
            if not (yield from self._settle(exchange)):
                return
            if rest:
                if self._keeps_bodies:
                    self.response_body_buf += rest
                yield SendHttp(ResponseData(self.stream_id, rest), self.context.client)
            if self._keeps_bodies:
                self.flow.response.data.content = bytes(self.response_body_buf)
                self.response_body_buf.clear()
            yield from self.send_response(already_streamed=True)
        else:
            yield from super().state_stream_response_body(event)

    def _settle(self, exchange: Exchange) -> CommandGenerator[bool]:
        """Wait until the row is on disk. False: it is not, or the client has left; the answer is cut."""
        if exchange.settled:
            return True
        yield AnswerEndsHook(self.flow)
        if not exchange.settled and self.flow.killable:
            self.flow.kill()
        return not (yield from self.check_killed(True))

    def _cut(self, why: str) -> CommandGenerator[None]:
        log.exception(why)
        if self.flow.killable:
            self.flow.kill()
        yield from self.check_killed(True)

    @cached_property
    def _keeps_bodies(self) -> bool:
        """For mitmweb; looking an option up costs more than the rest of passing a chunk on."""
        return bool(self.context.options.store_streamed_bodies)

    @property
    def _http(self) -> "GatewayLayer":
        parent = self.context.layers[self.context.layers.index(self) - 1]
        assert isinstance(parent, GatewayLayer)
        return parent


class GatewayLayer(HttpLayer):
    """A client connection and its connections to servers."""

    def __init__(self, context: Any, mode: HTTPMode) -> None:
        super().__init__(context, mode)
        self.used: set[Connection] = set()  # connections that a request was sent over
        self.spent: set[Connection] = set()  # connections that the server will close
        self._handle_event = self._begin  # type: ignore[method-assign]

    def _begin(self, event: events.Event) -> CommandGenerator[None]:
        """The first event. A generator of ours around each later one would cost more than what it adds."""
        if self.context.client.alpn in (None, b"http/1.1"):
            # The base class sets this by setdefault, too.
            self.connections.setdefault(self.context.client, BoundedHttp1Server(self.context.fork()))
        del self._handle_event
        yield from super()._handle_event(event)

    def make_stream(self, stream_id: int) -> CommandGenerator[None]:
        self.streams[stream_id] = stream = GatewayStream(self.context.fork(), stream_id)
        yield from self.event_to_child(stream, events.Start())

    def get_connection(self, event: GetHttpConnection, *, reuse: bool = True) -> CommandGenerator[None]:
        # The base class remembers a failed connection for as long as the client stays, and would never try that server
        # again; it also keeps closed ones.
        for connection in [c for c in self.connections if isinstance(c, Server) and self._is_over(c)]:
            old = self.connections.pop(connection)
            self.used.discard(connection)
            if connection in self.spent:
                self.spent.discard(connection)
                if connection.connected:
                    self.connections[connection] = _Sink(old.context)
                    yield commands.CloseConnection(connection)
        yield from super().get_connection(event, reuse=reuse)

    def _is_over(self, connection: Server) -> bool:
        if connection in self.waiting_for_establishment:
            return False
        over = connection.error is not None or connection.timestamp_end is not None
        return over or (connection in self.spent and not self._is_busy(connection))

    def _is_busy(self, connection: Server) -> bool:
        """Whether a stream of another request still runs over it (HTTP/2 clients)."""
        return any(
            stream.context.server is connection and stream.server_state == stream.state_stream_response_body
            for stream in self.streams.values()
        )


def is_ours(flow: http.HTTPFlow) -> bool:
    """Whether a flow runs through our layers. Without them, an answer's end would not wait for its row."""
    return vars(flow.client_conn).get("speaks_to_gateway_layer") is True


def install(next_layer: NextLayer) -> None:
    """To be called from the addon's `next_layer` hook: puts our HTTP layer under a reverse proxy's connections."""
    context = next_layer.context
    if next_layer.layer is None and len(context.layers) == 1 and isinstance(context.layers[0], modes.ReverseProxy):
        data = next_layer.data_client()
        if not data:
            return
        stack = tunnel.LayerStack()
        if starts_like_tls_record(data):
            stack /= ClientTLSLayer(context)
        stack /= GatewayLayer(context, HTTPMode.transparent)
        next_layer.layer = stack[0]
        vars(context.client)["speaks_to_gateway_layer"] = True


def set_response(flow: http.HTTPFlow, refusal: Refusal) -> None:
    """Answer a flow with a refusal, in the dialect of its path."""
    reply = refuse(refusal, flow.request.path.partition("?")[0])
    flow.response = http.Response.make(reply.status, reply.body, reply.headers)
