"""A client of one streamed chat: sends it, reads the answer as it arrives, says what was wrong with it."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import msgspec

from benchmark import shapes
from benchmark.dechunk import Dechunk

_WITHIN_S = 300.0  # for a whole answer, its time in a queue included
_DONE = b"[DONE]"


@dataclass(frozen=True)
class Endpoint:
    """Where requests can be sent: a server or a gateway."""

    name: str
    port: int
    host: str = "127.0.0.1"
    key: str = ""


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Error(msgspec.Struct, frozen=True):
    message: str = ""
    code: str | int | None = None


class _Event(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class Reply:
    """One answer, sans-IO: the clock's readings are passed in. `problem` is empty when it was whole and good."""

    def __init__(self) -> None:
        self.ended = False
        self.problem = ""
        self.text = ""
        self.usage: _Usage | None = None
        self.head_at: float | None = None
        self.first_at: float | None = None  # of text
        self.ended_at: float | None = None
        self.headers: dict[str, str] = {}
        self._status = ""
        self._head = b""
        self._body = b""  # what no event was made of yet
        self._dechunk: Dechunk | None = None
        self._done = False

    @property
    def cached_tokens(self) -> int:
        details = self.usage and self.usage.prompt_tokens_details
        return details.cached_tokens if details else 0

    def feed(self, data: bytes, now: float) -> None:
        if self.head_at is None:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self.head_at = now
            self._read_head(head.decode("latin-1"))
        try:
            self._body += b"".join(self._dechunk.feed(data)) if self._dechunk else data
            if self._status == "200":
                self._read_events(now)
        except (ValueError, msgspec.ValidationError) as error:
            self.fail(f"not understood: {error}", now)
            return
        if (self._dechunk and self._dechunk.ended) or len(self._body) == int(self.headers.get("content-length", -1)):
            self._end(now)

    def end_of_file(self, now: float) -> None:
        """The connection ended; nothing is wrong if the answer was over."""
        if not self.ended:
            where = "the first token" if self.first_at is None else "the end"
            self.fail(f"cut before {where}", now)

    def fail(self, problem: str, now: float) -> None:
        self.problem = self.problem or problem
        self.ended, self.ended_at = True, now

    def _read_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        self._status = first[9:12]
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if self.headers.get("transfer-encoding") == "chunked":
            self._dechunk = Dechunk()

    def _read_events(self, now: float) -> None:
        *blocks, self._body = self._body.split(b"\n\n")
        for line in (line for block in blocks for line in block.split(b"\n") if line.startswith(b"data:")):
            data = line[5:].strip()
            if data == _DONE:
                self._done = True
                continue
            event = msgspec.json.decode(data, type=_Event)
            self.usage = event.usage or self.usage
            if event.error:
                self.problem = f"error in the stream: {event.error.code or event.error.message}"
            for choice in event.choices:
                if choice.delta.content:
                    self.first_at = now if self.first_at is None else self.first_at
                    self.text += choice.delta.content

    def _end(self, now: float) -> None:
        self.ended, self.ended_at = True, now
        if self._status != "200":
            self.problem = f"status {self._status}{_code(self._body)}"
        elif not self.problem and not (self._done and self.usage and self.text):
            self.problem = "ended without text, usage or [DONE]"


def _code(body: bytes) -> str:
    try:
        error = msgspec.json.decode(body, type=_Event).error
    except msgspec.DecodeError:
        return ""
    return f" {error.code}" if error else ""


async def ask(endpoint: Endpoint, body: Mapping[str, object]) -> Reply:
    """On a connection of its own: llama-server closes after each stream anyway."""
    reply = Reply()
    try:
        async with asyncio.timeout(_WITHIN_S):
            await _exchange(endpoint, body, reply)
    except TimeoutError:
        reply.fail("no end in time", perf_counter())
    except OSError as error:
        reply.fail(f"connection: {error.strerror or error}", perf_counter())
    return reply


async def _exchange(endpoint: Endpoint, body: Mapping[str, object], reply: Reply) -> None:
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    try:
        writer.write(_request(endpoint, body))
        while not reply.ended:
            data = await reader.read(1 << 16)
            if data:
                reply.feed(data, perf_counter())
            else:
                reply.end_of_file(perf_counter())
    finally:
        writer.close()


def _request(endpoint: Endpoint, body: Mapping[str, object]) -> bytes:
    content = json.dumps(body).encode()
    key = f"Authorization: Bearer {endpoint.key}\r\n" if endpoint.key else ""
    head = (
        f"POST {shapes.PATH} HTTP/1.1\r\nHost: {endpoint.host}:{endpoint.port}\r\nUser-Agent: bench\r\nAccept: */*\r\n"
        f"{key}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
