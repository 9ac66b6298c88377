"""An answer's bytes reach the client as they came, whatever the meter does; what we asked for is taken out again."""

import json
from collections.abc import Iterator
from itertools import count

import pytest

from gateway.relay import MAX_BODY_BYTES, BodyMeter, Meter, Relay, StreamMeter
from gateway.tally import Tally, Tokens
from gateway.usage import read_openai
from test_sse import cut


def relay_of(
    meter: Meter | None, content_length: int | None = None, *, tally: Tally | None = None, has_mark: bool = False
) -> Relay:
    return Relay(meter, tally or Tally(), lambda: 0.0, content_length=content_length, is_stream=True, has_mark=has_mark)


def through(relay: Relay, pieces: Iterator[bytes]) -> bytes:
    passed = b"".join([relay.feed(piece) for piece in pieces])
    relay.close()
    return passed + relay.finish()


class Raising:
    """Passes everything on, and raises at its nth feed, or at its end (0)."""

    def __init__(self, fails_at: int) -> None:
        self._fails_at = fails_at
        self._feeds = 0

    def feed(self, data: bytes) -> bytes:
        self._feeds += 1
        if self._feeds == self._fails_at:
            raise ZeroDivisionError
        return data

    def end(self) -> bytes:
        if not self._fails_at:
            raise ZeroDivisionError
        return b""


