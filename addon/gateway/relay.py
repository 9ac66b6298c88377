"""The way of an answer's bytes to the client: passed on as they are, while a meter looks on.

A relay never raises and never changes a byte, with one exception: when we asked the server for usage that the client
did not ask for, a `StreamMeter` with `strip` takes out what came of that. A fault in the meter stops the meter, never
the stream.
"""

import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from gateway import sse
from gateway.tally import Tally
from gateway.usage import BODY, Format
from gateway.wire import without_null_usage

log = logging.getLogger(__name__)

# A whole answer is kept up to this size so that its usage can be read: far above any completion, above most batches of
# embeddings. What is larger passes unmetered.
MAX_BODY_BYTES = 16 << 20

Clock = Callable[[], float]

# What reading JSON of somebody else's may raise: it is not JSON, not of its shape, not UTF-8, too deep.
UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)


class Meter(Protocol):
    """Looks at bytes. `feed` returns the bytes to pass on: for all meters but one, what it was given."""

    def feed(self, data: bytes) -> bytes: ...
    def end(self) -> bytes: ...


class StreamMeter:
    """Reads an event stream into a tally; with `strip`, holds events together and drops the usage we had to ask for."""

    def __init__(self, read: Format, tally: Tally, *, strip: bool = False) -> None:
        self._read = read
        self._tally = tally
        self._strip = strip
        self._reader = sse.EventReader()

    def feed(self, data: bytes) -> bytes:
        event = self._reader.only_event(data)
        if event is not None and not self._strip:  # nearly always: a piece is an event
            self._look(b"", event)
            return data
        return self._pass(data, self._reader.feed(data))

    def end(self) -> bytes:
        return self._pass(b"", self._reader.end())

    def _pass(self, data: bytes, blocks: list[sse.Block]) -> bytes:
        for block in blocks:
            if block.data is not None:
                self._look(block.name, block.data)
        return b"".join(without_asked_usage(block) for block in blocks) if self._strip else data

    def _look(self, name: bytes, data: bytes) -> None:
        """A fault of the format's ends the reading; taking out what we asked for goes on."""
        if self._tally.is_broken:
            return
        try:
            self._read(self._tally, name, data)
        except UNREADABLE as error:
            log.debug("an event that is no JSON of its format: %s", error)
        except Exception:
            log.exception("the meter failed: this answer goes on unmetered")
            self._tally.is_broken = True


class BodyMeter:
    """Keeps a whole answer, up to a bound, and reads it at its end."""

    def __init__(self, read: Format, tally: Tally) -> None:
        self._read = read
        self._tally = tally
        self._body: bytearray | None = bytearray()

    def feed(self, data: bytes) -> bytes:
        if self._body is not None:
            self._body += data
            if len(self._body) > MAX_BODY_BYTES:
                log.warning("an answer of over %d bytes passes unmetered", MAX_BODY_BYTES)
                self._body = None
        return data

    def end(self) -> bytes:
        if self._body:
            try:
                self._read(self._tally, BODY, bytes(self._body))
            except UNREADABLE as error:
                log.debug("an answer that is no JSON of its format: %s", error)
        return b""


class Relay:
    """Takes each piece of an answer, gives back what the client shall get of it, and tells when the end has come.

    A client takes an answer for complete when it has its last event, or as many bytes as the Content-Length said.
    Neither may reach it before the row is on disk: `ended` turns true with the piece that holds the last event,
    and the piece that fills the Content-Length is kept until `finish`.
    """

    def __init__(
        self,
        meter: Meter | None,
        tally: Tally,
        clock: Clock,
        *,
        content_length: int | None = None,
        is_stream: bool = False,
        has_mark: bool = False,
        changes_length: bool = False,
    ) -> None:
        """`has_mark`: streams of this format end with a mark. `changes_length`: the meter takes bytes out."""
        self.changes_length = changes_length
        self.tally = tally
        self.is_stream = is_stream
        self.response_bytes = 0
        self.first_event_at: float | None = None
        self.is_within_line = False  # of a comment, before the first event
        self._meter = meter
        self._clock = clock
        self._left = content_length
        self._kept = b""
        self._event_start = sse.EventStart()
        self._has_mark = has_mark and meter is not None

    def __call__(self, data: bytes) -> list[bytes]:
        """mitmproxy's own way to call a stream, used where our layers are not in place. b"" is the end."""
        if not data:
            self.close()
        passed = self.feed(data) if data else self.finish()
        return [passed] if passed else []

    @property
    def ended(self) -> bool:
        return self.tally.done

    @property
    def lacks_end_mark(self) -> bool:
        """The stream has ended without the mark that its format ends with: it was cut, however clean its framing."""
        return self._has_mark and not self.tally.is_broken and not self.tally.finished

    def feed(self, data: bytes) -> bytes:
        """Bytes from the server -> bytes for the client, now. Never raises."""
        self.response_bytes += len(data)
        if self._left is not None:
            self._left -= len(data)
        try:
            if self.first_event_at is None:
                self.is_within_line = not data.endswith((b"\n", b"\r"))
                if self._event_start.is_in(data):
                    self.first_event_at = self._clock()
            if self._meter:
                data = self._meter.feed(data)
        except Exception:
            self._fail()
        if self._left is not None and self._left <= 0:
            data, self._kept = b"", self._kept + data
        return data

    def finish(self) -> bytes:
        """What is left for the client at the end of the answer. Never raises."""
        rest, self._kept = self._kept, b""
        return rest

    def close(self) -> None:
        """No more bytes will come: let the meter read what it has. Never raises."""
        try:
            if self._meter:
                self._kept += self._meter.end()
        except Exception:
            self._fail()
        self._meter = None

    def _fail(self) -> None:
        log.exception("the meter failed: this answer goes on unmetered")
        self._meter = None
        self.tally.is_broken = True


def without_asked_usage(block: sse.Block) -> bytes:
    """A block as it would have been without stream_options.include_usage: the usage chunk is gone, null usage too."""
    if block.data is None or b'"usage"' not in block.data:
        return block.raw
    try:
        return without_null_usage(block.raw, block.data)
    except UNREADABLE:
        return block.raw
