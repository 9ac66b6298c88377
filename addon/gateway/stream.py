"""One request and its answer, as a subclass of mitmproxy's HttpStream (pinned to 12.2).

- An attempt that fails before the first event of its answer is no error yet: the addon is asked, and the same request
  may go out again. An answer's head waits for the first byte of its body, so that a server that dies in between can be
  replaced unnoticed; if comments have gone out since, the next server's events continue the answer.
- After an event nothing is ever sent twice. A server that dies then is told of in the stream, and the stream is cut.
- The end of an answer waits until the addon has settled the request.
- A refused request's body is dropped instead of kept.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Concatenate

from mitmproxy import flow, http
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http import (
    DropStream,
    ErrorCode,
    GetHttpConnection,
    HttpErrorHook,
    HttpEvent,
    HttpStream,
    RequestData,
    RequestEndOfMessage,
    RequestHeaders,
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
    SendHttp,
)

from gateway import failover
from gateway.exchange import Exchange
from gateway.failover import Failure
from gateway.held import HeldAnswer, Verdict, is_readable_stream, is_valid
from gateway.relay import Relay
from gateway.replies import Refusal, refuse, stream_error
from gateway.upstream import PausedEvents, ServerConnections, Sink

log = logging.getLogger(__name__)


@dataclass
class UpstreamFailedHook(commands.StartHook):
    """An attempt has failed. The addon gives the request a destination again, or sets `flow.response`."""

    name = "upstream_failed"
    flow: http.HTTPFlow


@dataclass
class AnswerContinuesHook(commands.StartHook):
    """Another server goes on with an answer whose head the client has: the addon sets another relay."""

    name = "answer_continues"
    flow: http.HTTPFlow


@dataclass
class AnswerEndsHook(commands.StartHook):
    """The server's answer has ended, the client's has not: the addon settles the request. Unsettled, it is cut."""

    name = "answer_ends"
    flow: http.HTTPFlow


def exchange_of(of: http.HTTPFlow) -> Exchange | None:
    """The exchange that the addon opened for a flow. Not in `flow.metadata`: that is copied and serialised."""
    found = vars(of).get("exchange")
    return found if isinstance(found, Exchange) else None


def open_exchange(of: http.HTTPFlow, exchange: Exchange) -> None:
    vars(of)["exchange"] = exchange
    take_body(of, exchange.max_body_bytes)


def take_body(of: http.HTTPFlow, max_bytes: int) -> None:
    """Keep a request's body. Nobody wants to know what the others say."""
    vars(of)["max_body_bytes"] = max_bytes


def set_response(to: http.HTTPFlow, refusal: Refusal) -> None:
    """Answer a flow with a refusal, in the dialect of its path."""
    reply = refuse(refusal, to.request.path.partition("?")[0])
    body = b"" if to.request.method == "HEAD" else reply.body
    to.response = http.Response.make(reply.status, body, reply.headers)


def _or_cut[**P](method: Callable[Concatenate["GatewayStream", P], CommandGenerator[Any]]) -> Any:
    """After a fault in a layer its client would wait for ever: the request is cut instead."""

    @functools.wraps(method)
    def guarded(self: "GatewayStream", *args: P.args, **kwargs: P.kwargs) -> CommandGenerator[Any]:
        try:
            return (yield from method(self, *args, **kwargs))
        except Exception:
            yield from self._cut(method.__name__)
        return False

    return guarded


