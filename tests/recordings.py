"""What a real llama-server answered to POST requests, byte by byte: recorded/NAME.req and NAME.res, or NAME.res.gz."""

import functools
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("recorded")


@dataclass(frozen=True)
class Message:
    """One HTTP message. `raw` is all of its bytes, `body` has no chunk framing; `chunks` is empty without one."""

    raw: bytes
    start: str  # the request line, or the status line
    headers: dict[str, str]  # names in lower case
    body: bytes
    chunks: tuple[bytes, ...]

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "")


@dataclass(frozen=True)
class Recording:
    name: str
    request: Message
    response: Message

    @property
    def method(self) -> str:
        return self.request.start.split(" ")[0]

    @property
    def target(self) -> str:
        return self.request.start.split(" ")[1]

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def status(self) -> int:
        return int(self.response.start.split(" ")[1])

    @property
    def streamed(self) -> bool:
        return self.response.content_type.startswith("text/event-stream")

    def request_json(self) -> Any:
        return json.loads(self.request.body)


def parse(raw: bytes) -> Message:
    head, _, rest = raw.partition(b"\r\n\r\n")
    start, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    chunks = tuple(_chunks(rest)) if headers.get("transfer-encoding") == "chunked" else ()
    return Message(raw, start, headers, b"".join(chunks) or rest, chunks)


def _chunks(body: bytes) -> list[bytes]:
    """The contents of the chunks. Raises ValueError when the closing one isn't there: no recording was cut."""
    chunks: list[bytes] = []
    at = 0
    while True:
        start = body.index(b"\r\n", at) + 2
        length = int(body[at : start - 2], 16)
        if not length:
            return chunks
        chunks.append(body[start : start + length])
        at = start + length + 2


@functools.cache
def recordings() -> dict[str, Recording]:
    """All of them by name, in the order of names."""
    return {path.stem: load(path.stem) for path in sorted(FOLDER.glob("*.req"))}


def load(name: str) -> Recording:
    packed = FOLDER / f"{name}.res.gz"
    response = gzip.decompress(packed.read_bytes()) if packed.exists() else (FOLDER / f"{name}.res").read_bytes()
    return Recording(name, parse((FOLDER / f"{name}.req").read_bytes()), parse(response))
