"""Claims and the queue, with a real event loop and a clock that only the tests move."""

import asyncio
import json

import pytest

from gateway import balancer
from gateway.auth import Caller
from gateway.balancer import MAX_RETRY_AFTER_S, NoServer, Search
from gateway.prompts import read_prompt
from gateway.settings import Queue, Routing
from gateway.strategies import STRATEGIES, Report, Wanted
from room import Room, got, refused, rounds, search


@pytest.fixture(autouse=True)
def looks_up_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "TICK_S", 0.001)


# --- taking and waiting


def test_take_until_all_is_full() -> None:
    room = Room("a 1", "b 2")
    searches = [search() for _ in range(4)]
    assert sorted(room.take(each) for each in searches) == ["", "a", "b", "b"]
    assert room.counts == (3, 1, 0)
    for each in searches:
        each.release()
        each.release()
    assert room.counts[0] == 0


@pytest.mark.parametrize("slots", ["0", "-"])
def test_without_slots_nobody_waits(slots: str) -> None:
    room = Room(f"a {slots}")
    assert {room.take(search()) for _ in range(1000)} == {"a"}
    assert room.counts == (1000, 0, 0)


def test_routes() -> None:
    one, two = Room("a -"), Room("a -", "b -")
    for room, route in ((one, "only"), (two, "least-busy")):
        found = search()
        room.take(found)
        assert found.choice
        assert found.choice.route == route


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_who_waits_gets_the_slot_that_is_given_back(strategy: str) -> None:
    room = Room("a 1", "b 1", strategy=strategy)
    first, second, third = search(), search(), search()
    assert {room.take(first), room.take(second)} == {"a", "b"}
    assert room.take(third) == ""
    waits = await room.wait(third)
    assert room.counts == (2, 1, 1)
    for held in (first, second):
        held.release()
    await waits
    assert got(third)
    assert room.counts == (1, 0, 0)
    third.release()
    assert room.counts == (0, 0, 0)


async def test_who_waits_for_its_cached_prompt_does_not_count_against_itself() -> None:
    """However often it is looked whether something became free."""
    room = Room("a 1", "b 1", strategy="prefix")
    said = [{"role": "user", "content": "word " * 1200}]  # 1.5 s to read anew, 1 s to wait
    body = json.dumps({"messages": said}).encode()
    talk = Wanted("m", read_prompt("m", "/v1/chat/completions", body), len(body))
    first, again = Search(Caller(1, "k", ()), talk), Search(Caller(1, "k", ()), talk)
    where = room.take(first)
    waits = await room.wait(again)
    for _ in range(3):
        room.balancer.changed()
    assert room.counts == (1, 1, 1)
    first.release()
    await waits
    assert got(again) == where


async def test_nobody_overtakes_who_waits() -> None:
    room = Room("a 1")
    first, second, third = (search() for _ in range(3))
    room.take(first)
    waits = await room.wait(second)
    assert not room.balancer.take(third)
    also_waits = await room.wait(third)
    first.release()
    await waits
    assert (got(second), got(third)) == ("a", "")
    second.release()
    await also_waits
    assert got(third) == "a"


async def test_who_waits_for_one_model_does_not_hold_up_another() -> None:
    room = Room("a 1 m", "b 1 n")
    held, waiting, other = search(), search(), search(model="n")
    room.take(held)
    waits = await room.wait(waiting)
    assert room.take(other) == "b"
    held.release()
    await waits


async def test_keys_take_turns() -> None:
    room, order = Room("a 1"), []
    held = search(9)
    room.take(held)
    waiting = [(search(key), key) for key in (1, 1, 1, 2, 3)]
    tasks = [await room.wait(each) for each, _ in waiting]
    for _ in range(5):
        held.release()
        held, key = next((each, key) for each, key in waiting if each.claim and each is not held)
        waiting.remove((held, key))
        order.append(key)
    assert order == [1, 2, 3, 1, 1]
    await asyncio.gather(*tasks)


