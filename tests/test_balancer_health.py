"""Which servers a request may go to, by their health: who is waited for, and who is asked as a last resort."""

import asyncio
from collections.abc import Callable

import pytest

from gateway import balancer
from gateway.balancer import NoServer
from gateway.servers import Server
from gateway.strategies import STRATEGIES
from room import Room, got, refused, rounds, search


@pytest.fixture(autouse=True)
def looks_up_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "TICK_S", 0.001)


async def test_a_server_that_loads_is_waited_for() -> None:
    room = Room("a 4", up=False, loading_wait_s=60)
    room["a"].health.probe_loading(room.now, "loads its model")
    assert room.take(search()) == ""
    waiting = [search() for _ in range(3)]
    tasks = [await room.wait(each) for each in waiting]
    assert room.counts == (0, 0, 3)
    room["a"].health.probe_ok(room.now)
    room.balancer.changed()
    await asyncio.gather(*tasks)
    assert room.counts == (3, 0, 0)


async def test_a_server_that_loads_for_too_long() -> None:
    room = Room("a 4", up=False, loading_wait_s=60)
    room["a"].health.probe_loading(room.now, "loads its model")
    waits = await room.wait(search())
    room.now += 59
    await rounds()
    assert not waits.done()
    room.now += 1
    with pytest.raises(NoServer):
        await waits


async def test_a_server_that_loads_and_dies() -> None:
    room = Room("a 4", up=False)
    room["a"].health.probe_loading(room.now, "loads its model")
    waits = await room.wait(search())
    room["a"].health.probe_failed(room.now, "does not answer")
    room.balancer.changed()
    with pytest.raises(NoServer):
        await waits
    assert room.counts == (0, 0, 0)


def test_a_loading_server_is_not_waited_for_when_another_model_will_do() -> None:
    room = Room("a 4", up=False)
    room["a"].health.probe_loading(room.now, "loads its model")
    assert room.take(search()) == ""
    refused(room, search(may_fall_back=True))


def test_a_server_that_loads_is_not_waited_for_when_another_is_up() -> None:
    room = Room("a 4", "b 4")
    room["a"].health.probe_loading(room.now, "loads its model")
    assert [room.take(search()) for _ in range(2)] == ["b", "b"]


def test_half_open_lets_exactly_one_through() -> None:
    room = Room("a 4")
    room["a"].health.failed(room.now, "was reset")
    assert refused(room, search()).headers["retry-after"] == "10"
    room.now += 10
    trial = search()
    assert room.take(trial) == "a"
    refused(room, search())
    trial.release()  # its client left: the next one is the trial
    trial = search()
    assert room.take(trial) == "a"
    refused(room, search())
    room["a"].health.succeeded(room.now)
    assert room.take(search()) == "a"


def test_a_pause_that_was_asked_for_is_kept() -> None:
    room = Room("a 4", "b 4")
    for server, seconds in ((room["a"], 7), (room["b"], 9)):
        server.health.asked_to_wait(room.now, seconds)
    for _ in range(2):
        assert refused(room, search()).headers["retry-after"] == "7"
    room.now += 6.5
    assert refused(room, search()).headers["retry-after"] == "1"
    room.now += 0.5
    assert room.take(search()) == "a"


FAILED: dict[str, Callable[[Server], None]] = {
    "ejected": lambda server: server.health.failed(1000, "was reset"),
    "refusing": lambda server: server.health.refused(1000, "refuses connections"),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fail", FAILED.values(), ids=FAILED)
def test_last_resorts(fail: Callable[[Server], None], strategy: str) -> None:
    """With nowhere else to go: first those that have not failed this request yet."""
    room = Room("a 4", "b 4", "c 4", strategy=strategy)
    fail(room["a"])
    assert {room.take(search()) for _ in range(6)} == {"b", "c"}
    for name in "bc":
        fail(room[name])
    wanted, asked = search(), []
    for _ in range(3):
        asked.append(room.take(wanted))
        wanted.release()
        wanted.tried.append(room[asked[-1]])
        wanted.claim = None
    assert sorted(asked) == ["a", "b", "c"]
    refused(room, search(may_fall_back=True))


def test_a_single_server_that_was_ejected_is_left_alone() -> None:
    room = Room("a 4")
    FAILED["ejected"](room["a"])
    refused(room, search())


def test_a_single_server_that_refused_is_asked_again_but_not_by_the_same_request() -> None:
    room = Room("a 4")
    FAILED["refusing"](room["a"])
    wanted = search()
    assert room.take(wanted) == "a"
    wanted.release()
    wanted.tried.append(room["a"])
    refused(room, wanted)


def test_a_server_that_is_down_and_silent_is_not_asked() -> None:
    room = Room("a 4", up=False)
    room["a"].health.probe_failed(room.now, "does not answer")
    assert "a is down" in refused(room, search()).message


def test_who_was_tried_is_tried_again_when_no_other_is_left() -> None:
    room = Room("a 4", "b 4")
    wanted = search()
    wanted.tried.append(room["a"])
    assert [room.take(search(2)), room.take(wanted)][1] == "b"
    wanted.release()
    wanted.tried.append(room["b"])
    wanted.claim = None
    assert room.take(wanted) in "ab"


async def test_a_server_that_goes_down_while_requests_wait_for_it() -> None:
    room = Room("a 1", "b 1")
    held = [search(), search()]
    for each in held:
        room.take(each)
    waiting = search()
    waits = await room.wait(waiting)
    room["a"].health.probe_failed(room.now, "late")
    room["a"].health.refused(room.now, "refuses connections")
    room.balancer.changed()
    next(each for each in held if got(each) == "a").release()
    await rounds()
    assert not waits.done()
    next(each for each in held if got(each) == "b").release()
    await waits
    assert got(waiting) == "b"
