"""Who gets the next slot, and whose place in a full queue: one key's requests are in nobody else's way."""

import asyncio
import json

import pytest

from gateway import balancer
from gateway.auth import Caller
from gateway.balancer import NoServer, Search
from gateway.prompts import read_prompt
from gateway.settings import Queue
from gateway.strategies import Wanted
from room import Room, got, rounds, search


@pytest.fixture(autouse=True)
def looks_up_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "TICK_S", 0.001)


def releases_until(wanted: Search, waiting: list[Search], held: Search) -> int:
    """How many requests have to end, on one slot, until this one is served."""
    left = [*waiting, wanted]
    for count in range(1, len(left) + 1):
        held.release()
        held = next(each for each in left if each.claim)
        left.remove(held)
        if held is wanted:
            return count
    raise AssertionError


# --- models


@pytest.mark.parametrize("comes", [3, 2], ids=["another", "the same"])
@pytest.mark.parametrize("elsewhere", [0, 1000])
async def test_what_runs_for_another_model_does_not_count(elsewhere: int, comes: int) -> None:
    """Sixty of a key wait, key 2 is busy with another model, and somebody comes with one request."""
    room = Room("a 1 m", "e - embed")
    held = search(1)
    room.take(held)
    heavy = [search(1) for _ in range(60)]
    for each in heavy:
        await room.wait(each)
    for _ in range(elsewhere):
        embeds = search(2, "embed")
        assert room.take(embeds) == "e"
        embeds.release()
    light = search(comes)
    await room.wait(light)
    assert releases_until(light, heavy, held) == 1


def talk(key: int, words: int) -> Search:
    body = json.dumps({"messages": [{"role": "user", "content": "word " * words}]}).encode()
    return Search(Caller(key, f"key {key}", ()), Wanted("m", read_prompt("m", "/v1/chat/completions", body), len(body)))


@pytest.mark.parametrize("comes", [3, 2], ids=["another", "the same"])
async def test_what_runs_on_another_server_does_not_count(comes: int) -> None:
    """Those of key 1 wait for the server that has cached their prompt; key 2 uses the other one meanwhile."""
    room = Room("a 1", "b 1", strategy="prefix")
    held = talk(1, 20_000)
    at = room.take(held)
    heavy = [talk(1, 20_000) for _ in range(10)]
    for each in heavy:
        await room.wait(each)
    for _ in range(1000):
        other = search(2)
        await room.wait_out(other)
        assert got(other) not in ("", at)
        other.release()
    light = talk(comes, 20_000)
    await room.wait(light)
    assert releases_until(light, heavy, held) <= 3  # it had its turn just now, at most


async def test_models_that_share_a_server_take_turns() -> None:
    room, order = Room("a 1 m n"), []
    held = search(9)
    room.take(held)
    left = [search(model=model) for model in ("m", "m", "m", "n", "n", None)]
    for each in left:
        await room.wait(each)
    while left:
        held.release()
        held = next(each for each in left if each.claim)
        left.remove(held)
        order.append(held.wanted.model)
    assert order == ["m", "n", None, "m", "n", "m"]


async def test_a_higher_class_goes_first_whatever_model_it_wants() -> None:
    room = Room("a 1 m n")
    held, normal, high = search(9), search(1), search(2, "n", priority=0)
    room.take(held)
    for each in (normal, high):
        await room.wait(each)
    held.release()
    assert (got(normal), got(high)) == ("", "a")


async def test_nothing_is_kept_of_models_that_nobody_wants() -> None:
    room = Room("a 1")
    for model in ("m", None, "gone"):
        found = search(model=model)
        if model != "gone":
            room.take(found)
        waits = await room.wait(search(model=model))
        waits.cancel()
        await rounds()
        await asyncio.gather(waits, return_exceptions=True)
        found.release()
    assert room.balancer._queues == {}


# --- a full queue


