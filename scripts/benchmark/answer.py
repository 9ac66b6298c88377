"""Reads one HTTP/1.1 answer as it arrives and judges it: sans-IO, the clock's readings are passed in."""

import re
import zlib

from benchmark import shapes
from benchmark.dechunk import Dechunk

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class Answer:
    def __init__(self, *, streamed: bool) -> None:
        self.ended = False
        self.closes = False  # the server said that it closes the connection
        self.events = 0
        self.first_at: float | None = None  # of the body
        self._streamed = streamed
        self._head = b""
        self._head_done = False
        self._length: int | None = None
        self._dechunk: Dechunk | None = None
        self._size = 0
        self._crc = 0
        self._tail = b""
        self._broken = ""

    def feed(self, data: bytes, now: float) -> None:
        if not self._head_done:
            self._head += data
            head_end = self._head.find(b"\r\n\r\n")
            if head_end < 0:
                return
            data = self._head[head_end + 4 :]
            self._read_head(self._head[: head_end + 2])
        if self._dechunk is not None:
            self._feed_chunked(self._dechunk, data, now)
        else:
            self._take(data, now)
            self.ended = self._length is not None and self._size >= self._length

    def end_of_file(self) -> None:
        if self.ended:
            return
        until_close = self._head_done and self._length is None and self._dechunk is None
        if not until_close:
            self._broken = "cut in the answer" if self._head else "closed before the answer"
        self.closes = self.ended = True

    def what_is_wrong(self, exact: shapes.Fingerprint | None) -> str:
        """Nothing, if it is a whole answer, and with `exact` of these very bytes."""
        if self._broken:
            return self._broken
        status = self._head[9:12].decode(errors="replace")
        if status != "200":
            return f"status {status}"
        if self._streamed and not self._tail.endswith(shapes.DONE):
            return "no [DONE]"
        if exact is not None and shapes.Fingerprint(self._size, self._crc) != exact:
            return "other bytes than the upstream's"
        return ""

    def _read_head(self, head: bytes) -> None:
        self._head, self._head_done = head, True
        self.closes = bool(_CLOSE.search(head))
        if _CHUNKED.search(head):
            self._dechunk = Dechunk()
        elif length := _LENGTH.search(head):
            self._length = int(length[1])

    def _feed_chunked(self, dechunk: Dechunk, data: bytes, now: float) -> None:
        try:
            for payload in dechunk.feed(data):
                self._take(payload, now)
        except ValueError:
            self._broken = "broken chunk framing"
        self.ended = dechunk.ended or bool(self._broken)

    def _take(self, payload: bytes, now: float) -> None:
        if not payload:
            return
        if self.first_at is None:
            self.first_at = now
        self._size += len(payload)
        self._crc = zlib.crc32(payload, self._crc)
        if self._streamed:
            self.events += payload.count(b"data: ")
            self._tail = (self._tail + payload)[-len(shapes.DONE) :] if len(payload) < len(shapes.DONE) else payload