async def test_more_slots_than_before() -> None:
    """A server that has just told its slots."""
    room = Room("a 1")
    room.take(search())
    waiting = [search() for _ in range(3)]
    tasks = [await room.wait(each) for each in waiting]
    room["a"].slots = 3
    room.balancer.changed()
    await asyncio.gather(*tasks[:2])
    assert [got(each) for each in waiting] == ["a", "a", ""]
    room["a"].slots = 0
    room.balancer.changed()
    await tasks[2]
    assert room.counts == (4, 0, 0)


# --- bounds


async def test_the_queue_of_a_model_is_bounded() -> None:
    room = Room("a 1 m", "b 1 n", queue=Queue(max_length=2))
    for model in ("m", "n"):
        await room.wait(search(model=model))
        tasks = [await room.wait(search(model=model)) for _ in range(2)]
        with pytest.raises(NoServer) as caught:
            await room.wait_out(search(model=model))
        assert caught.value.headers["retry-after"] == "3"  # three before it, of a second each
        assert not any(task.done() for task in tasks)
    assert room.counts == (2, 4, 4)


async def test_without_a_queue() -> None:
    room = Room("a 1", queue=Queue(max_length=0))
    room.take(search())
    with pytest.raises(NoServer):
        await room.wait_out(search())
    assert room.counts == (1, 0, 0)


async def test_a_wait_is_bounded() -> None:
    room = Room("a 1", queue=Queue(max_wait_s=30))
    held = search()
    room.take(held)
    early, late = search(), search()
    tasks = [await room.wait(early)]
    room.now += 20
    tasks.append(await room.wait(late))
    room.now += 10
    with pytest.raises(NoServer):
        await tasks[0]
    assert not tasks[1].done()
    held.release()
    await tasks[1]
    assert (got(early), got(late)) == ("", "a")
    assert room.counts == (1, 0, 0)


async def test_a_wait_of_nothing() -> None:
    room = Room("a 1", "b 1 n", queue=Queue(max_wait_s=0))
    room.take(search())
    with pytest.raises(NoServer):
        await room.wait_out(search())
    await room.wait_out(free := search(model="n"))
    assert got(free) == "b"


RETRY_AFTERS: dict[str, tuple[list[str], float | None, int, str]] = {
    "nothing measured": (["a 1"], None, 0, "1"),
    "a long one before it": (["a 1"], 30, 0, "30"),
    "several": (["a 1"], 30, 3, "120"),
    "slots": (["a 2", "b 1"], 30, 5, "60"),
    "no slots told": (["a -", "b 0"], 30, 3, "60"),
    "at most": (["a 1"], 1e6, 3, str(int(MAX_RETRY_AFTER_S))),
    "at least": (["a 1"], 0, 3, "1"),
}


@pytest.mark.parametrize(("servers", "service_s", "waiting", "said"), RETRY_AFTERS.values(), ids=RETRY_AFTERS)
async def test_retry_after_is_what_was_measured(
    servers: list[str], service_s: float | None, waiting: int, said: str
) -> None:
    room = Room(*servers, queue=Queue(max_length=waiting))
    for server in room.servers.values():
        server.measured_service_s = service_s
        server.health.probe_loading(room.now, "loads its model")
    for _ in range(waiting):
        await room.wait(search())
    with pytest.raises(NoServer) as caught:
        await room.wait_out(search())
    assert caught.value.headers["retry-after"] == said


async def test_a_model_that_is_gone_while_requests_wait() -> None:
    """Its servers told their models anew, and nobody has looked at the queue since."""
    room = Room("a 1", queue=Queue(max_wait_s=30, max_length=1))
    room.take(search())
    waits = await room.wait(search())
    room["a"].models = ("n",)
    room.router.learn()
    with pytest.raises(NoServer):
        await room.wait_out(search())
    room.now += 31
    with pytest.raises(NoServer):
        await waits
    assert room.counts == (1, 0, 0)