class GatewayStream(HttpStream):
    """One request and its answer."""

    def __init__(self, context: Context, stream_id: int, servers: ServerConnections) -> None:
        super().__init__(context, stream_id)
        self._servers = servers
        self._paused_event_queue: PausedEvents = PausedEvents(self._client_left)
        self._held: HeldAnswer | None = None
        self._own_error: HeldAnswer | None = None  # the last server's own answer that another server might better

    def _exchange(self) -> Exchange | None:
        """None before a request has its head."""
        return exchange_of(self.flow) if hasattr(self, "flow") else None

    def _client_left(self) -> None:
        if exchange := self._exchange():
            exchange.client_left()

    @_or_cut
    def handle_protocol_error(self, event: RequestProtocolError | ResponseProtocolError) -> CommandGenerator[None]:
        exchange = self._exchange()
        if exchange is None or isinstance(event, RequestProtocolError):
            if exchange:
                exchange.cut_by = exchange.cut_by or "client"
            self._client_left()
            yield from super().handle_protocol_error(event)
            return
        broken = failover.broken(event.message, timed_out=exchange.timed_out)
        if self.client_state == self.state_done and not self._has_begun(exchange) and self._waits_for_server():
            said_no = self._held and exchange.head_status in failover.RETRIED
            yield from self._ask_after(exchange, self._held.failure() if self._held and said_no else broken)
        else:
            yield from self._break_off(exchange, event, broken.message)

    def _waits_for_server(self) -> bool:
        return self.server_state in (
            self.state_wait_for_response_headers,
            self.state_hold_answer,
            self.state_stream_response_body,
        )

    @property
    def is_answered(self) -> bool:
        """A server's answer has begun and not ended."""
        return self._waits_for_server() and self.server_state != self.state_wait_for_response_headers

    def _has_begun(self, exchange: Exchange) -> bool:
        """Whether something has reached the client that another server can't take over."""
        response = self.flow.response
        if response is None:
            return False
        relay = response.stream
        if not isinstance(relay, Relay) or not relay.is_stream or exchange.settling:
            return True
        return relay.first_event_at is not None or "content-length" in response.headers

    def state_consume_request_body(self, event: events.Event) -> CommandGenerator[None]:
        # One byte too many is enough to know; the rest is read and dropped, so that the client gets its answer.
        is_full = len(self.request_body_buf) > vars(self.flow).get("max_body_bytes", -1)
        if isinstance(event, RequestData) and (self.flow.response or is_full):
            return
        yield from super().state_consume_request_body(event)

    @_or_cut
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
            exchange = exchange_of(self.flow)
            if not error:
                assert connection
                self.context.server = self.flow.server_conn = connection
                if exchange:
                    exchange.connection_was_used = connection in self._servers.used
                self._servers.used.add(connection)
                return True
            if exchange is None:
                failed = ResponseProtocolError(self.stream_id, error, ErrorCode.CONNECT_FAILED)
                yield from super().handle_protocol_error(failed)
                return False
            if (yield from self.check_killed(True)):  # the client left: the server did not refuse
                return False
            if not (yield from self._wants_another_try(exchange, failover.not_connected(error))):
                return False

    def _ask_after(self, exchange: Exchange, failure: Failure) -> CommandGenerator[None]:
        if (yield from self._wants_another_try(exchange, failure)):
            yield from self._send_again()

    def _wants_another_try(self, exchange: Exchange, failure: Failure) -> CommandGenerator[bool]:
        """True: the addon has chosen a server, send. False: the client has got its answer, or is gone."""
        self.server_state, self._held = self.state_wait_for_response_headers, None
        before = self.flow.response
        exchange.failure, exchange.has_answer = failure, before is not None or self._own_error is not None
        yield from self._leave_server()
        yield UpstreamFailedHook(self.flow)
        self._paused_event_queue.drop_from_server()  # what came with the same read
        if (yield from self.check_killed(True)):
            return False
        is_refused = self.flow.response is not before
        if exchange.failure is None and not is_refused:
            return True
        if before is not None:
            self.flow.response = before
            yield from self._break_off(exchange, None, failure.message)
        elif is_refused:
            yield from self.send_response()
        elif self._own_error:
            self._held, self._own_error = self._own_error, None
            exchange.answered_by = exchange.error_from
            yield from self._pass_on()
        else:  # the addon is gone or broken: nobody decided
            exchange.outcome = exchange.outcome or "unreachable"
            set_response(self.flow, Refusal(502, "upstream_unreachable", f"The server {failure.message}."))
            yield from self.send_response()
        return False

    def _leave_server(self) -> CommandGenerator[None]:
        """Nothing more is wanted from the server's connection, nor what of it has queued up."""
        old = self.context.server
        if old in self._servers.layers:
            self._servers.layers[old] = Sink(self.context.fork())
            yield commands.CloseConnection(old)
        self._paused_event_queue.drop_from_server()

    def _send_again(self) -> CommandGenerator[None]:
        if not (yield from self.make_server_connection()):
            return
        request = self.flow.request
        body = request.raw_content
        yield SendHttp(RequestHeaders(self.stream_id, request, not body), self.context.server)
        if body:
            yield SendHttp(RequestData(self.stream_id, body), self.context.server)
        yield SendHttp(RequestEndOfMessage(self.stream_id), self.context.server)

    @_or_cut
    def state_wait_for_response_headers(self, event: events.Event) -> CommandGenerator[None]:
        assert isinstance(event, ResponseHeaders)
        headers = event.response.headers
        if "event-stream" in headers.get("content-type", "") or "close" in headers.get("connection", "").lower():
            self._servers.spent.add(self.context.server)
        exchange = exchange_of(self.flow)
        if exchange is None or exchange.sent is None:
            yield from super().state_wait_for_response_headers(event)
            return
        exchange.head_came(event.response.status_code)
        if not is_valid(event.response):
            yield from self._ask_after(exchange, Failure("closed", "sent a head that is not valid"))
            return
        self._held = HeldAnswer(event, needs_event=exchange.needs_event)
        self.server_state = self.state_hold_answer

    @_or_cut
    def state_hold_answer(self, event: events.Event) -> CommandGenerator[None]:
        """The head has come. Nothing is passed on before it is clear that this is the answer."""
        exchange, held = exchange_of(self.flow), self._held
        assert exchange and held and isinstance(event, HttpEvent)
        verdict = held.add(event)
        if verdict is Verdict.PASS:
            yield from self._pass_on()
        elif verdict is Verdict.FAILED:
            if held.is_whole and exchange.head_status in failover.RETRIED:
                self._own_error, exchange.error_from = held, exchange.server
            yield from self._ask_after(exchange, held.failure())

    def _pass_on(self) -> CommandGenerator[None]:
        """What was held is the answer: from here on everything goes to the client as it comes."""
        exchange, held = exchange_of(self.flow), self._held
        assert exchange and held
        self._held, exchange.is_answering = None, True
        if self.flow.response is None:
            self.server_state = self.state_wait_for_response_headers
            yield from super().state_wait_for_response_headers(held.head)
        elif not (yield from self._continue(held.head)):
            return
        for event in held.rest():
            yield from self.server_state(event)

    def _continue(self, head: ResponseHeaders) -> CommandGenerator[bool]:
        """The client has the head of an answer that another server began. False: this is nothing to go on with."""
        exchange = exchange_of(self.flow)
        assert exchange
        if not exchange.can_continue_with(head.response.status_code, head.response.headers):
            yield from self._leave_server()
            why = f"failed, and another one answered with HTTP {head.response.status_code}"
            yield from self._break_off(exchange, None, why)
            return False
        before, exchange.next_head = exchange.relay, head.response.headers
        yield AnswerContinuesHook(self.flow)
        if (yield from self.check_killed(True)):
            return False
        self.server_state = self.state_stream_response_body
        if before and before.is_within_line:  # half a comment must not swallow what comes now
            yield SendHttp(ResponseData(self.stream_id, b"\n\n"), self.context.client)
        return True

    def state_stream_response_body(self, event: events.Event) -> CommandGenerator[None]:
        try:  # not @_or_cut, which would cost something with every chunk
            relay, exchange = self.flow.response and self.flow.response.stream, exchange_of(self.flow)
            if not isinstance(relay, Relay) or exchange is None:
                yield from super().state_stream_response_body(event)
            elif isinstance(event, ResponseData):
                data, ended = relay.feed(event.data), relay.ended
                if ended and not (yield from self._settle(exchange)):
                    return
                if data:
                    if self._keeps_bodies:
                        self.response_body_buf += data
                    yield SendHttp(ResponseData(self.stream_id, data), self.context.client)
            elif isinstance(event, ResponseEndOfMessage):
                yield from self._end(relay, exchange)
            else:
                yield from super().state_stream_response_body(event)
        except Exception:
            yield from self._cut("an answer's way")

    def _end(self, relay: Relay, exchange: Exchange) -> CommandGenerator[None]:
        assert self.flow.response
        if exchange.needs_event and not self._has_begun(exchange):
            yield from self._ask_after(exchange, Failure("closed", "ended its stream without an event"))
            return
        relay.close()
        rest = relay.finish()
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

    def _settle(self, exchange: Exchange) -> CommandGenerator[bool]:
        """Wait until the row is on disk. False: it is not, or the client has left; the answer is cut."""
        if exchange.settled:
            return True
        yield AnswerEndsHook(self.flow)
        if not exchange.settled and self.flow.killable:
            self.flow.kill()
        return not (yield from self.check_killed(True))

    def _break_off(self, exchange: Exchange, event: ResponseProtocolError | None, why: str) -> CommandGenerator[None]:
        """The server is gone. A stream's client is told in the stream, before it is cut; never a clean end."""
        exchange.cut_by = exchange.cut_by or "server"
        event = event or ResponseProtocolError(self.stream_id, why, ErrorCode.GENERIC_SERVER_ERROR)
        if not self._can_tell(exchange):
            yield from super().handle_protocol_error(event)
            return
        # As the base class does it, with the client told once the row is on disk.
        self.flow.error = flow.Error(event.message)
        yield HttpErrorHook(self.flow)
        if (yield from self.check_killed(False)):
            return
        told = stream_error(exchange.meaning, "upstream_cut", f"The server {why}.")
        yield SendHttp(ResponseData(self.stream_id, told), self.context.client)
        yield SendHttp(event, self.context.client)
        self.server_state = self.state_errored
        self.flow.live = False
        yield DropStream(self.stream_id)

    def _can_tell(self, exchange: Exchange) -> bool:
        """Whether there is a stream to say something in, which has not said its last word."""
        response, relay = self.flow.response, exchange.relay
        if response is None or relay is None or not self._waits_for_server():
            return False
        is_open = relay.is_stream and not relay.ended and "content-length" not in response.headers
        return is_open and is_readable_stream(response.headers)

    def _cut(self, where: str) -> CommandGenerator[None]:
        log.exception("a fault in %s: the request is cut", where)
        if self.flow.killable:
            self.flow.kill()
        yield from self.check_killed(True)

    @cached_property
    def _keeps_bodies(self) -> bool:
        """For mitmweb. Looking an option up costs more than passing a chunk on."""
        return bool(self.context.options.store_streamed_bodies)
