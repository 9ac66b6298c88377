"""The counters in Redis: the rules of limits one by one, and whatever is asked twice."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from databases import Database, RedisServer
from gateway.limits import Budget, Limits, Rule
from gateway.quota import Ask, CountersUnavailable, Decision, Denial, LimitEvent, Settlement, Standing
from gateway.records import uuid7
from gateway.shared_accounts import SharedAccounts

START = 1795262400.0  # noon
DAY = "2026-11-21"
TO_MIDNIGHT = 12 * 3600.0


@pytest.fixture
def server(database: Callable[[str], Database]) -> RedisServer:
    server = database("redis")
    assert isinstance(server, RedisServer)
    with server.client() as client:
        client.flushall()
    return server


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def accounts(server: RedisServer, clock: Clock) -> Iterator[SharedAccounts]:
    accounts = SharedAccounts(server.url, clock)
    yield accounts
    accounts.close()


def rules(**limits: object) -> tuple[Rule, ...]:
    return (Rule("key:1", Limits(**limits)),)  # type: ignore[arg-type]


def ask(of: tuple[Rule, ...], tokens: int = 0, micros: int = 0, *, is_bound: bool = False, worker: str = "w") -> Ask:
    return Ask(uuid7(), worker, DAY, of, tokens, micros, is_bound)


def end(asked: Ask, tokens: int | None = None, micros: int | None = None, *, was_served: bool = True) -> Settlement:
    return Settlement(asked.id, DAY, ("key:1",), asked.rules, tokens, micros, was_served)


def wait_of(decision: Decision) -> float | None:
    assert decision.denial
    return decision.denial.wait_s


def test_a_window_slides(accounts: SharedAccounts, clock: Clock) -> None:
    two = rules(rpm=2)
    waits = []
    for at in (0, 1, 2, 59.5, 60, 60.5, 61, 62):
        clock.now = START + at
        decision = accounts.admit(ask(two), 0)
        waits.append(decision.denial and decision.denial.wait_s)
    assert waits == [None, None, 58, 0.5, None, 0.5, None, 58]


def test_a_refusal_says_what_stands_in_the_way_and_costs_nothing(accounts: SharedAccounts, clock: Clock) -> None:
    both = (Rule("team:a", Limits(rpm=5, tpm=100)), Rule("all", Limits(concurrency=1)))
    running = ask(both, tokens=10)
    expected = (
        Standing("team:a", "rpm", 5, 1, 0, 60),
        Standing("team:a", "tpm", 100, 0, 10, 0),
        Standing("all", "concurrency", 1, 0, 1, 0),
    )
    assert accounts.admit(running, 0) == Decision(None, expected)
    assert accounts.admit(ask(both, tokens=10), 0) == Decision(Denial(expected[2], 1), expected)
    assert accounts.standings(both, START) == expected
    clock.now += 1
    accounts.settle(end(running, tokens=30), 0)
    clock.now += 1
    assert accounts.standings(both, START) == (
        Standing("team:a", "rpm", 5, 1, 0, 58),
        Standing("team:a", "tpm", 100, 30, 0, 59),
        Standing("all", "concurrency", 1, 0, 0, 0),
    )


def test_a_burst_and_then_evenly(accounts: SharedAccounts, clock: Clock) -> None:
    pace = rules(rps=2, burst=3)
    assert [accounts.admit(ask(pace), 0).denial for _ in range(3)] == [None] * 3
    assert wait_of(accounts.admit(ask(pace), 0)) == 0.5
    clock.now += 0.5
    assert accounts.admit(ask(pace), 0) == Decision(None, (Standing("key:1", "rps", 3, 3, 0, 1.5),))


def test_a_pace_that_is_kept_is_never_refused(accounts: SharedAccounts, clock: Clock) -> None:
    """Not by what floats make of it, either."""
    pace = rules(rps=1.7, burst=1)
    used = []
    for count in range(5):
        clock.now = START + count / 1.7
        decision = accounts.admit(ask(pace), 0)
        used.append((decision.denial, decision.standings[0].used))
    assert used == [(None, 1)] * 5


def test_tokens_leave_as_they_came(accounts: SharedAccounts, clock: Clock) -> None:
    """Each wait is for as many of the oldest entries as are in the way; what is held may be in the way for ever."""
    limit = rules(tpm=100)
    for tokens in (10, 20, 30, 40):
        asked = ask(limit)
        assert not accounts.admit(asked, 0).denial
        accounts.settle(end(asked, tokens), 0)
        clock.now += 1
    waits = {need: wait_of(accounts.admit(ask(limit, need, is_bound=True), 0)) for need in (1, 10, 11, 60, 61, 100)}
    assert waits == {1: 56, 10: 56, 11: 57, 60: 58, 61: 59, 100: 59}
    assert wait_of(accounts.admit(ask(limit, 101, is_bound=True), 0)) is None
    clock.now += 70
    running = ask(limit, 50, is_bound=True)
    assert not accounts.admit(running, 0).denial
    assert wait_of(accounts.admit(ask(limit, 51, is_bound=True), 0)) == 60
    small = ask(limit)
    assert not accounts.admit(small, 0).denial
    accounts.settle(end(small, tokens=5), 0)
    clock.now += 1
    assert wait_of(accounts.admit(ask(limit, 50, is_bound=True), 0)) == 59
    assert wait_of(accounts.admit(ask(limit, 51, is_bound=True), 0)) == 60


def test_tokens_of_one_moment(accounts: SharedAccounts) -> None:
    limit = rules(tpm=1000)
    asked = [ask(limit) for _ in range(3)]
    for each in asked:
        accounts.admit(each, 0)
    for each, tokens in zip(asked, (5, 10, 300), strict=True):
        accounts.settle(end(each, tokens), 0)
    assert accounts.standings(limit, START)[0].used == 315


def test_a_clock_that_is_put_back(accounts: SharedAccounts, clock: Clock) -> None:
    limit = rules(tpm=1000)
    for tokens, seconds in ((100, 0), (20, -5), (3, 2)):
        clock.now = START + seconds
        asked = ask(limit)
        accounts.admit(asked, 0)
        accounts.settle(end(asked, tokens), 0)
        clock.now += 1
    assert accounts.standings(limit, START)[0].used == 123


def test_a_budget_counts_what_is_held_and_tells_when_it_is_nearly_and_when_it_is_used_up(
    accounts: SharedAccounts, clock: Clock
) -> None:
    budgets = (Budget("day", money=0.001), Budget("total", tokens=10))
    limit = rules(budgets=budgets)
    running = ask(limit, tokens=10, micros=600, is_bound=True)
    assert not accounts.admit(running, 0).denial
    assert accounts.admit(ask(limit, micros=500, is_bound=True), 0).denial == Denial(
        Standing("key:1", "budget", 1000, 0, 600, TO_MIDNIGHT, "day", "money"), 1
    )
    assert accounts.settle(end(running, tokens=8, micros=1000), 0) == [
        LimitEvent("2026-11-21T12:00:00.000Z", "key:1", "day", "money", 0.8, 1000, 1000),
        LimitEvent("2026-11-21T12:00:00.000Z", "key:1", "day", "money", 1, 1000, 1000),
        LimitEvent("2026-11-21T12:00:00.000Z", "key:1", "total", "tokens", 0.8, 10, 8),
    ]
    clock.now += 2
    assert wait_of(accounts.admit(ask(limit), 0)) == TO_MIDNIGHT - 2


def test_each_gives_back_what_it_held(accounts: SharedAccounts) -> None:
    limit = rules(tpm=1000, concurrency=5, budgets=(Budget("day", money=1), Budget("day", tokens=1000)))
    asked = [ask(limit, tokens, micros) for tokens, micros in ((100, 7000), (20, 800), (3, 90))]
    for each in asked:
        assert not accounts.admit(each, 0).denial
    held = []
    for each in asked:
        accounts.settle(end(each), 0)
        held.append([standing.held for standing in accounts.standings(limit, START)])
    assert held == [[2, 23, 890, 23], [1, 3, 90, 3], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "nothing",
    [{"rpm": 0}, {"rps": 0}, {"rps": 1, "burst": 0}, {"tpm": 0}, {"concurrency": 0}, {"budgets": (Budget("day", 0),)}],
    ids=str,
)
def test_nothing_is_allowed(accounts: SharedAccounts, nothing: dict[str, object]) -> None:
    assert wait_of(accounts.admit(ask(rules(**nothing)), 0)) is None


def test_large_amounts_are_exact(accounts: SharedAccounts) -> None:
    most = 10**12
    limit = rules(tpm=most, budgets=(Budget("total", tokens=most),))
    first = ask(limit)
    assert not accounts.admit(first, 0).denial
    accounts.settle(end(first, tokens=most - 1), 0)
    assert not accounts.admit(ask(limit, 1, is_bound=True), 0).denial
    assert accounts.admit(ask(limit, 1, is_bound=True), 0).denial


def test_asked_twice_it_happens_once(accounts: SharedAccounts) -> None:
    """The answer may have been lost on its way: the same question has the same answer."""
    limit = rules(rpm=5, concurrency=5, budgets=(Budget("day", tokens=100),))
    asked = ask(limit, tokens=10)
    assert accounts.admit(asked, 0) == accounts.admit(asked, 0)
    assert [each.used + each.held for each in accounts.standings(limit, START)] == [1, 1, 10]
    events = accounts.settle(end(asked, tokens=85), 0)
    assert [event.share for event in events] == [0.8]
    assert accounts.settle(end(asked, tokens=85), 0) == events
    assert [each.used + each.held for each in accounts.standings(limit, START)] == [0, 1, 85]


def test_an_admission_that_comes_after_its_end_is_none(accounts: SharedAccounts) -> None:
    """It was on its way for so long that nobody waited any more."""
    limit = rules(concurrency=1)
    late = ask(limit)
    accounts.settle(end(late, was_served=False), 0)
    with pytest.raises(CountersUnavailable, match="given up"):
        accounts.admit(late, 0)
    assert not accounts.admit(ask(limit), 0).denial


def test_a_request_that_no_server_got_costs_none(accounts: SharedAccounts) -> None:
    limit = rules(rpm=1)
    for _ in range(3):
        asked = ask(limit)
        assert not accounts.admit(asked, 0).denial
        accounts.settle(end(asked, was_served=False), 0)


def test_what_stays_in_redis(server: RedisServer, accounts: SharedAccounts) -> None:
    """One entry per request, whatever it used; all of it runs out but what has to stay."""
    limit = rules(rpm=5, rps=5, tpm=10**9, concurrency=5, budgets=(Budget("day", tokens=10**9),))
    done, running = ask(limit, tokens=5, worker="one"), ask(limit, tokens=5, worker="two")
    accounts.renew("one", 15)
    for each in (done, running):
        assert not accounts.admit(each, 0).denial
    accounts.settle(end(done, tokens=1_000_000), 0)
    with server.client() as client:
        found = {key: client.ttl(key) for key in client.scan_iter()}
        assert client.zcard("llmproxy:tokens:key:1") == 1
    days = 40 * 24 * 3600
    most = {
        "llmproxy:requests:key:1": 70,
        "llmproxy:tokens:key:1": 70,
        "llmproxy:pace:key:1": 61,
        "llmproxy:spend:key:1:day:2026-11-21": days,
        "llmproxy:spend:key:1:week:2026-11-16": days,
        "llmproxy:spend:key:1:month:2026-11-01": days,
        "llmproxy:lease:one": 15,
        f"llmproxy:settled:{done.id}": 3600,
    }
    for_ever = {
        "llmproxy:spend:key:1:total:",
        "llmproxy:counts:key:1",
        f"llmproxy:held:{running.id}",
        "llmproxy:holds:two",
        "llmproxy:workers",
    }
    assert {key for key, ttl in found.items() if ttl == -1} == for_ever
    assert {key for key, ttl in found.items() if ttl != -1} == set(most)
    assert all(most[key] - 10 <= ttl <= most[key] for key, ttl in found.items() if ttl != -1), found
    accounts.settle(end(running, tokens=5), 0)
    accounts.give_back("two")
    with server.client() as client:
        left = {key for key in client.scan_iter() if client.ttl(key) == -1}
    assert left == {"llmproxy:spend:key:1:total:", "llmproxy:workers"}


def test_only_workers_without_a_lease_are_dead(accounts: SharedAccounts, clock: Clock) -> None:
    limit = rules(rpm=1000, concurrency=600)
    for worker, count in (("alive", 1), ("dead", 450)):
        for _ in range(count):
            assert not accounts.admit(ask(limit, worker=worker), 0).denial
    assert accounts.renew("alive", 15).had is False
    lease = accounts.renew("alive", 15)
    assert (lease.had, lease.dead) == (True, ("dead",))
    assert [accounts.give_back(worker) for worker in ("alive", "dead", "dead", "unheard of")] == [0, 450, 0, 0]
    assert [(each.used, each.held) for each in accounts.standings(limit, START)] == [(0, 1), (451, 0)]
    assert accounts.renew("alive", 15).dead == ()
    accounts.leave("alive")
    assert [(each.used, each.held) for each in accounts.standings(limit, START)] == [(0, 0), (451, 0)]


def test_the_time_is_that_of_redis(server: RedisServer, accounts: SharedAccounts) -> None:
    """Machines whose clocks are wrong agree."""
    limit = rules(rpm=1)
    ours = SharedAccounts(server.url)
    assert not ours.admit(ask(limit), now=5).denial
    assert 59 < (wait_of(ours.admit(ask(limit), now=10**6)) or 0) <= 60
    ours.close()


# Fifty threads that all ask at once; prints how many were let in.
CROWD = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from gateway.limits import Limits, Rule
from gateway.quota import Ask
from gateway.records import uuid7
from gateway.shared_accounts import SharedAccounts
accounts = SharedAccounts(sys.argv[1])
rules = (Rule("key:1", Limits(rpm=5)), Rule("all", Limits(rpm=1000)))
ready = threading.Barrier(50)
def call(_):
    ready.wait()
    return accounts.admit(Ask(uuid7(), sys.argv[2], "2026-11-21", rules), 0).denial is None
with ThreadPoolExecutor(50) as crowd:
    print(sum(crowd.map(call, range(50))))
"""


def test_exact_over_processes_and_threads(server: RedisServer, accounts: SharedAccounts) -> None:
    crowds = [
        subprocess.Popen(
            [sys.executable, "-c", CROWD, server.url, name],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(Path(__file__).parents[1] / "addon")},
        )
        for name in ("one", "two")
    ]
    let_in = [int(crowd.communicate(timeout=60)[0]) for crowd in crowds]
    assert sum(let_in) == 5
    standing = SharedAccounts(server.url).standings((Rule("all", Limits(rpm=1000)),), time.time())
    assert standing[0].used == 5, "a refusal costs none"
