"""The standard's event streams, fed whole, byte by byte, and cut at any place: the same events, the bytes unchanged."""

import random
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.sse import Block, EventReader, EventStart

type Event = tuple[bytes, bytes]

# The stream -> its events, as (name, data).
STREAMS: dict[str, tuple[bytes, list[Event]]] = {
    "lf": (b"data: a\n\ndata: b\n\n", [(b"", b"a"), (b"", b"b")]),
    "crlf": (b"data: a\r\n\r\ndata: b\r\n\r\n", [(b"", b"a"), (b"", b"b")]),
    "cr": (b"data: a\r\rdata: b\r\r", [(b"", b"a"), (b"", b"b")]),
    "crlf and lf": (b"data: a\r\n\ndata: b\n\r\n", [(b"", b"a"), (b"", b"b")]),
    "lf and cr": (b"data: a\n\rdata: b\r\n\rdata: c\n\n", [(b"", b"a"), (b"", b"b"), (b"", b"c")]),
    "line ends mixed in one event": (b"event: e\rdata: a\r\ndata: b\ndata: c\n\n", [(b"e", b"a\nb\nc")]),
    "many blank lines": (b"\n\ndata: a\n\n\n\n\ndata: b\n\n\n", [(b"", b"a"), (b"", b"b")]),
    "comments": (b": ping\n\n:\n\ndata: a\n: within\n\n:\r\n\r\n", [(b"", b"a")]),
    "no space": (b"data:a\n\n", [(b"", b"a")]),
    "two spaces": (b"data:  a\n\n", [(b"", b" a")]),
    "a tab is no space": (b"data:\ta\n\n", [(b"", b"\ta")]),
    "several data lines": (b"data: {\ndata:\ndata: }\n\n", [(b"", b"{\n\n}")]),
    "a field without a colon": (b"data\n\ndata\ndata\n\n", [(b"", b""), (b"", b"\n")]),
    "an event without data": (b"event: e\nid: 1\nretry: 3\n\n", []),
    "names": (b"event: x\ndata: a\n\nevent:y\ndata: b\n\ndata: c\n\n", [(b"x", b"a"), (b"y", b"b"), (b"", b"c")]),
    "the last name counts": (b"event: x\nevent: y\ndata: a\n\n", [(b"y", b"a")]),
    "unknown fields": (b"datax: a\n data: b\nDATA: c\ndata : d\ndata: e\n\n", [(b"", b"e")]),
    "colons in the value": (b"data: a: b:c\n\n", [(b"", b"a: b:c")]),
    "a byte order mark": (b"\xef\xbb\xbfdata: a\n\ndata: b\n\n", [(b"", b"a"), (b"", b"b")]),
    "a later mark is none": (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [(b"", b"a")]),
    "U+2028, U+2029, U+0085, VT, FF": (
        "data: a\u2028b\u2029c\u0085d\x0be\x0cf\n\n".encode(),
        [(b"", "a\u2028b\u2029c\u0085d\x0be\x0cf".encode())],
    ),
    "no blank line at the end": (b"data: a\n\ndata: b\n", [(b"", b"a"), (b"", b"b")]),
    "no line end at the end": (b"data: a\n\ndata: [DONE]", [(b"", b"a"), (b"", b"[DONE]")]),
    "not UTF-8": (b"data: \xff\xfe\n\n", [(b"", b"\xff\xfe")]),
    "empty": (b"", []),
}


def read(pieces: Iterator[bytes], reader: EventReader | None = None) -> list[Block]:
    reader = reader or EventReader()
    blocks = [block for piece in pieces for block in reader.feed(piece)]
    return blocks + reader.end()


def events(blocks: list[Block]) -> list[Event]:
    return [(block.name, block.data) for block in blocks if block.data is not None]


