"""GET /v1/usage: what a key's holder is told of their own use, limits and budgets."""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlite_utils import Database

from conftest import StartProxy
from gateway.auth import Caller
from gateway.books import Books
from gateway.limits import Rule
from gateway.prices import Price, Prices
from gateway.quota import CountersUnavailable, Standing
from gateway.replies import Refusal
from gateway.schema import rollup_statements, usage
from gateway.self_service import MAX_DAYS, SelfService
from llama import LlamaServer
from proxy import Key

NOW = "2026-11-21T23:59:59.999Z"
ALICE = Caller(key_id=3, key_name="alice", models=(), team="research")
CI = Caller(key_id=None, key_name="ci", models=(), source="static")
MODEL = "qwen3-8b"
PRICES = Prices("EUR", {MODEL: Price()})

# What was used: (day, key_id, key_name, model, server, prompt, cached, completion, cost_micros)
SETTLED = [
    ("2026-11-21", 3, "alice", MODEL, "gpu-1", 100, 80, 10, 2_500_000),
    ("2026-11-21", 3, "alice", MODEL, "gpu-2", 50, 0, 5, 1),
    ("2026-11-21", 3, "alice", None, None, None, None, None, None),
    ("2026-11-21", 3, "alice", None, "gpu-1", None, None, None, None),
    ("2026-11-20", 3, "alice", None, None, None, None, None, None),
    ("2026-11-21", 3, "alice", "embed", "gpu-1", 7, None, None, None),
    ("2026-11-20", 3, "alice", MODEL, "gpu-1", 1, 0, 1, 0),
    ("2026-10-22", 3, "alice", MODEL, "gpu-1", 2, 0, 2, 0),
    ("2026-10-21", 3, "alice", MODEL, "gpu-1", 3, 0, 3, 0),
    ("2026-11-21", 3, "her-namesake-of-an-older-keys.db", MODEL, "gpu-1", 999, 0, 999, 9),
    ("2026-11-21", 4, "alice", MODEL, "gpu-1", 999, 0, 999, 9),
    ("2026-11-21", None, "alice", MODEL, "gpu-1", 999, 0, 999, 9),
    ("2026-11-21", None, "ci", MODEL, "gpu-1", 40, 0, 4, 0),
]


class Standings:
    """A limiter with this to say."""

    def __init__(self, *standings: Standing) -> None:
        self._standings = standings

    async def standings(self, rules: Sequence[Rule], /) -> tuple[Standing, ...]:
        return self._standings


class NoCounters:
    """A limiter whose counters are away."""

    async def standings(self, rules: Sequence[Rule], /) -> tuple[Standing, ...]:
        raise CountersUnavailable("nobody is there")


@pytest.fixture
def books(tmp_path: Path) -> Books:
    path = tmp_path / "usage.db"
    with closing(Database(path)) as db:
        usage.apply(db)
        columns = [column.name for column in db.table("requests").columns]
        for day, key_id, name, model, server, prompt, cached, completion, micros in SETTLED:
            row = dict.fromkeys(columns) | {
                "started_at": f"{day}T00:00:00.000Z",
                "key_id": key_id,
                "key_name": name,
                "served_model": model,
                "server": server,
                "endpoint": "/v1/chat/completions",
                "outcome": "refused" if (day, model, server) == ("2026-11-21", None, None) else "ok",
                "prompt_tokens": prompt,
                "cached_tokens": cached,
                "completion_tokens": completion,
                "cost_micros": micros,
            }
            for statement in rollup_statements():
                db.execute(statement, row | {"ttft_upto_ms": None})
        db.conn.commit()
    return Books(path)


async def told(books: Books, caller: Caller, query: str = "", *standings: Standing) -> dict[str, Any]:
    answer = await SelfService(books, Standings(*standings), lambda: NOW).usage(caller, (), query, PRICES)
    read: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(answer))
    return read


def day(day: str, model: str | None, *amounts: float | None) -> dict[str, Any]:
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost")
    return {"day": day, "model": model, **dict(zip(names, amounts, strict=True))}


OLDEST = day("2026-10-21", MODEL, 1, 3, 0, 3, 0)
TODAY = [
    day("2026-11-21", None, 2, 0, 0, 0, None),  # one was refused, one went to a server; our own answer is none
    day("2026-11-21", "embed", 1, 7, 0, 0, None),
    day("2026-11-21", MODEL, 2, 150, 80, 15, 2.500001),
]
LAST_31 = [day("2026-10-22", MODEL, 1, 2, 0, 2, 0), day("2026-11-20", MODEL, 1, 1, 0, 1, 0), *TODAY]


