"""A scripted upstream: it does to a gateway what a real server seldom does, at the moment that a test asks for it.

    with Upstream() as upstream:
        upstream.plan(CLOSE, reply({"error": ...}, status=503), (*stream("data: 1\\n\\n"), CLOSE))
        ...
        assert upstream.requests[0].json()["model"] == "tiny"

A behaviour is what happens after one request was read: bytes to send, each in a write of its own, pauses, and an end of
the connection. Without an end the connection is kept for the next request. It is for faults only: what llama-server
does is tested on llama-server.
"""

import asyncio
import contextlib
import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import pairwise
from typing import Any, Self

from waiting import eventually


class Act(Enum):
    CLOSE = auto()  # FIN
    RESET = auto()  # RST; what the kernel has not sent yet is lost
    STALL = auto()  # silence until `release()`, or until the client leaves


@dataclass(frozen=True)
class Pause:
    seconds: float


CLOSE, RESET, STALL = Act.CLOSE, Act.RESET, Act.STALL

type Step = bytes | Pause | Act
type Steps = Step | Sequence[Step]  # bytes are one step, though they are a sequence too
type Behaviour = Steps | Callable[["Request"], Steps]


@dataclass(frozen=True)
class Request:
    """One request as it came: `head` and `raw_body` are its exact bytes, `body` is the body without its chunks."""

    connection: int  # counted from 0
    head: bytes
    raw_body: bytes
    body: bytes

    @property
    def method(self) -> str:
        return self.line[0]

    @property
    def target(self) -> str:
        return self.line[1]

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Names in lower case."""
        fields = (line.partition(":") for line in self.head.decode("latin-1").split("\r\n")[1:] if line)
        return [(name.strip().lower(), value.strip()) for name, _, value in fields]

    def values(self, name: str) -> list[str]:
        return [value for field, value in self.headers if field == name.lower()]

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def line(self) -> list[str]:
        return self.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")


def reply(
    body: object = None, status: int = 200, content_type: str = "application/json", headers: Iterable[str] = ()
) -> bytes:
    """A whole reply with Content-Length. `body`: bytes, or anything that JSON can say. `headers`: `Name: value`."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(status, f"Content-Type: {content_type}", f"Content-Length: {len(payload)}", *headers) + payload


def stream(*events: str | bytes, content_type: str = "text/event-stream", headers: Iterable[str] = ()) -> list[Step]:
    """A chunked reply as steps: the head, one chunk for each event, the end."""
    chunks = [chunk(event) for event in events]
    return [head(200, f"Content-Type: {content_type}", "Transfer-Encoding: chunked", *headers), *chunks, chunk(b"")]


def head(status: int, *headers: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status} Scripted", *headers, "")).encode("latin-1")


def chunk(data: str | bytes) -> bytes:
    payload = data.encode() if isinstance(data, str) else data
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def cut(data: bytes, *places: int) -> list[bytes]:
    """The same bytes in pieces, cut at these offsets."""
    edges = [0, *sorted(places), len(data)]
    return [piece for start, end in pairwise(edges) if (piece := data[start:end])]


def pieces(data: bytes, size: int) -> list[bytes]:
    return cut(data, *range(size, len(data), size))


def paced(steps: Sequence[Step], seconds: float) -> list[Step]:
    """With a pause before every step but the first, so that each write is likely to be read on its own."""
    return [part for step in steps for part in (Pause(seconds), step)][1:]


OK = reply(
    {
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}],
        "model": "tiny",
        "object": "chat.completion",
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }
)
MODELS = reply({"object": "list", "data": [{"id": "tiny", "object": "model"}]})
HEALTH = reply({"status": "ok"})
QUESTIONS = ("/health", "/v1/models", "/props")