@pytest.mark.parametrize("content_length", [None, 6])
@pytest.mark.parametrize("fails_at", [0, 1, 2, 6])
def test_a_failing_meter_costs_no_byte(
    fails_at: int, content_length: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    relay = relay_of(Raising(fails_at), content_length, has_mark=True)
    assert through(relay, cut(b"abcdef", 1)) == b"abcdef"
    assert relay.response_bytes == 6
    assert not relay.lacks_end_mark  # nobody knows
    assert [record.message for record in caplog.records] == ["the meter failed: this answer goes on unmetered"]


@pytest.mark.parametrize("fails_at", [0, 1, 2, 6])
def test_a_failing_format_costs_no_byte(fails_at: int) -> None:
    """Also where the meter holds an event's bytes until it is whole, so as to strip it."""
    calls = count(1)

    def read(tally: Tally, name: bytes, data: bytes) -> None:
        if next(calls) == (fails_at or 7):
            raise ZeroDivisionError

    stream = b"".join(b"data: %d\n\n" % number for number in range(6)) + b"data: 7"
    for seed in range(20):
        calls = count(1)
        relay = relay_of(StreamMeter(read, Tally(), strip=True))
        assert (seed, through(relay, cut(stream, seed))) == (seed, stream)


CONTENT = b'{"usage":{"prompt_tokens":3,"completion_tokens":2}}'


@pytest.mark.parametrize("seed", range(8))
def test_the_last_byte_of_a_content_length_is_kept_until_the_end(seed: int) -> None:
    tally = Tally()
    relay = relay_of(BodyMeter(read_openai, tally), len(CONTENT))
    passed = b"".join(map(relay.feed, cut(CONTENT, seed)))
    assert CONTENT.startswith(passed)
    assert len(passed) < len(CONTENT)
    relay.close()
    assert tally.tokens() == (Tokens(3, None, 2), "usage")
    assert passed + relay.finish() == CONTENT
    assert relay.finish() == b""


def test_more_bytes_than_the_content_length_are_kept_too() -> None:
    relay = relay_of(None, 3)
    assert [relay.feed(b"ab"), relay.feed(b"c"), relay.feed(b"d")] == [b"ab", b"", b""]
    assert relay.finish() == b"cd"


def test_ended_turns_true_with_the_piece_that_holds_the_last_event() -> None:
    tally = Tally()
    relay = Relay(StreamMeter(read_openai, tally), tally, lambda: 0.0, is_stream=True, has_mark=True)
    relay.feed(b'data: {"choices":[{"finish_reason":"stop"}]}\n\ndata: [DO')
    assert not relay.ended
    relay.feed(b"NE]\n\n")
    assert relay.ended


FIRST_EVENTS = {
    "at once": ([b"data: a\n\n"], 1),
    "pings first": ([b":\n\n", b": ping\r\n\r\n", b"data: a\n\n"], 3),
    "a ping in pieces": ([b": pi", b"ng\n\n", b"data: a\n\n"], 3),
    "a ping cut behind its colon": ([b":", b"\n", b"\n", b"data: a\n\n"], 4),
    "the first byte counts": ([b":\n\n", b"d", b"ata: a\n\n"], 2),
    "a mark in front": ([b"\xef\xbb\xbf", b":\n\n", b"data: a\n\n"], 3),
    "only pings": ([b":\n\n", b":\n\n"], None),
}


@pytest.mark.parametrize(("pieces", "expected"), FIRST_EVENTS.values(), ids=FIRST_EVENTS)
def test_the_first_event_is_no_comment(pieces: list[bytes], expected: int | None) -> None:
    now = 0.0
    relay = Relay(None, Tally(), lambda: now, is_stream=True)
    for piece in pieces:
        now += 1
        relay.feed(piece)
    assert relay.first_event_at == expected


def test_a_body_over_the_bound_passes_unmetered() -> None:
    tally = Tally()
    relay = relay_of(BodyMeter(read_openai, tally))
    block = b" " * (1 << 20)
    body = CONTENT + block * (MAX_BODY_BYTES >> 20)
    assert through(relay, iter([CONTENT, *[block] * (MAX_BODY_BYTES >> 20)])) == body
    assert (tally.tokens(), relay.response_bytes) == ((Tokens(), None), len(body))


# -- usage that we asked for

SPELLINGS = {
    "compact": {"separators": (",", ":")},
    "python": {},
    "not ASCII": {"ensure_ascii": False},
}
PLACES = ["last", "first", "middle"]


def chunk(place: str, usage: object, text: str) -> dict[str, object]:
    plain: list[tuple[str, object]] = [
        ("id", "x"),
        ("choices", [{"index": 0, "delta": {"content": text}, "finish_reason": None}]),
        ("model", "m"),
    ]
    plain.insert({"first": 0, "middle": 2, "last": 3}[place], ("usage", usage))
    return dict(plain)


def written(documents: list[dict[str, object]], spelling: str, end: str = "\n") -> bytes:
    lines = [json.dumps(document, **SPELLINGS[spelling]) for document in documents]  # type: ignore[arg-type]
    return "".join(f"data: {line}{end}{end}" for line in [*lines, "[DONE]"]).encode()


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("nulls", [True, False], ids=["null usage in every chunk", "no usage before the end"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_we_asked_for_is_taken_out_to_the_byte(spelling: str, place: str, nulls: bool, end: str) -> None:
    """A server's stream with include_usage becomes the same server's stream without it."""
    texts = ["a", ' ,"usage":null, ', "é\u2028\n", '"usage"', ""]
    asked = [chunk(place, None, text) for text in texts]
    plain = [{name: value for name, value in document.items() if name != "usage"} for document in asked]
    last = {**chunk(place, {"prompt_tokens": 3, "completion_tokens": 5}, ""), "choices": []}
    with_usage = written([*(asked if nulls else plain), last], spelling, end)
    without = b": ping\n\n" + written(plain, spelling, end)
    with_usage = b": ping\n\n" + with_usage
    for seed in range(30):
        tally = Tally()
        relay = relay_of(StreamMeter(read_openai, tally, strip=True), tally=tally, has_mark=True)
        assert (seed, through(relay, cut(with_usage, seed))) == (seed, without)
        assert (tally.tokens(), relay.ended) == ((Tokens(3, None, 5), "usage"), True)


KEPT = {
    "usage beside choices": b'data: {"choices":[{"index":0}],"usage":{"prompt_tokens":1}}\n\n',
    "an inner usage": b'data: {"choices":[],"x":{"usage":null}}\n\n',
    "no JSON": b'data: {"usage":nul\n\n',
    "not UTF-8": b'data: {"choices":[{"delta":{"content":"\xff"}}],"usage":{"a":1}}\n\n',
    "deeply nested": b'data: {"usage":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n",
    "an error": b'data: {"error":{"message":"\\"usage\\""}}\n\n',
    "comments": b":\n\n: usage\n\n",
    "a stream's end without a blank line": b'data: {"choices":[]}\ndata',
}


@pytest.mark.parametrize("stream", KEPT.values(), ids=KEPT)
def test_all_else_stays_when_stripping(stream: bytes) -> None:
    stream += b"data: [DONE]\n\n"
    for seed in range(12):
        relay = relay_of(StreamMeter(read_openai, Tally(), strip=True))
        assert (seed, through(relay, cut(stream, seed if len(stream) < 1000 or seed != 1 else 0))) == (seed, stream)


def test_a_fault_in_one_event_does_not_let_our_usage_through() -> None:
    """What the client did not ask for stays out, also behind an event that the meter could not read."""
    stream = b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n'
    ours = b'data: {"choices":[],"usage":{"prompt_tokens":3}}\n\n'
    relay = relay_of(StreamMeter(read_openai, Tally(), strip=True))
    assert through(relay, iter([stream, ours])) == stream