@pytest.mark.parametrize(
    ("caller", "query", "days"),
    [
        pytest.param(ALICE, "", LAST_31, id="31 days, today with them"),
        pytest.param(ALICE, "days=31", LAST_31, id="31 days"),
        pytest.param(ALICE, "days=32", [OLDEST, *LAST_31], id="32 days"),
        pytest.param(ALICE, "days=1", TODAY, id="today"),
        pytest.param(ALICE, "days=001", TODAY, id="today, with zeros"),
        pytest.param(ALICE, f"days={MAX_DAYS}", [OLDEST, *LAST_31], id="a leap year"),
        pytest.param(CI, "", [day("2026-11-21", MODEL, 1, 40, 0, 4, 0)], id="a key of another source"),
        pytest.param(Caller(5, "alice", ()), "", [], id="a name that came again has nothing of before"),
    ],
)
async def test_use_by_day_and_model(books: Books, caller: Caller, query: str, days: list[dict[str, Any]]) -> None:
    assert await told(books, caller, query) == {
        "object": "usage",
        "key": {"name": caller.key_name, "team": caller.team},
        "currency": "EUR",
        "limits": [],
        "budgets": [],
        "days": days,
    }


@pytest.mark.parametrize(
    "query",
    ["days=0", "days=367", "days=", "days=-1", "days=1.5", "days=x", "days=٣", "days=1&days=2", "days=99999999999"],
)
async def test_days_that_are_none(books: Books, query: str) -> None:
    with pytest.raises(Refusal) as refused:
        await told(books, ALICE, query)
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "invalid_request", "days")


@pytest.mark.parametrize(("query", "param"), [("key=bob", "key"), ("days=1&key_id=4", "key_id"), ("Days=1", "Days")])
async def test_what_else_is_asked_for(books: Books, query: str, param: str) -> None:
    with pytest.raises(Refusal) as refused:
        await told(books, ALICE, query)
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "invalid_request", param)
    assert "There is: days." in refused.value.message


@pytest.mark.parametrize(
    ("standing", "limit"),
    [
        pytest.param(
            Standing("key:3", "rpm", 60, 12, reset_s=41.237),
            {"scope": "key", "name": "alice", "limit": "rpm", "allowed": 60, "used": 12, "held": 0, "left": 48}
            | {"resets_in_s": 41.2},
            id="a rate of the key",
        ),
        pytest.param(
            Standing("key:static/ci", "concurrency", 2, 0, 2),
            {"scope": "key", "name": "alice", "limit": "concurrency", "allowed": 2, "used": 0, "held": 2, "left": 0}
            | {"resets_in_s": 0},
            id="all that may run runs",
        ),
        pytest.param(
            Standing("key:3", "rpm", 6.0, 1.0, 0.0, reset_s=1.0),
            {"scope": "key", "name": "alice", "limit": "rpm", "allowed": 6, "used": 1, "held": 0, "left": 5}
            | {"resets_in_s": 1},
            id="counters that know no whole numbers",
        ),
        pytest.param(
            Standing("team:a:b", "tpm", 1000, 900, 200, reset_s=60),
            {"scope": "team", "name": "a:b", "limit": "tpm", "allowed": 1000, "used": 900, "held": 200, "left": 0}
            | {"resets_in_s": 60},
            id="no less than nothing is left",
        ),
        pytest.param(
            Standing("all", "rps", 10, 1, reset_s=0.1),
            {"scope": "all", "name": None, "limit": "rps", "allowed": 10, "used": 1, "held": 0, "left": 9}
            | {"resets_in_s": 0.1},
            id="of everybody",
        ),
    ],
)
async def test_limits(books: Books, standing: Standing, limit: dict[str, Any]) -> None:
    answer = await told(books, ALICE, "", standing)
    assert (answer["limits"], answer["budgets"]) == ([limit], [])
    assert {type(answer["limits"][0][name]) for name in ("allowed", "used", "held", "left")} == {int}


BUDGET: dict[str, Any] = {"scope": "team", "name": "research"}


