"""The index of prompts: what it finds, what it forgets, and where new conversations have their homes."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.prefix import Placements, PrefixIndex, Strangers, home_of
from gateway.prompts import Mark, Prompt
from gateway.servers import Server
from gateway.settings import Server as ServerConfig


def servers(*weights: float) -> list[Server]:
    """Named a, b, …"""
    return [
        Server(ServerConfig(name, f"http://{name}:1", weight=weight))
        for name, weight in zip("abcdefghij", weights, strict=False)
    ]


def conversation(*messages: str) -> Prompt:
    """Messages of a thousand bytes each."""
    marks = tuple(
        Mark(1000 * (index + 1), hash("/".join(messages[: index + 1])) % 2**64) for index in range(len(messages))
    )
    return Prompt(1000 * len(messages), marks, 0)


def raw(*pieces: str) -> Prompt:
    """A raw prompt: its last bytes are in no mark."""
    found = conversation(*pieces)
    return Prompt(found.bytes + 500, found.marks, None)


def ends(index: PrefixIndex, prompt: Prompt) -> dict[str, int]:
    return {server: match.end for server, match in index.find(prompt).items()}


def send(index: PrefixIndex, prompt: Prompt, server: str) -> None:
    index.remember(prompt, server)
    index.confirm(prompt, server)


def test_nothing_is_known() -> None:
    assert PrefixIndex(10).find(conversation("x")) == {}


def test_a_conversation_goes_on() -> None:
    index = PrefixIndex(10)
    send(index, conversation("x"), "a")
    assert ends(index, conversation("x", "answer", "y")) == {"a": 1000}
    send(index, conversation("x", "answer", "y"), "a")
    assert ends(index, conversation("x", "answer", "y", "answer", "z")) == {"a": 3000}
    assert ends(index, conversation("x", "another answer", "y")) == {"a": 1000}
    assert ends(index, conversation("another", "answer", "y")) == {}


def test_a_conversation_moves() -> None:
    """Its beginning is at the server that was sent it last; where it ended before, nobody asks for any more."""
    index = PrefixIndex(10)
    send(index, conversation("x"), "a")
    send(index, conversation("x", "answer", "y"), "b")
    assert ends(index, conversation("x", "answer", "y", "answer", "z")) == {"b": 3000}
    assert ends(index, conversation("x")) == {"b": 1000}


def test_two_servers_with_parts_of_it() -> None:
    """A conversation that forked: each server's longest part is found."""
    index = PrefixIndex(10)
    send(index, conversation("x", "1", "2"), "a")
    send(index, conversation("x", "other", "2"), "b")
    assert ends(index, conversation("x", "1", "2", "3")) == {"a": 3000, "b": 1000}


def test_raw_prompts() -> None:
    """They may go on anywhere."""
    index = PrefixIndex(10)
    send(index, raw("1", "2", "3"), "a")
    assert ends(index, raw("1")) == {"a": 1000}
    assert ends(index, raw("1", "2", "x", "y")) == {"a": 2000}


def test_a_conversation_takes_two_marks_however_long_it_gets() -> None:
    index = PrefixIndex(1000)
    said = []
    for number in range(100):
        said.append(str(number))
        send(index, conversation(*said), "a")
    assert len(index) == 2


def test_it_is_bounded_and_forgets_what_was_used_least_lately() -> None:
    index = PrefixIndex(100)
    for number in range(1000):
        send(index, conversation(f"{number}"), "a")
        send(index, conversation("in use"), "a")
        assert len(index) <= 100
    assert ends(index, conversation("in use")) == {"a": 1000}
    assert ends(index, conversation("999")) == {"a": 1000}
    assert ends(index, conversation("910")) == {"a": 1000}
    assert ends(index, conversation("890")) == {}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_of_no_size_to_speak_of(size: int) -> None:
    index = PrefixIndex(size)
    for number in range(10):
        send(index, conversation(str(number), "answer", "y", "z"), "a")
        send(index, raw(*"abcdefgh"), "b")
        assert len(index) <= size


