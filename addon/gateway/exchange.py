"""One request, from admission to its row."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway import wire
from gateway.auth import Caller
from gateway.balancer import Search
from gateway.endpoints import canonical
from gateway.failover import Failure
from gateway.quota import Ask
from gateway.records import MAX_TEXT, Row
from gateway.relay import Relay
from gateway.servers import Server
from gateway.strategies import Report
from gateway.tally import Tokens
from gateway.usage import ends_with_mark
from gateway.wire import Asked

# Endpoints whose streams tell their usage only when asked to by stream_options.
_USAGE_WHEN_ASKED = frozenset({"/v1/chat/completions", "/v1/completions", "/chat/completions"})


@dataclass(eq=False)
class Exchange:
    """The state of one request that passed authentication. Times are of the monotonic clock, in seconds."""

    id: str
    caller: Caller
    endpoint: str  # the path without its query
    path: str  # the path with its query
    started_at: str
    started: float
    worker: str
    max_body_bytes: int
    client_request_id: str | None = None
    close_client: bool = False  # the client asked for its connection to be closed after the answer
    http10: bool = False
    asked: Asked = field(default_factory=Asked)
    served_model: str | None = None
    fill_in_model: bool = False  # the body names no model: write the default one into it
    fields: tuple[tuple[bytes, bytes], ...] = ()  # the client's headers, as they came
    body: bytes = b""
    request_bytes: int = 0
    asks: list[Ask] = field(default_factory=list)  # as it was admitted: what it holds, and of what
    limit_headers: dict[str, str] = field(default_factory=dict)  # what is left of its limits
    search: Search | None = None  # for a server; from when it is known what is wanted
    fallback_from: str | None = None  # the model that was wanted, when another one answers
    waited_s: float = 0.0  # for a server, over all attempts
    attempts: int = 0
    met_loading: int = 0  # so many of them met a model that loads
    loading_since: float | None = None  # when the first of these did
    sent: float | None = None  # when the last attempt was sent
    heard: float = 0.0  # when the server last gave a sign of life since then
    heard_bytes: int = 0  # how much of the answer had come then
    head_status: int | None = None  # of the last attempt's answer, before it is clear that this is the answer
    is_answering: bool = False  # what the last attempt brings goes to the client
    has_left: bool = False  # the client is gone
    usage_asked: bool = False  # we asked the server for usage: strip it
    relay: Relay | None = None
    status: int | None = None
    response_bytes: int = 0
    error_code: str | None = None
    outcome: str | None = None  # decided before the end: refused, unreachable
    cut_by: str | None = None  # "client" or "server": whose end of the connection broke first
    failure: Failure | None = None  # how the last attempt failed; None: go on
    has_answer: bool = False  # should nothing help, there is a server's own error or an answer's head to go on with
    error_from: Server | None = None  # whose own error that is
    answered_by: Server | None = None  # when it is not the one that was tried last
    next_head: Mapping[str, str] = field(default_factory=dict)  # of an answer that goes on with another server
    connection_was_used: bool = False  # the attempt went over a connection that had carried a request before
    timed_out: bool = False
    is_open: bool = False  # its open row is written, or about to be
    settling: bool = False  # the row is on its way
    settled: bool = False  # the row is on disk

    @property
    def server(self) -> Server | None:
        """Who answered, or was tried last."""
        claim = self.search.claim if self.search else None
        return self.answered_by or (claim.server if claim else None)

    @property
    def route(self) -> str | None:
        """Why that server, in a word."""
        choice = self.search.choice if self.search else None
        return choice.route if choice and self.attempts < 2 else "retry" if choice else None

    @property
    def meaning(self) -> str:
        """The endpoint as its server understands it, however it is written."""
        return canonical(self.endpoint)

    def release(self) -> None:
        """Give back what was claimed."""
        if self.search:
            self.search.release()

    def client_left(self) -> None:
        """Whatever it waits for, it waits no more."""
        self.has_left = True
        if self.search:
            self.search.give_up()

    def begin_attempt(self) -> None:
        self.attempts += 1
        self.sent = self.heard = time.monotonic()
        self.head_status, self.timed_out, self.is_answering = None, False, False
        self.failure = None

    def head_came(self, status: int) -> None:
        self.head_status = status
        self.heard = time.monotonic()

    def silent_s(self, now: float) -> float:
        """How long the server has sent nothing. To be asked every now and then."""
        received = self.relay.response_bytes if self.relay else 0
        if received != self.heard_bytes:
            self.heard, self.heard_bytes = now, received
        return now - self.heard

    @property
    def has_begun(self) -> bool:
        """Whether the client has the answer's first event, or the first bytes of an answer that has none."""
        return self.relay is not None and (not self.relay.is_stream or self.relay.first_event_at is not None)

    @property
    def needs_event(self) -> bool:
        """Whether a stream that ends without an event has failed."""
        return ends_with_mark(self.meaning)

    def can_continue_with(self, status: int, head: Mapping[str, str]) -> bool:
        """Whether another server's answer can go on where this one's events would have begun."""
        is_plain = head.get("content-encoding", "identity").lower() == "identity"
        return status == self.status and is_plain and "event-stream" in head.get("content-type", "")

    def body_for(self, server: Server, content_type: str) -> bytes:
        """The client's body, with what `server` needs patched in: its name of the model, the wish for usage."""
        body, model, asked = self.body, self.served_model, self.asked
        self.usage_asked = False
        if model is not None and (self.fill_in_model or asked.model not in (None, model)):
            if asked.kind == "json":
                body = wire.with_model(body, model)
            elif asked.kind == "form":
                body = wire.with_form_model(body, content_type, model)
        # llama.cpp's timings say it all; a server that we don't know yet is left alone.
        if server.type == "openai" and asked.stream and not asked.include_usage and self.meaning in _USAGE_WHEN_ASKED:
            self.usage_asked = True
            body = wire.with_usage_asked(body)
        return body

    def final_outcome(self) -> str:
        """How a request ended whose answer came to its end."""
        if self.outcome:
            return self.outcome
        if (self.status or 0) >= 400 or (self.relay and self.relay.tally.error):
            return "error"
        return "upstream_cut" if self.relay and self.relay.lacks_end_mark else "ok"

    def cut_outcome(self) -> str:
        """How a request ended whose connection broke."""
        if self.outcome:
            return self.outcome
        return {"client": "client_closed", "server": "upstream_cut"}.get(self.cut_by or "", "interrupted")

    def row(self, outcome: str, now: float | None = None) -> Row:
        """The row as it stands. `now`: when it ended; None while it is open."""
        row = Row(
            id=self.id,
            started_at=self.started_at,
            endpoint=self.endpoint[:MAX_TEXT],
            outcome=outcome,
            worker=self.worker,
            key_id=self.caller.key_id,
            key_name=self.caller.key_name,
            team=self.caller.team,
            model=self.asked.model,
            served_model=self.served_model,
            server=self.server.name if self.server else None,
            route=self.route,
            fallback_from=self.fallback_from,
            stream=int(self.asked.stream),
            status=self.status,
            error_code=self.error_code,
            attempts=self.attempts,
            request_bytes=self.request_bytes,
            response_bytes=self.response_bytes,
            client_request_id=self.client_request_id and self.client_request_id[:MAX_TEXT],
        )
        if now is not None:
            row.duration_ms = _ms(now - self.started)
        if self.search:
            row.queue_ms = _ms(self.waited_s)
        if self.relay:
            self._add_answer(row, self.relay)
        return row

    def _add_answer(self, row: Row, relay: Relay) -> None:
        tally = relay.tally
        tokens, row.tokens_source = tally.tokens() if self.status and self.status < 400 else (Tokens(), None)
        if row.tokens_source == "counted" and not relay.is_stream:  # a whole answer is one piece of any length
            tokens, row.tokens_source = Tokens(), None
        row.prompt_tokens, row.cached_tokens = tokens.prompt, tokens.cached
        row.completion_tokens, row.reasoning_tokens = tokens.completion, tokens.reasoning
        row.prompt_ms, row.predicted_ms = tally.prompt_ms, tally.predicted_ms
        row.error_code = row.error_code or tally.error
        row.response_bytes = relay.response_bytes
        if relay.is_stream and relay.first_event_at is not None:
            row.ttft_ms = _ms(relay.first_event_at - self.started)

    def report(self) -> Report | None:
        """What the answer tells of its server. None: nothing, since it did not end well."""
        relay = self.relay
        if relay is None or self.sent is None or (self.status or 0) >= 400:
            return None
        tokens, _ = relay.tally.tokens()
        first = relay.first_event_at if relay.is_stream else None
        return Report(
            ttft_s=first - self.sent if first is not None else None,
            prompt_tokens=tokens.prompt,
            cached_tokens=tokens.cached,
            prompt_ms=relay.tally.prompt_ms,
        )


def _ms(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 2)