def cut(data: bytes, seed: int) -> Iterator[bytes]:
    """`data` in pieces, cut at random places: seed 0 is whole, seed 1 byte by byte."""
    if seed == 0:
        yield data
    elif seed == 1:
        yield from (data[at : at + 1] for at in range(len(data)))
    else:
        chance = random.Random(seed)
        places = sorted(chance.choices(range(len(data) + 1), k=chance.randint(1, 8)))
        yield from (data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a < b)


def reference(stream: bytes) -> list[Event]:
    """The standard's algorithm, the slow way: all lines first. What the last blank line does not end is read too."""
    found, name, data = [], b"", None
    for line in [*re.split(rb"\r\n|\r|\n", stream.removeprefix(b"\xef\xbb\xbf")), b""]:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if line == b"":
            if data is not None:
                found.append((name, data))
            name, data = b"", None
        elif field == b"data":
            data = value if data is None else data + b"\n" + value
        elif field == b"event":
            name = value
    return found


@pytest.mark.parametrize(("stream", "expected"), STREAMS.values(), ids=STREAMS)
def test_events_however_the_bytes_come(stream: bytes, expected: list[Event]) -> None:
    assert reference(stream) == expected
    for seed in range(52):
        blocks = read(cut(stream, seed))
        assert (seed, events(blocks)) == (seed, expected)
        assert b"".join(block.raw for block in blocks) == stream


PARTS = [
    "data: x",
    "data:",
    "data",
    "event: e",
    ":c",
    "id: 1",
    "",
    "\r",
    "\n",
    "\r\n",
    "\n\n",
    "\r\n\r\n",
    "\r\r",
    "\ufeff",
    "é",
]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(PARTS)).map(lambda parts: "".join(parts).encode()),
    st.lists(st.integers(0, 60), max_size=9),
)
def test_any_mix_of_lines(stream: bytes, places: list[int]) -> None:
    places = sorted(min(place, len(stream)) for place in places)
    pieces = [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]
    blocks = read(iter(pieces))
    assert events(blocks) == reference(stream)
    assert b"".join(block.raw for block in blocks) == stream


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"], ids=["lf", "crlf"])
def test_an_event_is_there_with_the_last_byte_of_its_blank_line(end: bytes) -> None:
    reader = EventReader()
    for byte in b"data: a" + end[:-1]:
        assert reader.feed(bytes([byte])) == []
    assert reader.feed(end[-1:]) == [Block(b"data: a" + end, b"a")]


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_a_longer_event_than_the_bound_passes_unread_and_is_not_kept(size: int) -> None:
    long = b"data: " + b"x" * 5000 + b"\n\n"
    stream = b"data: a\n\n" + long + b"data: b\n\n"
    reader = EventReader(max_event_bytes=1000)
    blocks, kept = [], 0
    for at in range(0, len(stream), size):
        blocks += reader.feed(stream[at : at + size])
        kept = max(kept, at + size - sum(len(block.raw) for block in blocks))
    blocks += reader.end()
    assert b"".join(block.raw for block in blocks) == stream
    assert events(blocks) == [(b"", b"a"), (b"", b"b")]
    assert kept <= 1000 + size


FIRST_BYTES = {
    "data": (b"data: a", True),
    "any field": (b"event: e\n", True),
    "half a field": (b"d", True),
    "a comment": (b": ping\n\n", False),
    "llama-server's ping": (b":\n\n", False),
    "half a comment": (b": pi", False),
    "blank lines": (b"\r\n\n", False),
    "a comment, then data": (b":\r\rdata", True),
    "a byte order mark and a comment": (b"\xef\xbb\xbf:\n\n", False),
    "nothing": (b"", False),
}


@pytest.mark.parametrize(("data", "expected"), FIRST_BYTES.values(), ids=FIRST_BYTES)
def test_what_counts_as_the_first_event(data: bytes, expected: bool) -> None:
    assert EventStart().is_in(data) is expected
    in_pieces = EventStart()
    assert any(in_pieces.is_in(data[at : at + 1]) for at in range(len(data))) is expected