@pytest.mark.parametrize(
    ("standing", "budget"),
    [
        pytest.param(
            Standing("team:research", "budget", 5_000_000.0, 1_000_000.0, 500.0, 864000.04, "month", "tokens"),
            {"per": "month", "unit": "tokens", "allowed": 5_000_000, "used": 1_000_000, "held": 500, "left": 3_999_500}
            | {"resets_at": "2026-12-01T00:00:00Z", "resets_in_s": 864000.0},
            id="tokens of a month",
        ),
        pytest.param(
            Standing("team:research", "budget", 2_500_000, 1_000_001, 250_000, 0.001, "day", "money"),
            {"per": "day", "unit": "money", "allowed": 2.5, "used": 1.000001, "held": 0.25, "left": 1.249999}
            | {"resets_at": "2026-11-22T00:00:00Z", "resets_in_s": 0.0},
            id="money of a day, in units of the currency",
        ),
        pytest.param(
            Standing("team:research", "budget", 10, 30, 0, 86400, "week", "tokens"),
            {"per": "week", "unit": "tokens", "allowed": 10, "used": 30, "held": 0, "left": 0}
            | {"resets_at": "2026-11-23T00:00:00Z", "resets_in_s": 86400},
            id="overdrawn, until Monday",
        ),
        pytest.param(
            Standing("team:research", "budget", 10, 3, 0, None, "total", "tokens"),
            {"per": "total", "unit": "tokens", "allowed": 10, "used": 3, "held": 0, "left": 7}
            | {"resets_at": None, "resets_in_s": None},
            id="in total: it never resets",
        ),
    ],
)
async def test_budgets(books: Books, standing: Standing, budget: dict[str, Any]) -> None:
    answer = await told(books, ALICE, "", standing)
    assert (answer["limits"], answer["budgets"]) == ([], [BUDGET | budget])
    kind = int if budget["unit"] == "tokens" else float
    assert {type(answer["budgets"][0][name]) for name in ("allowed", "used", "held", "left")} == {kind}


async def test_counters_that_are_away_are_a_503(books: Books) -> None:
    with pytest.raises(Refusal) as refused:
        await SelfService(books, NoCounters(), lambda: NOW).usage(ALICE, (), "", PRICES)
    assert (refused.value.status, refused.value.code) == (503, "limits_unavailable")


async def test_books_that_can_not_be_read_are_a_503(tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        await told(Books(tmp_path / "usage.db"), ALICE)
    assert (refused.value.status, refused.value.code) == (503, "ledger_unavailable")


def test_each_key_sees_its_own(start_proxy: StartProxy, tiny: LlamaServer) -> None:
    proxy = start_proxy([{"name": "gpu", "url": tiny.url, "models": ["tiny"]}])
    alice, bob = proxy.create_key("alice"), proxy.create_key("bob")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    with proxy.client(alice) as client:
        client.post("/v1/chat/completions", json=body).raise_for_status()
        answer = client.get("/v1/usage?days=7")
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        row = proxy.rows()[0]
        today = row["started_at"][:10]
        expected = day(today, "tiny", 1, row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"], None)
        assert answer.json()["key"] == {"name": "alice", "team": None}
        assert answer.json()["days"] == [expected]
        # The question is itself in the books, and no use of anything.
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/usage").json()["days"] == [expected]
        assert len(proxy.rows()) == 4
        assert client.get("/v1/usage?days=0").json()["error"]["param"] == "days"
        assert client.get("/v1/usage").json()["days"] == [day(today, None, 1, 0, 0, 0, None), expected]
        posted = client.post("/v1/usage", json={})
        assert (posted.status_code, posted.headers["allow"]) == (405, "GET, HEAD")
    with proxy.client(bob) as client:
        assert client.get("/v1/usage").json()["days"] == []
    with proxy.client() as client:
        assert client.get("/v1/usage").status_code == 401


def test_a_key_of_another_source_and_a_limit_of_each_model(start_proxy: StartProxy, tiny: LlamaServer) -> None:
    ci = Key(0, "ci", "a-key-of-the-config-file-0123456789")
    hashed = hashlib.sha256(ci.key.encode()).hexdigest()
    source = {"type": "static", "keys": [{"name": ci.name, "sha256": hashed, "models": ["tiny"]}]}
    proxy = start_proxy(
        [{"name": "gpu", "url": tiny.url, "models": ["tiny", "other"]}],
        auth={"sources": [{"type": "local"}, source]},
        limits={"models": {"*": {"concurrency": 3}}, "key": {"rpm": 5}},
    )
    local = proxy.create_key("ci")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    with proxy.client(ci) as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        told = client.get("/v1/usage").json()
    assert [(each["model"], each["requests"]) for each in told["days"]] == [("tiny", 1)]
    limits = [(each["scope"], each["name"], each["limit"], each["used"], each["left"]) for each in told["limits"]]
    assert limits == [("key", "ci", "rpm", 1, 4), ("model", "tiny", "concurrency", 0, 3)]
    with proxy.client(local) as client:  # of the same name, and yet another one
        told = client.get("/v1/usage").json()
    limits = [(each["scope"], each["name"], each["limit"], each["used"], each["left"]) for each in told["limits"]]
    assert told["days"] == []
    assert limits == [
        ("key", "ci", "rpm", 0, 5),
        ("model", "other", "concurrency", 0, 3),
        ("model", "tiny", "concurrency", 0, 3),
    ]
