"""usage.db's tables: their columns are the contract's, and what the roll-ups add up to is what the rows say."""

import random
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from gateway import schema
from gateway.records import Row

CONTRACT = {
    "id": "TEXT",
    "started_at": "TEXT",
    "key_id": "INTEGER",
    "key_name": "TEXT",
    "model": "TEXT",
    "served_model": "TEXT",
    "server": "TEXT",
    "endpoint": "TEXT",
    "stream": "INTEGER",
    "status": "INTEGER",
    "outcome": "TEXT",
    "prompt_tokens": "INTEGER",
    "cached_tokens": "INTEGER",
    "completion_tokens": "INTEGER",
    "reasoning_tokens": "INTEGER",
    "tokens_source": "TEXT",
    "queue_ms": "REAL",
    "ttft_ms": "REAL",
    "duration_ms": "REAL",
    "prompt_ms": "REAL",
    "predicted_ms": "REAL",
    "attempts": "INTEGER",
    "request_bytes": "INTEGER",
    "response_bytes": "INTEGER",
    "client_request_id": "TEXT",
    "team": "TEXT",
    "cost_micros": "INTEGER",
    "currency": "TEXT",
}
OUTCOMES = ["ok", "error", "client_closed", "upstream_cut", "unreachable", "refused", "interrupted"]


def types(db: Database, table: str) -> dict[str, str]:
    # sqlite-utils says FLOAT for what SQLite calls REAL: both have the same affinity.
    return {column.name: column.type.replace("FLOAT", "REAL") for column in db[table].columns}


@pytest.fixture
def db() -> Database:
    db = Database(memory=True)
    schema.usage.apply(db)
    return db


def test_columns_of_the_contract(db: Database) -> None:
    columns = types(db, "requests")
    assert {name: columns.get(name) for name in CONTRACT} == CONTRACT
    assert set(columns) == set(Row.__struct_fields__)
    assert db.table("requests").pks == ["id"]


def test_every_column_has_a_type(db: Database) -> None:
    for table in db.table_names():
        if not table.startswith(("_", "sqlite_")):
            assert set(types(db, table).values()) <= {"TEXT", "INTEGER", "REAL"}, table


@pytest.mark.parametrize("count", range(1, 1 + len(schema.usage.pending(Database(memory=True)))))
def test_each_older_schema_becomes_the_newest(count: int, db: Database) -> None:
    """A file that stopped at any earlier version, with a row in it, has in the end the schema of a new one."""
    older, file = Migrations(schema.usage.name), Database(memory=True)
    older._migrations = schema.usage._migrations[:count]
    older.apply(file)
    file.execute("insert into requests (id, started_at, endpoint, outcome) values ('a', '2026', '/x', 'open')")
    schema.usage.apply(file)
    query = "select type, name, sql from sqlite_master where name not like '%migrations%' order by type, name"
    assert list(file.query(query)) == list(db.query(query))
    assert next(file.query("select id, outcome, model from requests")) == {"id": "a", "outcome": "open", "model": None}
    assert schema.usage.pending(file) == []


def rows(count: int, seed: int = 1) -> list[Row]:
    """Rows of all kinds: known and unknown numbers, outcomes, keys, models, hours."""
    chance = random.Random(seed)

    def maybe[T](value: T) -> T | None:
        return value if chance.random() < 0.7 else None

    return [
        Row(
            id=f"r{number}",
            started_at=f"2026-11-{chance.choice([20, 21])}T{chance.randint(0, 23):02}:30:00.000Z",
            endpoint=chance.choice(["/v1/chat/completions", "/v1/messages/count_tokens", "/v1/responses/input_tokens"]),
            outcome=chance.choice(OUTCOMES),
            worker="w",
            key_id=maybe(chance.randint(1, 3)),
            key_name=maybe(chance.choice(["alice", "bob"])),
            model="anything",
            served_model=maybe(chance.choice(["m", "n"])),
            server=maybe("gpu-1"),
            prompt_tokens=maybe(chance.randint(0, 9000)),
            cached_tokens=maybe(chance.randint(0, 9000)),
            completion_tokens=maybe(chance.randint(0, 900)),
            reasoning_tokens=maybe(chance.randint(0, 90)),
            tokens_source=maybe(chance.choice(["usage", "timings", "counted"])),
            ttft_ms=maybe(chance.choice([0.0, 0.4, 1.0, 12.5, 999.0, 1e9])),
            duration_ms=maybe(float(chance.randint(0, 99))),
            cost_micros=maybe(chance.randint(0, 9_000_000)),
            prompt_ms=maybe(float(chance.randint(0, 99))),
            predicted_ms=maybe(float(chance.choice([0, 7, 99]))),
        )
        for number in range(count)
    ]


