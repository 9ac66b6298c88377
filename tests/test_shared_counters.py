"""The counters in Redis as the event loop sees them: workers beside each other, and Redis going away in every way."""

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from conftest import StartProxy
from databases import Database, RedisServer
from gateway import shared_counters
from gateway.limits import Budget, Limits, Rule
from gateway.quota import Ask, CountersUnavailable, Settlement
from gateway.records import uuid7
from gateway.shared_accounts import SharedAccounts
from gateway.shared_counters import SharedCounters
from test_limits_e2e import ANSWER, CHAT, served
from test_limits_e2e import ask as request
from test_limits_shared_e2e import ALICE, machines
from upstream import Upstream, reply
from waiting import eventually

DAY = "2026-11-21"
LIMIT = (Rule("key:1", Limits(rpm=5, concurrency=5, budgets=(Budget("total", tokens=1000),))),)

type Start = Callable[..., SharedCounters]


@pytest.fixture
def server(database: Callable[[str], Database]) -> RedisServer:
    server = database("redis")
    assert isinstance(server, RedisServer)
    with server.client() as client:
        client.flushall()
    return server


@pytest.fixture
async def start(server: RedisServer, database: Callable[[str], Database]) -> AsyncIterator[Start]:
    started: list[SharedCounters] = []

    def start(worker: str = "one", lease_s: float = 15) -> SharedCounters:
        started.append(SharedCounters(server.url, worker, lease_s))
        return started[-1]

    yield start
    database("redis")  # is well again
    for counters in started:
        await asyncio.to_thread(counters.close)


def ask(worker: str = "one", of: tuple[Rule, ...] = LIMIT) -> Ask:
    return Ask(uuid7(), worker, DAY, of, tokens=10)


def end(asked: Ask, tokens: int | None = 7) -> Settlement:
    return Settlement(asked.id, DAY, ("key:1",), asked.rules, tokens)


def counted(server: RedisServer) -> tuple[float, ...]:
    """Running requests, requests in the window, tokens spent, tokens held: as another worker sees them."""
    accounts = SharedAccounts(server.url)
    running, requests, budget = accounts.standings(LIMIT, time.time())
    accounts.close()
    return running.held, requests.used, budget.used, budget.held


async def admitted(counters: SharedCounters, asked: Ask) -> bool:
    """Asks until somebody says yes or no."""
    async with asyncio.timeout(10):
        while True:
            try:
                return (await counters.admit(asked)).denial is None
            except CountersUnavailable:
                await asyncio.sleep(0.01)


async def test_a_request_and_its_end(server: RedisServer, start: Start) -> None:
    counters = start()
    asked = ask()
    decision = await counters.admit(asked)
    assert decision.denial is None
    now = await counters.standings(LIMIT)
    assert [(each.used, each.held) for each in now] == [(each.used, each.held) for each in decision.standings]
    assert counted(server) == (1, 1, 0, 10)
    events = await counters.settle(end(asked, tokens=900))
    assert [(event.share, event.used) for event in events] == [(0.8, 900)]
    assert counted(server) == (0, 1, 900, 0)


async def test_fifty_at_once_over_two_workers(start: Start) -> None:
    workers = {name: start(name) for name in ("one", "two")}
    calls = [workers[name].admit(ask(name)) for _ in range(25) for name in workers]
    decisions = await asyncio.gather(*calls)
    assert sum(decision.denial is None for decision in decisions) == 5