def test_a_restart_is_learned_from_one_report() -> None:
    """A server that had not cached what it was sent lately has lost what it was sent before that, too."""
    index = PrefixIndex(100)
    for number in range(10):
        send(index, conversation(str(number)), "a")
        send(index, conversation(f"b{number}"), "b")
    again = conversation("7", "answer", "y")
    expected = index.find(again)["a"]
    index.remember(again, "a")
    index.correct(again, "a", expected, cached_share=0.0)
    assert [number for number in range(10) if ends(index, conversation(str(number)))] == [7, 8, 9]
    assert all(ends(index, conversation(f"b{number}")) for number in range(10))
    assert ends(index, again) == {"a": 3000}  # that was sent since


def test_what_was_cached_is_believed() -> None:
    index = PrefixIndex(100)
    send(index, conversation("x"), "a")
    again = conversation("x", "y")
    for cached_share in (0.5, 0.9, 1.0, 7.0, 0.26):  # tokens are no bytes: a half of it is near enough
        index.correct(again, "a", index.find(again)["a"], cached_share)
    assert ends(index, again) == {"a": 1000}
    index.correct(again, "a", index.find(again)["a"], 0.24)
    assert ends(index, again) == {}


def test_one_that_still_reads_has_lost_nothing() -> None:
    index = PrefixIndex(100)
    send(index, conversation("x"), "a")
    index.remember(conversation("y"), "a")
    expected = index.find(conversation("y", "1"))["a"]
    assert not expected.is_sure
    index.correct(conversation("y", "1"), "a", expected, 0.0)
    assert ends(index, conversation("x")) == {"a": 1000}
    index.confirm(conversation("y"), "b")  # another's answer confirms nothing
    assert not index.find(conversation("y"))["a"].is_sure
    index.confirm(conversation("y"), "a")
    assert index.find(conversation("y"))["a"].is_sure


def test_a_late_report_takes_nothing_back() -> None:
    index = PrefixIndex(100)
    send(index, conversation("x"), "a")
    send(index, conversation("y"), "a")
    old, new = index.find(conversation("x"))["a"], index.find(conversation("y"))["a"]
    index.correct(conversation("y"), "a", new, 0.0)
    index.correct(conversation("x"), "a", old, 0.0)
    assert ends(index, conversation("y")) == {}


def test_many_servers() -> None:
    index = PrefixIndex(5000)
    for number in range(1000):
        send(index, conversation(str(number)), f"server {number}")
    assert all(ends(index, conversation(str(n))) == {f"server {n}": 1000} for n in range(1000))


@dataclass
class Naive:
    """What the index should say, as lists that nobody would want to search."""

    sent: list[tuple[Prompt, str]] = field(default_factory=list)
    answered: set[tuple[int, int]] = field(default_factory=set)  # (when, mark)
    lost: dict[str, int] = field(default_factory=dict)

    def owner(self, mark: Mark) -> tuple[int, str] | None:
        """Who was sent a mark last, unless it was the end of an earlier turn and the conversation went on."""
        for when in reversed(range(len(self.sent))):
            prompt, server = self.sent[when]
            first_later = len(prompt.marks) if prompt.opening is None else prompt.opening + 1
            if mark in prompt.marks[:first_later] or mark == prompt.marks[-1]:
                return when, server
            if mark in prompt.marks:
                return None
        return None

    def find(self, prompt: Prompt) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for mark in reversed(prompt.marks):
            owner = self.owner(mark)
            if owner and owner[0] > self.lost.get(owner[1], -1):
                found.setdefault(owner[1], (mark.end, owner[0]))
        return found


_TALKS = st.lists(st.sampled_from("xyz"), min_size=1, max_size=4)
_STEPS = st.tuples(_TALKS, st.booleans(), st.sampled_from(["a", "b", "c"]), st.sampled_from(["send", "lose"]))


@given(st.lists(_STEPS, max_size=30))
@settings(deadline=None)
def test_as_a_naive_model_has_it(steps: list[tuple[list[str], bool, str, str]]) -> None:
    index, naive = PrefixIndex(1_000_000), Naive()
    for messages, is_raw, server, what in steps:
        prompt = raw(*messages) if is_raw else conversation(*messages)
        found = index.find(prompt)
        assert {name: match.end for name, match in found.items()} == {
            name: end for name, (end, _) in naive.find(prompt).items()
        }
        if what == "lose" and server in found:
            index.correct(prompt, server, found[server], 0.0)
            if found[server].is_sure:
                naive.lost[server] = max(naive.lost.get(server, -1), naive.find(prompt)[server][1])
        else:
            send(index, prompt, server)
            naive.sent.append((prompt, server))


