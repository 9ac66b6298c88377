"""Answers are kept for a while and no longer, each key is asked for once at a time, and a source that hangs keeps few
threads.
"""

import asyncio
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from gateway.keys import Key
from gateway.secret import Secret
from gateway.sources import kept, remote
from gateway.sources.remote import Remote
from gateway.sources.settings import Common
from gateway.sources.source import Answer, Asked, Refused, SourceFailed
from waiting import eventually

NOW = "2026-11-21T09:30:00.000Z"


def key(name: str, **fields: Any) -> Key:
    plain = Key(id=0, name=name, hint="", created_at="", disabled=False, expires_at=None, models=())
    return msgspec.structs.replace(plain, **fields)


def asked(text: str, address: str = "10.0.0.1") -> Asked:
    return Asked(Secret(f"sk-{text}"), text, address)


@dataclass
class Source:
    """`answers`: by hash. Hangs while `goes_on` is not set, at hashes that begin with `hangs_for`."""

    answers: dict[str, Answer] = field(default_factory=dict)
    questions: list[str] = field(default_factory=list)
    goes_on: threading.Event = field(default_factory=threading.Event)
    closed: bool = False
    hangs_for: str = ""

    def __post_init__(self) -> None:
        self.goes_on.set()

    def find(self, asked: Asked) -> Answer:
        self.questions.append(asked.sha256)
        assert not asked.sha256.startswith(self.hangs_for) or self.goes_on.wait(30)
        if asked.sha256 == "broken":
            raise SourceFailed("is broken")
        if asked.sha256 == "mad":
            raise struct.error(f"unpack_from: {asked.key}")
        return self.answers.get(asked.sha256)

    def close(self) -> None:
        self.closed = True


@dataclass
class Clock:
    at: float = 1000

    def __call__(self) -> float:
        return self.at


SETTINGS = Common(cache_s=30, negative_cache_s=5, timeout_s=20)
KEPT: dict[str, tuple[Answer, float]] = {
    "a yes": (key("alice"), 30),
    "a disabled key": (key("alice", disabled=True), 5),
    "one that ends meanwhile": (key("alice", expires_at="2026-11-21T09:30:10.000Z"), 15),
    "one that ends later": (key("alice", expires_at="2026-11-21T09:30:26.000Z"), 30),
    "one that has ended": (key("alice", expires_at="2026-11-21T09:30:00.000Z"), 5),
    "one that was never good": (key("alice", expires_at=""), 5),
    "one that has not begun": (key("alice", not_before="2026-11-21T09:30:10.000Z"), 5),
    "a no": (Refused("key_disabled"), 5),
    "not mine": (None, 5),
}


@pytest.mark.parametrize(("answer", "for_s"), KEPT.values(), ids=KEPT)
async def test_for_how_long_an_answer_is_kept(answer: Answer, for_s: float) -> None:
    source, clock = Source({"a": answer}), Clock()
    by = Remote(source, SETTINGS, now=clock, utc_now=lambda: NOW)
    for at in (0, for_s - 0.001):
        clock.at = 1000 + at
        assert await by.find(asked("a")) == answer
        assert source.questions == ["a"]
    clock.at = 1000 + for_s
    assert await by.find(asked("a")) == answer
    assert source.questions == ["a", "a"]


async def test_a_failure_is_not_kept() -> None:
    source = Source()
    by = Remote(source, SETTINGS, now=Clock())
    for _ in range(2):
        with pytest.raises(SourceFailed, match="is broken"):
            await by.find(asked("broken"))
    assert source.questions == ["broken", "broken"]


BY_ADDRESS: dict[str, tuple[bool, list[str]]] = {
    "the key decides": (False, ["a"]),
    "the address, too": (True, ["a", "a"]),
}