def settle(db: Database, row: Row) -> None:
    """As the ledger does it, and nothing else."""
    values: dict[str, Any] = msgspec.structs.asdict(row)
    db.table("requests").insert(values)
    values["ttft_upto_ms"] = schema.ttft_bucket(row.ttft_ms) if row.ttft_ms is not None else None
    for statement in schema.rollup_statements():
        db.execute(statement, values)


@pytest.mark.parametrize("table", schema.ROLLUPS)
def test_rollups_equal_the_rows(table: str, db: Database) -> None:
    for row in rows(400):
        settle(db, row)
    period, _ = schema.ROLLUPS[table]
    length = {"hour": 13, "day": 10}[period]
    ends = {"hour": ":00Z", "day": ""}[period]
    used = "endpoint not like '%_tokens'"
    expected = {
        "requests": "count(*)",
        "ok": "count(*) filter (where outcome = 'ok')",
        "errors": "count(*) filter (where outcome in ('error', 'upstream_cut', 'unreachable', 'interrupted'))",
        "client_closed": "count(*) filter (where outcome = 'client_closed')",
        "refused": "count(*) filter (where outcome = 'refused')",
        "prompt_tokens": f"total(prompt_tokens) filter (where {used})",
        "cached_tokens": f"total(cached_tokens) filter (where {used})",
        "completion_tokens": f"total(completion_tokens) filter (where {used})",
        "reasoning_tokens": f"total(reasoning_tokens) filter (where {used})",
        "counted_requests": "count(*) filter (where tokens_source = 'counted')",
        "timed_tokens": "total(completion_tokens) filter (where predicted_ms > 0)",
        "predicted_ms": "total(predicted_ms) filter (where predicted_ms > 0)",
        "prompt_ms": "total(prompt_ms)",
        "duration_ms": "total(duration_ms)",
        "cost_micros": "total(cost_micros)",
    }
    assert set(expected) == set(schema.ROLLUP_SUMS)
    sums = ", ".join(f"{sql} as {name}" for name, sql in expected.items())
    truth = db.query(
        f"select substr(started_at, 1, {length}) || '{ends}' as {period}, ifnull(key_id, 0) as key_id, "
        f"ifnull(key_name, '(none)') as key_name, ifnull(served_model, '(none)') as model, "
        f"ifnull(server, '(none)') as server, {sums} from requests group by 1, 2, 3, 4, 5 order by 1, 2, 3, 4, 5"
    )
    kept = db.query(f"select * from {table} order by 1, 2, 3, 4, 5")
    assert list(kept) == list(truth)


def test_first_tokens_equal_the_rows(db: Database) -> None:
    for row in rows(400):
        settle(db, row)
    truth = Counter(
        (
            row.started_at[:10],
            row.key_name or "(none)",
            row.served_model or "(none)",
            row.server or "(none)",
            schema.ttft_bucket(row.ttft_ms),
        )
        for row in rows(400)
        if row.ttft_ms is not None
    )
    kept = {tuple(row.values())[:5]: row["requests"] for row in db.query("select * from ttft_daily")}
    assert kept == truth


BUCKETS = [
    (0.0, 1.0),
    (1.0, 1.0),
    (1.1, 1.259),
    (1.259, 1.259),
    (1.26, 1.585),
    (10.0, 10.0),
    (99.9, 100.0),
    (100.1, 125.893),
    (1e9, 1e8),
]


@pytest.mark.parametrize(("ttft_ms", "upto_ms"), BUCKETS)
def test_buckets(ttft_ms: float, upto_ms: float) -> None:
    assert schema.ttft_bucket(ttft_ms) == upto_ms


def test_running(db: Database) -> None:
    for number, outcome in enumerate(["open", "ok", "open"]):
        db.table("requests").insert(
            {
                "id": f"r{number}",
                "started_at": f"2026-11-21T09:3{2 - number}:00.000Z",
                "endpoint": "/x",
                "outcome": outcome,
            }
        )
    assert [(row["id"], row["running_s"] > 0) for row in db.query("select * from running")] == [
        ("r2", True),
        ("r0", True),
    ]


def test_running_reads_no_more_than_what_runs(db: Database) -> None:
    plan = " ".join(row["detail"] for row in db.query("explain query plan select * from running"))
    assert "requests_open" in plan


def test_a_real_file_takes_it(tmp_path: Path) -> None:
    db = Database(sqlite3.connect(tmp_path / "usage.db"))
    schema.usage.apply(db)
    schema.usage.apply(db)
    assert db["requests"].count == 0
    db.close()
