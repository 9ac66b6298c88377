"""One client of the load generator: sends requests one after the other and checks each answer."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import cast

from benchmark import shapes
from benchmark.answer import Answer
from benchmark.work import Job

_PAUSE_AFTER_ERROR_S = 0.02
_MOST_ERRORS = 2_000  # then something is so wrong that going on tells nothing


@dataclass(frozen=True)
class Sample:
    """Seconds, from the wish to send: connecting counts when it is needed."""

    latency_s: float
    ttft_s: float
    from_first_s: float


@dataclass
class Tally:
    """What all callers of one job count together."""

    samples: list[Sample] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    events: int = 0
    _left: int = 0
    _until: float = 0.0

    def allow(self, answers: int, seconds: float) -> None:
        self._left = answers
        self._until = perf_counter() + seconds

    def take(self) -> bool:
        """May one more be begun?"""
        if self._left <= 0 or perf_counter() >= self._until or self.errors.total() > _MOST_ERRORS:
            return False
        self._left -= 1
        return True

    def clear(self) -> None:
        """Forgets the warm-up, but not what went wrong in it."""
        self.samples.clear()
        self.events = 0


class Connection(asyncio.Protocol):
    def __init__(self, count_events: Callable[[int], None]) -> None:
        self.is_open = False
        self._count_events = count_events
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._ended: asyncio.Future[float] | None = None

    async def ask(self, request: bytes, answer: Answer) -> float:
        """Returns when the answer ended."""
        assert self._transport is not None
        self._answer = answer
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._ended

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class is none of asyncio's
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._answer is not None:
            self._answer.end_of_file()
            self._report(perf_counter())

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if self._answer is None:  # bytes that nobody asked for: whoever asks next must not take them for an answer
            self.abort()
            return
        before = self._answer.events
        self._answer.feed(data, now)
        self._count_events(self._answer.events - before)
        if self._answer.ended:
            self._report(now)

    def _report(self, now: float) -> None:
        self._answer = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(now)


class Caller:
    def __init__(self, job: Job, tally: Tally) -> None:
        self._job = job
        self._tally = tally
        self._streamed = job.kind != "requests"
        self._request = _request(job, streamed=self._streamed)
        fingerprint = shapes.stream_fingerprint if self._streamed else shapes.completion_fingerprint
        self._exact = fingerprint(job.chunks) if job.exact else None
        self._connection: Connection | None = None

    async def run(self, delay_s: float = 0.0) -> None:
        """One request after the other while the tally allows it."""
        if delay_s:
            await asyncio.sleep(delay_s)
        while self._tally.take():
            wrong = await self._once()
            if wrong:
                self._tally.errors[wrong] += 1
                self.close()
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    async def _once(self) -> str:
        """Returns what went wrong, or nothing."""
        began = perf_counter()
        answer = Answer(streamed=self._streamed)
        try:
            connection = await self._connected()
            ended = await connection.ask(self._request, answer)
        except OSError as error:
            return f"connection: {error.strerror or error}"
        wrong = answer.what_is_wrong(self._exact)
        if wrong:
            return wrong
        first_at = answer.first_at or ended
        self._tally.samples.append(Sample(ended - began, first_at - began, ended - first_at))
        if answer.closes or (self._streamed and self._job.reconnect):
            self.close()
        return ""

    async def _connected(self) -> Connection:
        if self._connection is None or not self._connection.is_open:
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(
                lambda: Connection(self._count_events), self._job.host, self._job.port
            )
        return self._connection

    def _count_events(self, count: int) -> None:
        self._tally.events += count


def _request(job: Job, *, streamed: bool) -> bytes:
    body = shapes.request_body(job.chunks, stream=streamed, pace_per_s=job.pace_per_s)
    head = (
        f"POST {job.path}{shapes.PATH} HTTP/1.1\r\nHost: {job.host}:{job.port}\r\nUser-Agent: bench\r\nAccept: */*\r\n"
        f"Authorization: Bearer {job.key or 'sk-none'}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
