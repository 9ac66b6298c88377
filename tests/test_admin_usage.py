"""GET /admin/usage over books that are known to the last row: filters, pages, sums, and times as people write them."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlite_utils import Database

from gateway.admin.api import Admin
from gateway.admin.desk import Room
from gateway.books import Books
from gateway.changes import ReloadReport
from gateway.config import parse
from gateway.database import open_database
from gateway.keys_schema import open_keys
from gateway.quota import Standing
from gateway.routing import Router
from gateway.schema import usage

CONFIG = """
admin_key: k
servers: [{name: gpu-1, url: http://h1, models: [qwen]}, {name: gpu-2, url: http://h2, models: [llama]}]
"""
REPORT = ReloadReport("2026-11-21T10:00:00.000Z", True)
# id, started_at, key, model, served_model, server, endpoint, prompt, completion, micros
ROWS: list[tuple[Any, ...]] = [
    ("a", "2026-11-01T00:00:00.000Z", 1, "fast", "qwen", "gpu-1", "/v1/chat/completions", 10, 5, 1_500_000),
    ("b", "2026-11-01T23:59:59.500Z", 1, "qwen", "qwen", "gpu-1", "/v1/chat/completions", 20, None, None),
    ("c", "2026-11-02T12:00:00.000Z", 2, "llama", "llama", "gpu-2", "/v1/chat/completions", 100, 50, 0),
    ("d", "2026-11-02T12:00:00.000Z", 2, "llama", "llama", "gone", "/v1/messages/count_tokens", 999, None, None),
    ("e", "2026-11-03T00:00:00.000Z", 1, None, None, None, "/v1/models", None, None, None),
    ("f", "2026-11-03T00:00:00.001Z", 2, "nope", None, None, "/v1/chat/completions", None, None, None),
]


class NoLimits:
    async def standings(self, rules: Any) -> tuple[Standing, ...]:
        return ()


class Broken:
    async def standings(self, rules: Any) -> tuple[Standing, ...]:
        raise ZeroDivisionError


async def nothing_new(reason: str) -> ReloadReport:
    return REPORT


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[Admin]:
    db = open_database(tmp_path / "usage.db", usage, busy_timeout_s=1)
    for row_id, at, key, model, served, server, endpoint, prompt, completion, micros in ROWS:
        db.table("requests").insert(
            {
                "id": row_id,
                "started_at": at,
                "key_id": key,
                "key_name": f"key-{key}",
                "model": model,
                "served_model": served,
                "server": server,
                "endpoint": endpoint,
                "outcome": "ok",
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "cost_micros": micros,
                "currency": None if micros is None else "EUR",
            }
        )
    open_keys(tmp_path / "keys.db").close()
    config = parse(CONFIG, tmp_path, {})
    yield Admin(
        Room(
            declared=config,
            keys_db=tmp_path / "keys.db",
            books=Books(tmp_path / "usage.db"),
            router=Router(config),
            waiting=lambda: 0,
            limiter=NoLimits(),
            report=lambda: REPORT,
            reload=nothing_new,
        )
    )
    db.close()


async def get(admin: Admin, target: str) -> Any:
    reply = await admin.answer("GET", target, b"", "127.0.0.1")
    assert reply.status == 200, reply.body
    return msgspec.json.decode(reply.body)


async def test_books_that_can_t_be_read_are_a_clear_answer(admin: Admin, tmp_path: Path) -> None:
    (tmp_path / "usage.db").unlink()
    reply = await admin.answer("GET", "/admin/usage", b"", "127.0.0.1")
    assert (reply.status, reply.headers["retry-after"]) == (503, "5")
    assert msgspec.json.decode(reply.body)["detail"] == "Use can't be read at the moment."


async def test_a_fault_is_an_answer_too(admin: Admin, caplog: pytest.LogCaptureFixture) -> None:
    admin.room.limiter = Broken()
    reply = await admin.answer("GET", "/admin/limits", b"", "127.0.0.1")
    assert (reply.status, msgspec.json.decode(reply.body)["error"]["code"]) == (500, "internal_error")
    assert "a fault in the admin API" in caplog.text


FILTERS = [
    ("", "fdcba"),
    ("key_id=1", "ba"),
    ("key_id=3", ""),
    ("server_id=1", "ba"),
    ("server_id=2", "c"),
    ("server_id=99", ""),
    ("key_id=1&server_id=2", ""),
    ("start_date=2026-11-02", "fdc"),
    ("end_date=2026-11-01", "ba"),
    ("end_date=2026-11-01T23:59:59", "ba"),
    ("end_date=2026-11-01T23:59:59.499Z", "a"),
    ("start_date=2026-11-02T12:00:00Z&end_date=2026-11-02T12:00:00Z", "dc"),
    ("start_date=2026-11-02T14:00:00%2B02:00", "fdc"),
    ("start_date=2026-11-02T14:00:00+02:00", "fdc"),
    ("start_date=2026-11-02 12:00:00", "fdc"),
    ("start_date=2026-11-02T12:00:00.001", "f"),
    ("limit=2", "fd"),
    ("limit=2&offset=2", "cb"),
    ("limit=2&offset=4", "a"),
    ("offset=5", ""),
]


@pytest.mark.parametrize(("query", "ids"), FILTERS, ids=[query or "all" for query, _ in FILTERS])
async def test_filters_and_pages(admin: Admin, query: str, ids: str) -> None:
    """The newest first. What the gateway answers by itself (e) is no use of a model."""
    found = await get(admin, f"/admin/usage?{query}")
    assert "".join(log["id"] for log in found["logs"]) == ids


async def test_the_total_is_of_all_pages(admin: Admin) -> None:
    found = await get(admin, "/admin/usage?key_id=2&limit=1")
    assert (len(found["logs"]), found["total"]) == (1, 3)


async def test_a_log(admin: Admin) -> None:
    (log,) = (await get(admin, "/admin/usage?limit=1&offset=4"))["logs"]
    assert {name: value for name, value in log.items() if value is not None} == {
        "id": "a",
        "key_id": 1,
        "server_id": 1,
        "model_name": "fast",
        "real_model_name": "qwen",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "total_tokens": 15,
        "created_at": "2026-11-01T00:00:00.000Z",
        "user_name": "key-1",
        "server_name": "gpu-1",
        "endpoint": "/v1/chat/completions",
        "outcome": "ok",
        "cost": 1.5,
        "currency": "EUR",
    }


COUNTED = {"requests": 9, "tokens": 9, "held_tokens": 0, "held_micros": 0, "tat": 0.0}
CALLER = {"declared": False, "team": None, "limits": None, "requests": 0, "tokens": 0}
STORAGES = {
    "local": [{**CALLER, "source": "file", "name": "a/b", "running": 2}],
    "redis://127.0.0.1": [],  # what the books know is of another time
}


@pytest.mark.parametrize(("storage", "callers"), STORAGES.items(), ids=STORAGES)
async def test_callers_that_the_counters_know(
    admin: Admin, tmp_path: Path, storage: str, callers: list[dict[str, Any]]
) -> None:
    """Not those of keys.db, nor of sources that are gone. What left the last 60 seconds is not counted."""
    with closing(Database(tmp_path / "usage.db")) as db:
        for scope in ("all", "team:a/b", "key:3", "key:file/a/b", "key:gone/a"):
            db.table("limit_counters").insert({"scope": scope, "running": 2, **COUNTED})
            db.table("limit_log").insert({"scope": scope, "at": 1.0, "id": "1", "requests": 9, "tokens": 9})
    auth = "auth: {sources: [{type: local}, {type: file, path: keys.yaml}]}"
    admin.reconfigure(parse(f"{CONFIG}{auth}\nlimits: {{storage: '{storage}'}}", tmp_path, {}))
    assert (await get(admin, "/admin/limits"))["callers"] == callers


async def test_a_server_that_is_gone_keeps_its_name(admin: Admin) -> None:
    log = (await get(admin, "/admin/usage?limit=1&offset=1"))["logs"][0]
    assert (log["server_name"], log["server_id"]) == ("gone", None)


async def test_sums(admin: Admin) -> None:
    """The prompt that was only counted (d) is no use; unknown tokens add nothing. What has no price has no cost."""
    assert (await get(admin, "/admin/usage"))["summary"] == [
        summary("key-2", "llama", "llama", 2, 100, 50, 0),
        summary("key-1", "qwen", "qwen", 1, 20, 0, None),
        summary("key-1", "fast", "qwen", 1, 10, 5, 1.5),
        summary("key-2", "nope", None, 1, 0, 0, None),
    ]


async def test_sums_by_model_and_server(admin: Admin) -> None:
    found = await get(admin, "/admin/usage/summary/real?key_id=1&limit=1")
    assert found == [
        {
            "real_model_name": "qwen",
            "server_id": 1,
            "server_name": "gpu-1",
            "request_count": 2,
            "total_prompt_tokens": 30,
            "total_completion_tokens": 5,
            "total_all_tokens": 35,
            "cost": 1.5,
        }
    ]
    rest = await get(admin, "/admin/usage/summary/real?offset=1")
    assert [(each["real_model_name"], each["server_name"]) for each in rest] == [
        ("qwen", "gpu-1"),
        ("llama", "gone"),
        (None, None),
    ]


def summary(
    key: str, model: str, served: str | None, count: int, prompt: int, completion: int, cost: float | None
) -> dict[str, Any]:
    return {
        "key_name": key,
        "model_name": model,
        "real_model_name": served,
        "request_count": count,
        "total_prompt_tokens": prompt,
        "total_completion_tokens": completion,
        "total_all_tokens": prompt + completion,
        "cost": cost,
    }
