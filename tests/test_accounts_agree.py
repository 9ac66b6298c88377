"""The counters in SQLite, those in Redis and the model of both give the same answers, whatever they are asked."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from counters_model import Model
from databases import Database, RedisServer
from gateway import schema
from gateway.accounts import SqliteAccounts
from gateway.database import open_database
from gateway.limits import Budget, Limits, Rule
from gateway.quota import Accounts, Ask, Settlement
from gateway.records import uuid7
from gateway.shared_accounts import SharedAccounts

# A second before a Sunday, a minute before a Monday, two minutes before a month that begins on a Tuesday.
STARTS = (1795305599.0, 1795391940.0, 1796083080.0)
SCOPES = ("key:1", "team:research", "model:tiny ü:*", "all")


@dataclass(frozen=True)
class Admit:
    tokens: int
    micros: int
    is_bound: bool
    worker: str


@dataclass(frozen=True)
class Settle:
    """One of those that run: the `which`-th oldest."""

    which: int
    tokens: int | None
    micros: int | None
    was_served: bool


@dataclass(frozen=True)
class Wait:
    seconds: float


@dataclass(frozen=True)
class Die:
    worker: str


workers = st.sampled_from(["one", "two"])
MOST = 10**12
amounts = st.sampled_from([0, 1, 2, 3, 5, 10, 50, MOST - 1, MOST])
allowances = st.sampled_from([0, 1, 2, 3, 5, 8, 10, 20, 50, 100, MOST])
budgets = st.builds(
    lambda per, unit, amount: Budget(per, **{unit: amount if unit == "tokens" else amount / 1_000_000}),
    st.sampled_from(["day", "week", "month", "total"]),
    st.sampled_from(["tokens", "money"]),
    allowances,
)
limits = st.builds(
    Limits,
    rpm=st.none() | allowances,
    rps=st.none() | st.sampled_from([0.25, 0.3, 1, 1.7, 4, 0]),
    burst=st.none() | st.sampled_from([1, 2, 3, 5, 0]),
    tpm=st.none() | allowances,
    concurrency=st.none() | allowances,
    budgets=st.lists(budgets, max_size=3, unique_by=lambda budget: (budget.per, budget.unit)).map(tuple),
)
rules = st.lists(
    st.builds(Rule, st.sampled_from(SCOPES), limits), min_size=1, max_size=4, unique_by=lambda rule: rule.scope
)
steps = st.one_of(
    st.builds(Admit, amounts, amounts, st.booleans(), workers),
    st.builds(Settle, st.integers(0, 9), st.none() | amounts, st.none() | amounts, st.booleans()),
    st.builds(Wait, st.sampled_from([0.25, 0.5, 1, 3, 20, 59.75, 60, 61, 86400, 31 * 86400])),
    st.builds(Die, workers),
)


@pytest.fixture
def server(database: Callable[[str], Database]) -> RedisServer:
    server = database("redis")
    assert isinstance(server, RedisServer)
    return server


@pytest.fixture(scope="module")
def usage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    path: Path = tmp_path_factory.mktemp("sqlite") / "usage.db"
    connection = open_database(path, schema.usage, busy_timeout_s=1).conn
    yield connection
    connection.close()


@dataclass
class Together:
    """The same is asked of all of them."""

    model: Model
    sqlite: SqliteAccounts
    redis: SharedAccounts
    now: float

    @property
    def day(self) -> str:
        return datetime.fromtimestamp(self.now, UTC).date().isoformat()

    def same[T](self, ask: Callable[[Accounts], T]) -> T:
        expected = ask(self.model)
        assert ask(self.sqlite) == expected
        assert ask(self.redis) == expected
        return expected

    def die(self, worker: str) -> None:
        self.model.give_back(worker)
        self.sqlite.forget_worker(worker)
        self.redis.give_back(worker)


@settings(
    max_examples=int(os.environ.get("EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    start=st.sampled_from(STARTS),
    before=rules,
    after=rules,
    steps=st.lists(steps, min_size=10, max_size=40),
    change_at=st.integers(0, 40),
)
def test_the_same_answers(
    server: RedisServer,
    usage: sqlite3.Connection,
    start: float,
    before: list[Rule],
    after: list[Rule],
    steps: list[Admit | Settle | Wait | Die],
    change_at: int,
) -> None:
    """Whatever comes, and though the limits change while requests run."""
    with server.client() as client:
        client.flushall()
    usage.execute("begin")
    both = Together(Model(), SqliteAccounts(usage), SharedAccounts(server.url, lambda: both.now), start)
    running: list[Ask] = []
    try:
        for index, step in enumerate(steps):
            now_rules = tuple(before if index < change_at else after)
            running = _do(both, step, now_rules, running)
            both.same(lambda accounts, asked=now_rules: accounts.standings(asked, both.now))  # type: ignore[misc]
    finally:
        usage.rollback()
        both.redis.close()


def _do(both: Together, step: Admit | Settle | Wait | Die, rules: tuple[Rule, ...], running: list[Ask]) -> list[Ask]:
    """Returns what runs then."""
    match step:
        case Admit(tokens, micros, is_bound, worker):
            ask = Ask(uuid7(), worker, both.day, rules, tokens, micros, is_bound)
            decision = both.same(lambda accounts: accounts.admit(ask, both.now))
            return running if decision.denial else [*running, ask]
        case Settle(which, tokens, micros, was_served) if running:
            ask = running[which % len(running)]
            scopes = tuple(rule.scope for rule in ask.rules if not rule.scope.startswith("model:"))
            settlement = Settlement(ask.id, both.day, scopes, ask.rules, tokens, micros, was_served)
            both.same(lambda accounts: accounts.settle(settlement, both.now))
            return [each for each in running if each.id != ask.id]
        case Wait(seconds):
            both.now += seconds
        case Die(worker):
            both.die(worker)
    return running
