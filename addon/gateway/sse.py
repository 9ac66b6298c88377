"""Bytes of an event stream -> its events, as the HTML standard has them, bounded and without I/O.

Line ends are LF, CRLF or CR and nothing else (no splitting at U+2028); `data` and `data:` without a space count;
several data lines are one event; a line that starts with a colon is a comment.
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import re

import msgspec

# An answer's largest event is /v1/responses' last one, which repeats the whole answer: megabytes, not tens of them.
MAX_EVENT_BYTES = 8 << 20

_LINE_END = re.compile(rb"\r\n|\n|\r")
# Atomic groups: a CRLF must never be taken apart into two line ends.
_EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")


class Block(msgspec.Struct, frozen=True, gc=False):
    """What stands between two blank lines: the exact bytes, and the event in them, if any (`data` is not None)."""

    raw: bytes
    data: bytes | None
    name: bytes = b""


class EventReader:
    """Feed it bytes as they come; it returns each block once its blank line is there. `b"".join(raw)` is what was
    fed.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._pending = bytearray()
        self._seen = 0  # bytes of _pending in which no end was found
        self._too_long = False
        self._started = False

    def only_event(self, data: bytes) -> bytes | None:
        """The data of a piece that is one whole event of one data line, and needs no `feed`. None: feed it."""
        whole = data.startswith(b"data: ") and data.find(b"\n") == len(data) - 2 and data.endswith(b"\n\n")
        if whole and self._started and not self._pending and not self._too_long and b"\r" not in data:
            return data[6:-2]
        return None

    def feed(self, data: bytes) -> list[Block]:
        if not self._pending and data.endswith(b"\n\n") and b"\r" not in data and self._started:
            return [self._block(part + b"\n\n") for part in data[:-2].split(b"\n\n")]
        self._pending += data
        return self._cut()

    def end(self) -> list[Block]:
        """What is left at the stream's end. The standard drops an event whose blank line never came; a proxy passes its
        bytes on and reads it, since some servers leave out the last blank line."""
        rest, self._pending = bytes(self._pending), bytearray()
        return [self._block(rest)] if rest else []

    def _cut(self) -> list[Block]:
        blocks = []
        # The last three bytes may be the first part of an end; a CR at the very end may be half of a CRLF.
        buffer, start, scan = self._pending, 0, max(0, self._seen - 3)
        while (end := _EVENT_END.search(buffer, scan)) and not (end.end() == len(buffer) and buffer[-1] == 13):
            blocks.append(self._block(bytes(buffer[start : end.end()])))
            start = scan = end.end()
        if start:
            del buffer[:start]
        if len(buffer) > self._max:
            blocks.append(Block(bytes(buffer[:-3]), None))
            del buffer[:-3]
            self._too_long = True
        self._seen = len(buffer)
        return blocks

    def _block(self, raw: bytes) -> Block:
        text = raw
        if not self._started:
            self._started = True
            text = raw.removeprefix(b"\xef\xbb\xbf")
        if self._too_long:
            self._too_long = False
            return Block(raw, None)
        if text.startswith(b"data: ") and text.find(b"\n") == len(text) - 2 and b"\r" not in text:
            return Block(raw, text[6:-2])
        return _parse(raw, text)


class EventStart:
    """Finds the first byte of a stream that belongs to an event, not to a comment or a blank line."""

    def __init__(self) -> None:
        self._in_comment = False

    def is_in(self, data: bytes) -> bool:
        """Whether it is in this piece. To be asked for each piece, until it is."""
        rest = data
        while rest:
            if self._in_comment:
                end = _LINE_END.search(rest)
                rest = rest[end.end() :] if end else b""
                self._in_comment = end is None
            elif rest[0] in b"\r\n\xef\xbb\xbf":  # a stream may begin with a byte order mark
                rest = rest[1:]
            elif rest[0] in b":":
                self._in_comment = True
            else:
                return True
        return False


def _parse(raw: bytes, text: bytes) -> Block:
    values: list[bytes] = []
    name = b""
    for line in _LINE_END.split(text):
        field, _, value = line.partition(b":")
        if field == b"data":
            values.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return Block(raw, b"\n".join(values) if values else None, name)