@pytest.mark.parametrize(("by_address", "questions"), BY_ADDRESS.values(), ids=BY_ADDRESS)
async def test_what_an_answer_is_kept_for(by_address: bool, questions: list[str]) -> None:
    source = Source({"a": key("alice")})
    by = Remote(source, SETTINGS, by_address=by_address, now=Clock())
    for address in ("10.0.0.1", "10.0.0.2", "10.0.0.1"):
        assert await by.find(asked("a", address)) == key("alice")
    assert source.questions == questions


async def test_nothing_is_kept_under_the_key_itself() -> None:
    by = Remote(Source({"a": key("alice")}), SETTINGS, now=Clock())
    await by.find(asked("a"))
    await by.find(asked("b"))
    places = [(sha256, *addresses) for kept in (by._yes, by._no) for sha256, addresses in kept._keys.items()]
    assert places == [("a", ""), ("b", "")]


async def test_unknown_keys_do_not_push_out_good_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MAX_KEPT", 3)
    source = Source({"good": key("alice")})
    by = Remote(source, SETTINGS, now=Clock())
    await by.find(asked("good"))
    for number in range(10):
        await by.find(asked(f"{number}"))
    assert (len(by._yes._keys), len(by._no._keys)) == (1, 3)
    await by.find(asked("good"))
    assert source.questions.count("good") == 1


async def test_one_question_for_all_who_ask_for_the_same_key() -> None:
    source = Source({"a": key("alice")})
    source.goes_on.clear()
    by = Remote(source, SETTINGS, now=Clock())
    asking = [asyncio.ensure_future(by.find(asked("a"))) for _ in range(20)]
    await _until(lambda: bool(source.questions))
    asking[0].cancel()  # the one who asked first leaves
    await asyncio.sleep(0)
    source.goes_on.set()
    assert await asyncio.gather(*asking[1:]) == [key("alice")] * 19
    assert source.questions == ["a"]
    assert not by._asking


async def test_a_source_that_hangs_keeps_few_threads_and_many_questions_are_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "MAX_WAITING", 50)
    source = Source()
    source.goes_on.clear()
    by = Remote(source, Common(timeout_s=0.1), now=Clock())
    answers = await asyncio.gather(*(by.find(asked(f"{number}")) for number in range(60)), return_exceptions=True)
    late, refused = [f"{answer}" for answer in answers[:50]], [f"{answer}" for answer in answers[50:]]
    assert set(late) == {"does not answer within 0.1 s"}
    assert set(refused) == {"has 50 questions to answer already"}
    assert len(source.questions) == remote.MAX_THREADS
    with pytest.raises(SourceFailed, match="does not answer"):  # all threads still hang
        await by.find(asked("x"))
    assert len(source.questions) == remote.MAX_THREADS
    source.goes_on.set()
    await _until(lambda: by._unknown_lane.free._value == remote.MAX_THREADS)
    assert await by.find(asked("y")) is None


async def test_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """When there are some again, all places are free."""
    source = Source({"a": key("alice")})
    by = Remote(source, SETTINGS, now=Clock())

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(remote.MAX_THREADS + 1):
            with pytest.raises(SourceFailed, match="another thread"):
                await by.find(asked("a"))
    assert await by.find(asked("a")) == key("alice")


async def test_whatever_a_driver_raises_is_a_failure_and_its_text_is_not_told() -> None:
    by = Remote(Source(), SETTINGS, now=Clock())
    for _ in range(remote.MAX_THREADS + 1):
        with pytest.raises(SourceFailed) as caught:
            await by.find(asked("mad"))
        assert str(caught.value) == "can't be asked: its driver fails with error"


async def test_an_answer_is_kept_from_before_its_question_on() -> None:
    source, clock = Source({"a": key("alice")}), Clock()
    source.goes_on.clear()
    by = Remote(source, SETTINGS, now=clock)
    asking = asyncio.ensure_future(by.find(asked("a")))
    await _until(lambda: bool(source.questions))
    clock.at += 20
    source.goes_on.set()
    assert await asking == key("alice")
    clock.at += 9.9
    assert await by.find(asked("a")) == key("alice")
    assert source.questions == ["a"]
    clock.at += 0.1
    assert await by.find(asked("a")) == key("alice")
    assert source.questions == ["a", "a"]


