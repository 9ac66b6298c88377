"""HTTP by hand: requests as bytes, answers with their exact headers and framing. Clients tidy up what tests look at."""

import json
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from proxy import Key

type Fields = list[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    """`headers` as they came, in order; `body` without its chunk framing; `complete`: ended as its framing says."""

    status: int
    headers: Fields
    body: bytes
    complete: bool = True

    def values(self, name: str) -> list[str]:
        return [value for field, value in self.headers if field.lower() == name.lower()]

    def value(self, name: str) -> str | None:
        return next(iter(self.values(name)), None)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json()["error"]["code"])


def request(
    method: str,
    target: str,
    key: Key | None = None,
    body: bytes | None = None,
    *headers: str,
    version: str = "1.1",
) -> bytes:
    """A request's bytes. With a body, Content-Length is added."""
    lines = [f"{method} {target} HTTP/{version}", "Host: proxy.test"]
    lines += [f"Authorization: Bearer {key.key}"] if key else []
    lines += [*headers, *([f"Content-Length: {len(body)}"] if body is not None else []), "", ""]
    return "\r\n".join(lines).encode("latin-1") + (body or b"")


class Connection:
    """One connection to a port of this machine."""

    def __init__(self, port: int, timeout_s: float = 20) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self.received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def ask(self, data: bytes, *, head_only: bool = False) -> Answer:
        """Send a request, read its answer. `head_only`: it was a HEAD."""
        self.sock.sendall(data)
        return self.answer(head_only=head_only)

    def answer(self, *, head_only: bool = False) -> Answer:
        """Read the next final answer; interim ones (1xx) are skipped."""
        while True:
            status, headers = self.head()
            if status >= 200:
                break
        probe = Answer(status, headers, b"")
        if head_only or status in (204, 304):
            return probe
        if "chunked" in (probe.value("transfer-encoding") or ""):
            body, complete = self._chunked()
        elif (length := probe.value("content-length")) is not None:
            complete = self._have(int(length))
            body = self._take(int(length))
        else:
            body, complete = self.rest(), True
        return Answer(status, headers, body, complete)

    def head(self) -> tuple[int, Fields]:
        assert self._find(b"\r\n\r\n"), f"no head came: {self.received!r}"
        head = self._take(self.received.index(b"\r\n\r\n") + 4).decode("latin-1")
        start, *lines = head.rstrip("\r\n").split("\r\n")
        fields = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        return int(start.split(" ")[1]), fields

    def rest(self) -> bytes:
        """All that comes until the connection ends, in whatever way it does."""
        while self._more():
            pass
        return self._take(len(self.received))

    def until(self, what: bytes) -> bytes:
        """Read until this has come, and return all that came up to its end."""
        assert self._find(what), f"{what!r} did not come: {self.received!r}"
        return self._take(self.received.index(what) + len(what))

    @property
    def ended(self) -> bool:
        """Whether the other side closes the connection, without another byte. Waits for it."""
        return not self.received and not self._more()

    def reset(self) -> None:
        """Leave with an RST: the other side learns of it at once."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _chunked(self) -> tuple[bytes, bool]:
        parts: list[bytes] = []
        while self._find(b"\r\n"):
            size = int(self._take(self.received.index(b"\r\n") + 2).split(b";")[0], 16)
            if not self._have(size + 2):
                break
            parts.append(self._take(size + 2)[:-2])
            if not size:
                return b"".join(parts), True
        return b"".join((*parts, self.received)), False

    def _find(self, what: bytes) -> bool:
        while what not in self.received:
            if not self._more():
                return False
        return True

    def _have(self, size: int) -> bool:
        while len(self.received) < size:
            if not self._more():
                return False
        return True

    def _take(self, size: int) -> bytes:
        taken, self.received = self.received[:size], self.received[size:]
        return taken

    def _more(self) -> bool:
        try:
            data = self.sock.recv(1 << 16)
        except ConnectionError:
            return False
        self.received += data
        return bool(data)


def ask(port: int, data: bytes, *, head_only: bool = False) -> Answer:
    """One request on a connection of its own."""
    with Connection(port) as connection:
        return connection.ask(data, head_only=head_only)


def post(port: int, target: str, key: Key, body: object, headers: Iterable[str] = ()) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ask(port, request("POST", target, key, data, *headers))
