"""A front: a TCP relay before a real server that counts what arrives, and can refuse, or answer by itself.

The server behind it may change its port: after a restart, set `target`. Bytes pass as they are.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Arrival:
    """A POST that came to a server. `request_id`: its X-Request-ID."""

    at: float  # of the monotonic clock
    request_id: str


class Front:
    """A port and a thread of its own. `posts` only ever grows."""

    def __init__(self, target: int, on_answer: Callable[[bytes], None] | None = None) -> None:
        """`on_answer`: is told each piece of an answer before it is passed on, in the front's thread."""
        self.target = target
        self.port = 0
        self.posts: list[Arrival] = []
        self.answer: bytes | None = None  # what every request gets instead of the server's own
        self._on_answer = on_answer
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="front", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self._call(self._drop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def listen(self) -> None:
        """Accept connections (again), on the same port as before."""
        self._call(self._listen())

    def refuse(self) -> None:
        """Close the port: new connections are refused, those that there are go on."""
        self._call(self._close_port())

    def _call[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024, reuse_address=True)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close_port(self) -> None:
        if self._server:
            self._server.close()

    async def _drop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        connection = _Connection(self, reader, writer)
        try:
            await connection.run()
        except ConnectionError:
            pass  # its client has left
        except asyncio.CancelledError:
            connection.abort()
        finally:
            await connection.close()
            self._tasks.discard(task)

    def note_request(self, head: bytes) -> None:
        if head.startswith(b"POST "):
            fields = (line.partition(b":") for line in head.split(b"\r\n"))
            ids = [value.strip().decode() for name, _, value in fields if name.lower() == b"x-request-id"]
            self.posts.append(Arrival(time.monotonic(), ids[0] if ids else ""))

    def note_answer(self, data: bytes) -> None:
        if self._on_answer:
            self._on_answer(data)


class _Connection:
    def __init__(self, front: Front, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._front = front
        self._reader = reader
        self._writer = writer
        self._server: asyncio.StreamWriter | None = None
        self._pump: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Also after the server has gone: what its client sent before it knew has arrived, too."""
        while request := await self._next_request():
            if self._front.answer is not None:
                self._writer.write(self._front.answer)
                await self._writer.drain()
                return
            if self._pump is None and not await self._connect():
                return
            assert self._server and self._pump
            if not self._pump.done():
                self._server.write(request)

    def abort(self) -> None:
        """Whatever is still to be sent is not."""
        for writer in filter(None, (self._writer, self._server)):
            writer.transport.abort()

    async def close(self) -> None:
        if self._pump:
            self._pump.cancel()
        for writer in filter(None, (self._writer, self._server)):
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _next_request(self) -> bytes:
        """Its exact bytes; empty: the client has left."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            self._front.note_request(head)
            length = next((line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
            return head + await self._reader.readexactly(int(length))
        except asyncio.IncompleteReadError:
            return b""

    async def _connect(self) -> bool:
        try:
            reader, self._server = await asyncio.open_connection("127.0.0.1", self._front.target)
        except OSError:
            return False
        self._pump = asyncio.create_task(self._pass_back(reader))
        return True

    async def _pass_back(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                self._front.note_answer(data)
                self._writer.write(data)
                await self._writer.drain()
        with contextlib.suppress(OSError):
            self._writer.write_eof()