async def test_one_key_from_many_addresses_does_not_push_out_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MAX_KEPT", 10)
    monkeypatch.setattr(kept, "MAX_ADDRESSES", 3)
    source = Source({"a": key("alice"), "b": key("bob")})
    by = Remote(source, SETTINGS, by_address=True, now=Clock())
    await by.find(asked("a"))
    for number in range(20):
        await by.find(asked("b", f"10.0.1.{number}"))
    assert {sha256: [*addresses] for sha256, addresses in by._yes._keys.items()} == {
        "a": ["10.0.0.1"],
        "b": ["10.0.1.17", "10.0.1.18", "10.0.1.19"],
    }
    await by.find(asked("a"))
    assert source.questions.count("a") == 1


async def test_keys_that_were_good_lately_do_not_wait_behind_unknown_ones() -> None:
    source, clock = Source({"good": key("alice")}, hangs_for="unknown"), Clock()
    by = Remote(source, SETTINGS, now=clock)
    assert await by.find(asked("good")) == key("alice")
    source.goes_on.clear()
    unknown = [asyncio.ensure_future(by.find(asked(f"unknown-{number}"))) for number in range(remote.MAX_WAITING)]
    await _until(lambda: len(source.questions) == 1 + remote.MAX_THREADS)
    with pytest.raises(SourceFailed, match="questions to answer already"):
        await by.find(asked("unknown-x"))
    clock.at += 31
    assert await by.find(asked("good")) == key("alice")
    assert source.questions.count("good") == 2
    source.answers.clear()
    clock.at += 31
    assert await by.find(asked("good")) is None
    clock.at += 31  # it is not good any more, and waits like the others
    with pytest.raises(SourceFailed, match="questions to answer already"):
        await by.find(asked("good"))
    source.goes_on.set()
    assert await asyncio.gather(*unknown) == [None] * remote.MAX_WAITING


def test_for_how_long_a_good_key_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MAX_KEPT", 2)
    clock = Clock()
    good = kept.GoodLately(clock)
    for name in "abc":
        good.note(name, is_good=True)
    assert [good.has(name) for name in "abcd"] == [False, True, True, False]
    clock.at += kept.REMEMBERED_S
    assert [good.has(name) for name in "abcd"] == [False] * 4


async def test_closing() -> None:
    source = Source()
    Remote(source, SETTINGS).close()
    assert source.closed


async def test_closing_lets_questions_that_are_under_way_be_answered() -> None:
    source = Source({"a": key("alice")})
    source.goes_on.clear()
    by = Remote(source, SETTINGS)
    asking = asyncio.ensure_future(by.find(asked("a")))
    await _until(lambda: bool(source.questions))
    by.close()
    assert not source.closed
    source.goes_on.set()
    assert await asking == key("alice")
    await asyncio.sleep(0)
    assert source.closed


async def test_closing_waits_for_a_thread_that_nobody_waits_for() -> None:
    source = Source()
    source.goes_on.clear()
    by = Remote(source, Common(timeout_s=0.1))
    with pytest.raises(SourceFailed, match="does not answer"):
        await by.find(asked("a"))
    by.close()
    assert not source.closed
    source.goes_on.set()
    await _until(lambda: source.closed)


async def test_one_that_was_renewed_goes_on_with_what_it_knows() -> None:
    old, new = Source({"a": key("alice")}), Source()
    before = Remote(old, SETTINGS)
    assert await before.find(asked("a")) == key("alice")
    after = before.renewed(new)
    before.close()
    assert await after.find(asked("a")) == key("alice")
    assert await after.find(asked("b")) is None
    assert (old.questions, old.closed, new.questions, new.closed) == (["a"], True, ["b"], False)


async def _until(look: Callable[[], bool]) -> None:
    await asyncio.to_thread(eventually, look)