class Upstream:
    """A server on a port and in a thread of its own. Its lists only ever grow, so they can be read at any time."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.left: list[Request] = []  # those whose client went away before the behaviour's end
        self.incomplete: list[bytes] = []  # what came on connections that ended, or went wrong, within a request
        self.connections = 0  # accepted so far
        self.port = 0
        self._plans: dict[str | None, deque[Behaviour]] = {}
        self._on_connect: deque[Steps] = deque()
        self._always: dict[str, Behaviour] = {"/v1/models": MODELS, "/health": HEALTH}
        self._running: set[asyncio.Task[None]] = set()  # one for each open connection
        self._stalled: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="upstream", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def asked(self) -> list[Request]:
        """What came on behalf of clients: without the questions that a gateway asks by itself, at any time."""
        return [one for one in self.requests if one.method != "GET" or not one.path.endswith(QUESTIONS)]

    @property
    def open(self) -> int:
        return len(self._running)

    def plan(self, *behaviours: Behaviour, path: str | None = None) -> None:
        """Queue behaviours, one for each request to `path`; without a path, for each request that is not a GET.

        After them, and for what has no plan: GET /health and /v1/models (one model, `tiny`) are answered, and
        everything else gets OK, a chat completion.
        """
        self._plans.setdefault(path, deque()).extend(behaviours)

    def always(self, path: str, behaviour: Behaviour) -> None:
        """What requests to `path` get when no plan is left for them."""
        self._always[path] = behaviour

    def plan_connections(self, *behaviours: Steps) -> None:
        """Queue behaviours for new connections, before anything is read: most of all CLOSE, RESET and STALL."""
        self._on_connect.extend(behaviours)

    def listen(self) -> None:
        """Accept connections (again), on the same port as before."""
        self._call(self._listen())

    def refuse(self) -> None:
        """Close the port and every connection: a server that is not there."""
        self._call(self._close_port())
        self.drop_connections()

    def drop_connections(self) -> None:
        """Close every open connection without a word, as servers do to idle ones. New ones are welcome."""
        self._call(self._drop())

    def release(self) -> None:
        """Let everything that is in STALL now go on with its next step."""
        self._call(self._release())

    def wait_requests(self, count: int = 1, within_s: float = 10) -> list[Request]:
        eventually(lambda: len(self.requests) >= count, f"{count} requests at the upstream", within_s)
        return self.requests[:count]

    def wait_left(self, count: int = 1, within_s: float = 10) -> list[Request]:
        eventually(lambda: len(self.left) >= count, f"{count} clients leaving the upstream", within_s)
        return self.left[:count]

    def wait_stalled(self, count: int = 1, within_s: float = 10) -> None:
        eventually(lambda: len(self._stalled) >= count, f"{count} requests stalled at the upstream", within_s)

    def _call[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _listen(self) -> None:
        # reuse_address: the port has connections in TIME_WAIT when it is opened again
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024, reuse_address=True)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close_port(self) -> None:
        if self._server:
            for listener in self._server.sockets:
                self._loop.remove_reader(listener)
            await asyncio.sleep(0)  # Python 3.13 forgets a connection that was accepted just before its server closes
            self._server.close()

    async def _release(self) -> None:
        for connection in self._stalled:
            connection.wake()

    async def _drop(self) -> None:
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _end(self) -> None:
        """Connections that were accepted a moment ago have to be closed, too: after the loop's end nobody could."""
        this = asyncio.current_task()
        while others := [task for task in asyncio.all_tasks() if task is not this]:
            for task in others:
                task.cancel()
            await asyncio.wait(others)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._running.add(task)
        connection = _Connection(self.connections, reader, writer)
        self.connections += 1
        pump = asyncio.create_task(connection.pump())
        try:
            await self._converse(connection)
        except asyncio.CancelledError:
            pass  # from _drop; asyncio would report it for this callback
        finally:
            pump.cancel()
            writer.close()
            self._running.discard(task)

    async def _converse(self, connection: "_Connection") -> None:
        if self._on_connect and not await self._play(connection, self._on_connect.popleft()):
            return
        while request := await connection.next_request():
            self.requests.append(request)
            try:
                behaviour = self._behaviour_for(request)
                if not await self._play(connection, behaviour(request) if callable(behaviour) else behaviour):
                    return
            except ConnectionError:
                self.left.append(request)
                return
        if connection.received:
            self.incomplete.append(bytes(connection.received))

    def _behaviour_for(self, request: Request) -> Behaviour:
        plan = self._plans.get(request.path) or (self._plans.get(None) if request.method != "GET" else None)
        return plan.popleft() if plan else self._always.get(request.path, OK)

    async def _play(self, connection: "_Connection", steps: Steps) -> bool:
        """Whether the connection is kept after these steps. Raises ConnectionError when the client leaves before."""
        for step in [steps] if isinstance(steps, bytes | Pause | Act) else steps:
            match step:
                case Act.CLOSE:
                    return False
                case Act.RESET:
                    connection.reset()
                    return False
                case Act.STALL:
                    self._stalled.add(connection)
                    try:
                        await connection.stay(None)
                    finally:
                        self._stalled.discard(connection)
                case Pause(seconds):
                    await connection.stay(seconds)
                case data:
                    await connection.send(data)
        return True


class _Connection:
    """One connection's bytes. A pump reads all the time, so that a client that leaves is noticed at any moment."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.received = bytearray()  # of requests that are not complete yet
        self._number = number
        self._reader = reader
        self._writer = writer
        self._gone = False
        self._news = asyncio.Event()  # more bytes, or the client is gone
        self._wake = asyncio.Event()  # released, or the client is gone

    async def pump(self) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await self._reader.read(1 << 16):
                self.received += data
                self._news.set()
        self._gone = True
        self._news.set()
        self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    async def send(self, data: bytes) -> None:
        self._check()
        self._writer.write(data)
        await self._writer.drain()

    async def stay(self, seconds: float | None) -> None:
        """Wait for this long, or for `wake`."""
        self._check()
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)
        self._check()

    def reset(self) -> None:
        linger_on_for_0_s = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_on_for_0_s)
        self._writer.transport.abort()

    def _check(self) -> None:
        if self._gone:
            raise ConnectionError("the client left")

    async def next_request(self) -> Request | None:
        """None when the client leaves first, or sends what is no request; `received` then tells what there was."""
        try:
            end = await self._find(b"\r\n\r\n", 0)
            request = Request(self._number, bytes(self.received[:end]), b"", b"")
            if len(request.line) != 3:
                return None
            if request.values("transfer-encoding"):
                end, body = await self._chunks(end)
            else:
                start, end = end, end + int((request.values("content-length") or ["0"])[0])
                await self._have(end)
                body = bytes(self.received[start:end])
        except (ConnectionError, ValueError):
            return None
        raw_body = bytes(self.received[len(request.head) : end])
        del self.received[:end]
        return replace(request, raw_body=raw_body, body=body)

    async def _chunks(self, at: int) -> tuple[int, bytes]:
        """Where the chunked body that starts here ends, and its content. Trailers are part of the raw body only."""
        content = bytearray()
        while True:
            start = await self._find(b"\r\n", at)
            size = int(self.received[at:start].split(b";")[0], 16)
            if size == 0:
                break
            at = start + size + 2
            await self._have(at)
            content += self.received[start : start + size]
        while (end := await self._find(b"\r\n", start)) > start + 2:
            start = end
        return end, bytes(content)

    async def _find(self, what: bytes, start: int) -> int:
        """The offset behind the next `what`."""
        while (found := self.received.find(what, start)) < 0:
            await self._more()
        return found + len(what)

    async def _have(self, size: int) -> None:
        while len(self.received) < size:
            await self._more()

    async def _more(self) -> None:
        self._check()
        self._news.clear()
        await self._news.wait()
