"""The scripted upstream: llama-server's answers at next to no CPU, so that what is measured is the gateway.

One raw protocol on uvloop, every answer made beforehand. As llama-server does, it closes the connection after each
streamed answer without having said so; `--keep-streams` leaves it open. It ends when its standard input does.
"""

import argparse
import asyncio
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import cast

import uvloop

from benchmark import shapes

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_(?:completion_)?tokens": *(\d+)')
_PACE = re.compile(rb'"seed": *(\d+)')
_STREAM = re.compile(rb'"stream": *true')
_ASKS_USAGE = re.compile(rb'"include_usage": *true')
_FIXED: dict[bytes, Callable[[], bytes]] = {
    b"GET /health ": shapes.health,
    b"GET /v1/models ": shapes.models,
}
_TICK_S = 0.001  # paced streams are spread over their interval in steps of this, so that no burst forms


def _number(pattern: re.Pattern[bytes], text: bytes, default: int) -> int:
    found = pattern.search(text)
    return int(found[1]) if found else default


class Stream:
    """One streamed answer under way."""

    def __init__(self, upstream: "Upstream", frames: tuple[bytes, ...]) -> None:
        self._upstream = upstream
        self._frames = frames
        self._next = 0

    def send_one(self) -> bool:
        """Sends the next chunk, with the finish chunk [DONE] too, as llama-server does; False when done."""
        if self._upstream.transport is None:
            return False
        if self._next + 2 < len(self._frames):
            self._upstream.transport.write(self._frames[self._next])
            self._next += 1
            return True
        self.send_all()
        return False

    def send_all(self) -> None:
        if self._upstream.transport is not None:
            self._upstream.transport.write(b"".join(self._frames[self._next :]))
            self._upstream.stream_ended()


class Wheel:
    """Sends every stream's next chunk once per interval, each stream at its own moment of the interval."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pace_per_s: int) -> None:
        self._loop = loop
        self._slots: list[list[Stream]] = [[] for _ in range(max(1, round(1 / (pace_per_s * _TICK_S))))]
        self._tick = 0
        self._due = 0.0
        self._running = 0

    def add(self, stream: Stream) -> None:
        self._slots[self._tick % len(self._slots)].append(stream)
        self._running += 1
        if self._running == 1:
            self._due = self._loop.time() + _TICK_S
            self._loop.call_at(self._due, self._turn)

    def _turn(self) -> None:
        now = self._loop.time()
        while self._due <= now:
            self._tick += 1
            self._due += _TICK_S
            slot = self._tick % len(self._slots)
            before = self._slots[slot]
            self._slots[slot] = [stream for stream in before if stream.send_one()]
            self._running -= len(before) - len(self._slots[slot])
        if self._running:
            self._loop.call_at(self._due, self._turn)


class Upstream(asyncio.Protocol):
    """One connection: whole requests in, ready answers out."""

    def __init__(self, wheels: dict[int, Wheel], close_after_stream: bool) -> None:
        self.transport: asyncio.Transport | None = None
        self._wheels = wheels
        self._close_after_stream = close_after_stream
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own class is none of asyncio's

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        while self._received:
            head_end = self._received.find(b"\r\n\r\n")
            if head_end < 0:
                return
            end = head_end + 4 + _number(_LENGTH, self._received[: head_end + 2], 0)
            if len(self._received) < end:
                return
            request, self._received = self._received[:end], self._received[end:]
            self._answer(request, head_end)

    def _answer(self, request: bytes, head_end: int) -> None:
        assert self.transport is not None
        if not request.startswith(b"POST " + shapes.PATH.encode() + b" "):
            fixed = next((make for start, make in _FIXED.items() if request.startswith(start)), shapes.not_found)
            self.transport.write(fixed())
            return
        body = request[head_end:]
        chunks = _number(_TOKENS, body, 8)
        if not _STREAM.search(body):
            self.transport.write(shapes.completion(chunks))
            return
        self.transport.write(shapes.STREAM_HEAD)
        stream = Stream(self, shapes.frames(chunks, bool(_ASKS_USAGE.search(body))))
        asyncio.get_running_loop().call_soon(self._start, stream, _number(_PACE, body, 0))

    def _start(self, stream: Stream, pace_per_s: int) -> None:
        if pace_per_s == 0:
            stream.send_all()
        elif stream.send_one():
            self._wheels[pace_per_s].add(stream)

    def stream_ended(self) -> None:
        if self._close_after_stream and self.transport is not None:
            self.transport.close()


class _Wheels(defaultdict[int, Wheel]):
    def __missing__(self, pace_per_s: int) -> Wheel:
        self[pace_per_s] = wheel = Wheel(asyncio.get_running_loop(), pace_per_s)
        return wheel


async def serve(port: int, close_after_stream: bool) -> None:
    loop = asyncio.get_running_loop()
    wheels = _Wheels()
    await loop.create_server(lambda: Upstream(wheels, close_after_stream), "127.0.0.1", port, backlog=1024)
    print(f"READY http://127.0.0.1:{port}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    options = argparse.ArgumentParser(description="A scripted upstream that speaks as llama-server does.")
    options.add_argument("port", type=int)
    options.add_argument("--keep-streams", action="store_true", help="keep the connection after a streamed answer")
    chosen = options.parse_args()
    uvloop.run(serve(chosen.port, not chosen.keep_streams))


if __name__ == "__main__":
    main()