async def test_a_server_that_is_free_is_taken_though_the_queue_is_full() -> None:
    """Others wait for the server that has cached their prompt."""
    room = Room("a 1", "b 1", strategy="prefix", queue=Queue(max_length=2))
    room.take(talk(1, 20_000))
    for _ in range(2):
        await room.wait(talk(1, 20_000))
    new = search(1)
    await room.wait_out(new)
    assert got(new)
    assert room.counts == (2, 2, 2)


NORMAL, HIGH, LOW = 1, 0, 2

# Those that wait, as (key, priority, weight); who comes; the index of the one that is refused, None: who comes.
Who = tuple[int, int, int]
FULL: dict[str, tuple[list[Who], Who, int | None]] = {
    "the same key": ([(1, NORMAL, 1)] * 3, (1, NORMAL, 1), None),
    "another key": ([(1, NORMAL, 1)] * 3, (2, NORMAL, 1), 2),
    "the newest of that key": ([(1, NORMAL, 1), (1, NORMAL, 1), (2, NORMAL, 1)], (3, NORMAL, 1), 1),
    "as many": ([(1, NORMAL, 1), (2, NORMAL, 1)], (3, NORMAL, 1), None),
    "as many with it": ([(1, NORMAL, 1), (1, NORMAL, 1), (2, NORMAL, 1)], (2, NORMAL, 1), None),
    "for its weight": ([(1, NORMAL, 4)] * 3 + [(2, NORMAL, 1)] * 2, (3, NORMAL, 1), 4),
    "a weight that comes": ([(1, NORMAL, 1)], (2, NORMAL, 2), 0),
    "a higher class": ([(1, NORMAL, 1)], (2, HIGH, 1), 0),
    "a higher class with many": ([(1, HIGH, 1), (1, HIGH, 1), (2, NORMAL, 1)], (1, HIGH, 1), 2),
    "a lower class": ([(1, HIGH, 1)] * 3, (2, NORMAL, 1), None),
    "the lowest class first": ([(1, NORMAL, 1)] * 3 + [(2, LOW, 1)], (3, HIGH, 1), 3),
    "nobody waits": ([], (1, HIGH, 1), None),
}


def who(key: int, priority: int, weight: int) -> Search:
    return search(key, priority=priority, weight=weight)


@pytest.mark.parametrize(("waiting", "comes", "goes"), FULL.values(), ids=FULL)
async def test_who_has_to_go_when_the_queue_is_full(waiting: list[Who], comes: Who, goes: int | None) -> None:
    room = Room("a 1", queue=Queue(max_length=len(waiting)))
    held = search(9)
    room.take(held)
    tasks = [await room.wait(who(*each)) for each in [*waiting, comes]]
    expected = len(waiting) if goes is None else goes
    assert [task.done() for task in tasks] == [number == expected for number in range(len(tasks))]
    with pytest.raises(NoServer) as caught:
        await tasks[expected]
    assert int(caught.value.headers["retry-after"]) == len(waiting) + 1
    assert room.counts == (1, min(len(waiting), 1) * len(waiting), len(waiting))


async def test_who_has_left_and_is_pushed_out() -> None:
    room = Room("a 1", queue=Queue(max_length=2))
    room.take(search(9))
    stays, left = search(1), search(1)
    tasks = [await room.wait(each) for each in (stays, left)]
    left.give_up()
    also = asyncio.create_task(room.balancer.wait(search(2)))
    await tasks[1]
    await rounds()
    assert (tasks[0].done(), also.done(), room.counts) == (False, False, (1, 2, 2))


# --- servers that reopen


async def test_a_server_that_reopens_wakes_those_that_wait() -> None:
    """Its pause ends without anybody's doing."""
    room = Room("a 1", "b 1")
    room["b"].health.asked_to_wait(room.now, 7)
    room.take(search())
    waiting = [search(), search()]
    tasks = [await room.wait(each) for each in waiting]
    room.now += 6.9
    await rounds()
    assert [task.done() for task in tasks] == [False, False]
    room.now += 0.1
    await asyncio.wait_for(tasks[0], 5)
    assert [got(each) for each in waiting] == ["b", ""]  # one is the trial
