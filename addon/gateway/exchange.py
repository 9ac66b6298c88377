"""One request, from admission to its row."""

import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from gateway import wire
from gateway.auth import Caller
from gateway.relay import Relay
from gateway.routing import Claim, Server
from gateway.tally import Tokens
from gateway.wire import Asked

# Endpoints whose streams tell their usage only when asked to by stream_options.
_USAGE_WHEN_ASKED = frozenset({"/v1/chat/completions", "/v1/completions", "/chat/completions"})


# A head may be tens of kilobytes; what clients write into the books of all is less.
MAX_TEXT = 1000


class Row(msgspec.Struct):
    """A row of `requests`: the columns' names and units. None: unknown, or not come to."""

    id: str
    started_at: str
    endpoint: str
    outcome: str
    worker: str
    key_id: int | None = None
    key_name: str | None = None
    model: str | None = None
    served_model: str | None = None
    server: str | None = None
    stream: int | None = None
    status: int | None = None
    error_code: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    tokens_source: str | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    duration_ms: float | None = None
    prompt_ms: float | None = None
    predicted_ms: float | None = None
    attempts: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    client_request_id: str | None = None


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
    claim: Claim | None = None
    tried: list[Server] = field(default_factory=list)
    attempts: int = 0
    sent: float | None = None  # when the last attempt was sent
    usage_asked: bool = False  # we asked the server for usage: strip it
    relay: Relay | None = None
    status: int | None = None
    response_bytes: int = 0
    error_code: str | None = None
    outcome: str | None = None  # decided before the end: refused, unreachable
    cut_by: str | None = None  # "client" or "server": whose end of the connection broke first
    failure: str | None = None  # why the last attempt failed, before a byte of an answer; None: go on
    connection_refused: bool = False
    connection_was_used: bool = False  # the attempt went over a connection that had carried a request before
    may_send_again: bool = False  # nothing at all came back from the last attempt
    timed_out: bool = False
    is_open: bool = False  # its open row is written, or about to be
    settling: bool = False  # the row is on its way
    settled: bool = False  # the row is on disk

    @property
    def server(self) -> Server | None:
        return self.claim.server if self.claim else None

    def release(self) -> None:
        """Give back what was claimed."""
        if self.claim:
            self.claim.release()

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
        if server.type == "openai" and asked.stream and not asked.include_usage and self.endpoint in _USAGE_WHEN_ASKED:
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
            model=self.asked.model,
            served_model=self.served_model,
            server=self.server.name if self.server else None,
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
        if self.attempts:
            row.queue_ms = 0.0  # nothing waits here yet
        if self.relay:
            self._add_answer(row, self.relay)
        return row

    def _add_answer(self, row: Row, relay: Relay) -> None:
        tally = relay.tally
        tokens, row.tokens_source = tally.tokens() if self.status and self.status < 400 else (Tokens(), None)
        row.prompt_tokens, row.cached_tokens = tokens.prompt, tokens.cached
        row.completion_tokens, row.reasoning_tokens = tokens.completion, tokens.reasoning
        row.prompt_ms, row.predicted_ms = tally.prompt_ms, tally.predicted_ms
        row.error_code = row.error_code or tally.error
        row.response_bytes = relay.response_bytes
        if relay.is_stream and relay.first_event_at is not None:
            row.ttft_ms = _ms(relay.first_event_at - self.started)


def _ms(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 2)


def utc_now() -> str:
    """UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def uuid7() -> str:
    """A UUIDv7 (RFC 9562): sorts by the time it was made in, to the millisecond."""
    millis, noise = time.time_ns() // 1_000_000, os.urandom(10)
    high = (noise[0] & 0x0F) | 0x70
    variant = (noise[2] & 0x3F) | 0x80
    digits = f"{millis:012x}{high:02x}{noise[1]:02x}{variant:02x}{noise[3:].hex()}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