# --- placements


@given(
    st.lists(st.sampled_from([0.25, 1.0, 2.0, 3.0]), min_size=1, max_size=5),
    st.lists(st.integers(0, 99), min_size=1, max_size=300),
)
def test_no_server_gets_much_more_than_its_share(weights: list[float], wishes: list[int]) -> None:
    """Whoever would be chosen among those that are allowed."""
    pool, placements, got = servers(*weights), Placements(), Counter[str]()
    for wish in wishes:
        allowed = placements.below_share(pool)
        assert allowed
        name = allowed[wish % len(allowed)].name
        placements.add(name)
        got[name] += 1
    for server in pool:
        share = got.total() * server.config.weight / sum(weights)
        assert got[server.name] <= 1.2 * share + 4


def test_placements_of_the_greedy() -> None:
    pool, placements, got = servers(1, 1, 2), Placements(), Counter[str]()
    for _ in range(1000):
        name = placements.below_share(pool)[0].name  # all want the first one
        placements.add(name)
        got[name] += 1
    assert got["a"] <= 1.15 * 250
    assert got["b"] <= 1.15 * 250


def test_placements_recover_when_a_server_is_back() -> None:
    """It gets the new conversations for a while, and not for ever."""
    pool, placements = servers(1, 1), Placements()
    for _ in range(10_000):
        placements.add("a")
    assert [server.name for server in placements.below_share(pool)] == ["b"]
    count = 0
    while len(placements.below_share(pool)) == 1:
        placements.add("b")
        count += 1
    assert 20 < count < 100


@pytest.mark.parametrize("weights", [(5e-324,), (5e-324, 1), (1e308, 1e308), (1e-300, 1e300)], ids=str)
def test_placements_with_odd_weights(weights: tuple[float, ...]) -> None:
    pool, placements = servers(*weights), Placements()
    for _ in range(100):
        placements.add(placements.below_share(pool)[0].name)


def test_strangers() -> None:
    strangers = Strangers()
    assert strangers.part == 0
    for _ in range(2000):
        strangers.add(has_history=False)
    assert strangers.part == pytest.approx(0)
    for _ in range(2000):
        strangers.add(has_history=True)
    assert strangers.part == 1
    for _ in range(500):
        for has_history in (True, False):
            strangers.add(has_history)
    assert 0.7 < strangers.part <= 1


# --- homes


def homes(pool: Sequence[Server], count: int = 3000) -> list[str]:
    chance = random.Random(1)
    return [home_of(pool, chance.getrandbits(64)).name for _ in range(count)]


def test_everybody_finds_the_same_home() -> None:
    """Whatever the order, and whatever is known of the servers besides."""
    pool, other = servers(1, 2, 1), servers(1, 2, 1)[::-1]
    for server in other:
        server.running = 7
    assert homes(pool) == homes(other)


def test_homes_are_told_by_names_that_stay_the_same() -> None:
    """Of another version, or of another machine: a home is no accident of a process."""
    assert "".join(home_of(servers(1, 1, 1), identity).name for identity in range(12)) == "caabbbccbbcb"


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 3), (0.5, 0.25, 0.25), (10, 1)], ids=str)
def test_homes_go_by_weight(weights: tuple[float, ...]) -> None:
    got = Counter(homes(servers(*weights)))
    for server in servers(*weights):
        assert got[server.name] / 3000 == pytest.approx(server.config.weight / sum(weights), abs=0.03)


def test_few_homes_move() -> None:
    """When a server leaves, its own; when a weight grows, only to it."""
    all_four, without_d = homes(servers(1, 1, 1, 1)), homes(servers(1, 1, 1))
    assert {before for before, after in zip(all_four, without_d, strict=True) if before != after} == {"d"}
    heavier = homes(servers(1, 1, 1, 2))
    assert {after for before, after in zip(all_four, heavier, strict=True) if before != after} == {"d"}


@given(st.integers(0, 2**64 - 1), st.lists(st.floats(5e-324, 1e308), min_size=1, max_size=4))
def test_everybody_has_a_home(identity: int, weights: list[float]) -> None:
    pool = servers(*weights)
    assert home_of(pool, identity) in pool