async def test_nobody_gets_in_while_redis_is_away(
    server: RedisServer, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop()
    counters = start()
    with pytest.raises(CountersUnavailable, match="Connection refused"):
        await counters.admit(ask())
    with pytest.raises(CountersUnavailable, match="Connection refused"):
        await counters.standings(LIMIT)
    assert not counters.healthy
    assert counters.settle(end(ask(), tokens=None)).done(), "the end of a request that never came in waits for nothing"
    server.start()
    assert await admitted(counters, ask())
    assert counters.healthy
    told = [record.getMessage() for record in caplog.records]
    assert {record.levelname for record in caplog.records} == {"WARNING"}, "mitmproxy ends when a start logs an error"
    assert told[0].startswith(f"limits.storage: 127.0.0.1:{server.port}: ")
    assert told[-1] == f"the counters in 127.0.0.1:{server.port} can be reached again"
    assert "secret" not in caplog.text


def test_a_gateway_starts_without_redis(server: RedisServer, start_proxy: StartProxy, upstream: Upstream) -> None:
    server.stop()
    upstream.always(CHAT, reply(ANSWER))
    gateway, _ = machines(start_proxy, served(upstream), server, {"rpm": 5})
    assert request(gateway, ALICE).status_code == 503
    server.start()
    eventually(lambda: request(gateway, ALICE).status_code == 200)


async def test_an_end_waits_until_redis_is_back(server: RedisServer, start: Start) -> None:
    """However often it is sent, it counts once."""
    counters = start()
    asked = [ask() for _ in range(3)]
    for each in asked:
        await counters.admit(each)
    server.stop()
    ends = [counters.settle(end(each, tokens=300)) for each in asked]
    await asyncio.to_thread(eventually, lambda: not counters.healthy)
    assert not any(each.done() for each in ends)
    server.start()
    events = await asyncio.gather(*ends)
    assert [event.share for each in events for event in each] == [0.8]
    assert counted(server) == (0, 3, 900, 0)


async def test_what_a_frozen_redis_was_asked_for_is_taken_back(server: RedisServer, start: Start) -> None:
    counters = start()
    running = ask()
    await counters.admit(running)
    server.freeze()
    asked = [ask() for _ in range(3)]
    refused = await asyncio.gather(*map(counters.admit, asked), return_exceptions=True)
    assert [type(each) for each in refused] == [CountersUnavailable] * 3
    ending = counters.settle(end(running))
    server.thaw()
    await ending
    assert await admitted(counters, ask())
    await asyncio.to_thread(eventually, lambda: counted(server) == (1, 2, 7, 10), "all but the last was given back")


async def test_whoever_leaves_while_the_answer_comes_holds_nothing(server: RedisServer, start: Start) -> None:
    counters = start()
    waiting = asyncio.create_task(counters.admit(ask()))
    await asyncio.sleep(0)
    eventually(lambda: counted(server) == (1, 1, 0, 10), "it is in, and its task has not heard of it")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.to_thread(eventually, lambda: counted(server) == (0, 0, 0, 0))


# A worker that lets two requests in, says so, and goes on until it is killed.
WORKER = """
import asyncio, sys
from gateway.limits import Limits, Rule, Budget
from gateway.quota import Ask
from gateway.shared_counters import SharedCounters
rules = (Rule("key:1", Limits(rpm=5, concurrency=5, budgets=(Budget("total", tokens=1000),))),)
async def main():
    counters = SharedCounters(sys.argv[1], "other", lease_s=1)
    for id in "ab":
        assert not (await counters.admit(Ask(id, "other", "2026-11-21", rules, tokens=10))).denial
    print("admitted", flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


def start_worker(server: RedisServer) -> subprocess.Popen[str]:
    addon = str(Path(__file__).parents[1] / "addon")
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, server.url], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": addon}
    )
    assert worker.stdout
    assert worker.stdout.readline() == "admitted\n"
    return worker


async def test_what_a_killed_worker_held_is_given_back(server: RedisServer, start: Start) -> None:
    counters = start("one", lease_s=1)
    await counters.admit(ask())
    worker = start_worker(server)
    with server.client() as client:
        renewals = client.info("commandstats")["cmdstat_set"]["calls"]
        eventually(
            lambda: client.info("commandstats")["cmdstat_set"]["calls"] >= renewals + 8, "leases that were renewed"
        )
    assert counted(server) == (3, 3, 0, 30), "it lives"
    worker.kill()
    worker.wait()
    eventually(lambda: counted(server) == (1, 3, 0, 10), "the dead worker's share is free; its requests have come")


async def test_a_redis_that_was_emptied(server: RedisServer, start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """All begins anew, which is said aloud; ends of requests from before count nothing twice and nothing below zero."""
    counters = start(lease_s=3)
    before = ask()
    await counters.admit(before)
    with server.client() as client:
        client.flushall()
    await counters.settle(end(before))
    assert counted(server) == (0, 0, 7, 0)
    eventually(lambda: "has lost the counters: all of them begin anew" in caplog.text)
    assert await admitted(counters, ask())
    assert counted(server) == (1, 1, 7, 10)


async def test_an_end_that_can_never_be_booked_is_told(
    server: RedisServer, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with server.client() as client:
        client.set(f"llmproxy:spend:key:1:day:{DAY}", "somebody else's")
    counters = start()
    asked = ask()
    with pytest.raises(OSError, match="WRONGTYPE"):
        await counters.settle(end(asked))
    assert "LOST" in caplog.text
    assert asked.id in caplog.text
    assert counters.healthy
    assert await admitted(counters, ask())


async def test_too_many_ends_are_told(
    server: RedisServer, start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_counters, "MAX_WAITING", 2)
    counters = start()
    await counters.standings(LIMIT)
    server.freeze()
    ends = [counters.settle(end(ask())) for _ in range(6)]
    lost = [each for each in ends if each.done()]
    assert 2 <= len(lost) <= 4, "two wait, and some may be on their way"
    for each in lost:
        with pytest.raises(OSError, match="too many wait"):
            await each
    assert caplog.text.count("LOST") == len(lost)
    server.thaw()
    await asyncio.gather(*(each for each in ends if each not in lost))


async def test_closing_settles_what_waits_and_gives_back_the_rest(server: RedisServer, start: Start) -> None:
    counters = start()
    ended, running = ask(), ask()
    await counters.admit(ended)
    await counters.admit(running)
    ending = counters.settle(end(ended))
    await asyncio.to_thread(counters.close)
    assert await ending == []
    assert counted(server) == (0, 2, 7, 0)
    with server.client() as client:
        assert not client.exists("llmproxy:lease:one")
    with pytest.raises(CountersUnavailable, match="the gateway stops"):
        await counters.admit(ask())
    with pytest.raises(OSError, match="the gateway stops"):
        await counters.settle(end(running))


async def test_closing_without_redis_ends_and_says_what_is_lost(
    server: RedisServer, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    counters = start()
    asked = ask()
    await counters.admit(asked)
    server.stop()
    ending = counters.settle(end(asked))
    await asyncio.to_thread(counters.close)
    with pytest.raises(OSError, match="the gateway stops"):
        await ending
    lost = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert len(lost) == 1
    assert asked.id in lost[0]