async def test_a_model_that_is_gone_is_refused_at_once() -> None:
    room = Room("a 1")
    room.take(search())
    waits = await room.wait(search())
    room["a"].models = ("n",)
    room.router.learn()
    room.balancer.changed()
    with pytest.raises(NoServer):
        await waits
    assert refused(room, search()).headers["retry-after"] == "5"


# --- hanging up


async def test_who_hangs_up_leaves_the_queue_at_once() -> None:
    room = Room("a 1")
    held, left, stays = search(), search(), search()
    room.take(held)
    tasks = [await room.wait(each) for each in (left, stays)]
    left.give_up()
    await tasks[0]
    assert (got(left), room.counts) == ("", (1, 1, 1))
    held.release()
    await tasks[1]
    assert got(stays) == "a"


async def test_a_slot_that_comes_as_the_client_leaves_goes_to_the_next() -> None:
    room = Room("a 1")
    held, left, stays = search(), search(), search()
    room.take(held)
    tasks = [await room.wait(each) for each in (left, stays)]
    left.give_up()  # nobody has taken it out of the queue yet
    held.release()
    assert (got(left), got(stays)) == ("", "a")
    await asyncio.gather(*tasks)


async def test_a_client_that_leaves_as_its_slot_comes_can_give_it_back() -> None:
    room = Room("a 1")
    held, left = search(), search()
    room.take(held)
    waits = await room.wait(left)
    held.release()
    left.give_up()
    await waits
    assert (got(left), left.is_over) == ("a", True)
    left.release()
    assert room.counts == (0, 0, 0)


async def test_who_has_left_gets_nothing_any_more() -> None:
    room = Room("a 1")
    gone = search()
    gone.give_up()
    assert room.take(gone) == ""
    await room.wait_out(gone)
    await room.balancer.pause(gone, 1e9)
    assert room.counts == (0, 0, 0)


async def test_a_pause_ends_when_the_client_leaves() -> None:
    room, left = Room("a 1"), search()
    paused = asyncio.get_running_loop().create_task(room.balancer.pause(left, 1e9))
    await rounds()
    left.give_up()
    await paused


async def test_a_wait_that_is_cancelled() -> None:
    room = Room("a 1")
    room.take(search())
    waits = await room.wait(search())
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert room.counts == (1, 0, 0)


# --- what is known and learned


def test_has_other() -> None:
    room = Room("a 1 m", "b 1 m n")
    assert room.balancer.has_other(room["a"], "m")
    assert not room.balancer.has_other(room["b"], "n")
    room["b"].health.refused(room.now, "refuses connections")
    assert not room.balancer.has_other(room["a"], "m")


def test_when_prompts_matter() -> None:
    room = Room("a 1 m x", "b 1 m n x", routing=Routing(models={"x": "round-robin"}))
    matter = {model: room.balancer.looks_at_prompts(model) for model in ("m", "n", "x", "?", None)}
    assert matter == {"m": True, "n": False, "x": False, "?": False, None: True}


def test_service_times_and_reading_speed_are_measured() -> None:
    room = Room("a 4", "b 4", strategy="prefix")
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 9000}]}).encode()
    prompt = read_prompt("m", "/v1/chat/completions", body)
    assert prompt
    wanted = Search(Caller(1, "k", ()), Wanted("m", prompt, len(body)))
    server = room[room.take(wanted)]
    for report in (Report(), Report(0.1, 100, 95, 5.0), Report(0.1, 0, 0, 5.0), Report(0.1, 100, 200, 5.0)):
        room.balancer.answered(wanted, 2.0, report)
        assert server.measured_read_s_per_byte is None
    room.balancer.answered(wanted, 2.0, Report(0.1, 100, 50, 450.0))
    assert server.measured_read_s_per_byte == pytest.approx(0.45 / (prompt.bytes / 2))
    assert server.measured_service_s == 2
