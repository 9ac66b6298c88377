"""The ledger: one row per request, whole, once, on disk before anybody is told; nothing lost while the disk fails."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import schema
from gateway.ledger import Ledger
from gateway.limits import Limits, Rule
from gateway.quota import Ask, Settlement
from gateway.records import Row
from waiting import eventually

ADDON = Path(__file__).parents[1] / "addon"
SOON_S = 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "usage.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ledger = Ledger(path)
    yield ledger
    ledger.close()


def row(number: int | str, outcome: str = "open", **more: Any) -> Row:
    fields = {"started_at": "2026-11-21T09:30:00.000Z", "endpoint": "/v1/chat/completions", "worker": "w", **more}
    return Row(id=f"r{number}", outcome=outcome, **fields)


def query(path: Path, sql: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
        db.row_factory = sqlite3.Row
        return [dict(found) for found in db.execute(sql)]


def outcomes(path: Path) -> dict[str, str]:
    return {found["id"]: found["outcome"] for found in query(path, "select id, outcome from requests order by id")}


async def settle(ledger: Ledger, *rows: Row) -> None:
    async with asyncio.timeout(SOON_S):
        await asyncio.gather(*(ledger.settle(row) for row in rows))


async def until(look: Callable[[], bool]) -> None:
    await asyncio.to_thread(eventually, look, within_s=SOON_S)


FULL = Row(
    id="r1",
    started_at="2026-11-21T09:30:00.000Z",
    endpoint="/v1/messages",
    outcome="ok",
    worker="w",
    key_id=1,
    key_name="alice",
    model="fast",
    served_model="m",
    server="gpu-1",
    stream=1,
    status=200,
    error_code="e",
    prompt_tokens=47,
    cached_tokens=46,
    completion_tokens=6,
    reasoning_tokens=0,
    tokens_source="usage",
    queue_ms=0.0,
    ttft_ms=12.5,
    duration_ms=99.25,
    prompt_ms=0.5,
    predicted_ms=1.5,
    attempts=2,
    request_bytes=10,
    response_bytes=20,
    client_request_id="c",
)


async def test_a_row_opens_and_is_settled_whole(ledger: Ledger, path: Path) -> None:
    # What is known at admission does not change, and is not written again.
    opened = msgspec.structs.replace(FULL, outcome="open", status=None, prompt_tokens=None, attempts=1)
    ledger.open(opened)
    await until(lambda: query(path, "select * from requests") == [msgspec.structs.asdict(opened)])
    await settle(ledger, FULL)
    assert query(path, "select * from requests") == [msgspec.structs.asdict(FULL)]
    assert (ledger.healthy, ledger.rows_settled) == (True, 1)


async def test_settled_without_having_been_opened(ledger: Ledger, path: Path) -> None:
    await settle(ledger, FULL)
    assert query(path, "select * from requests") == [msgspec.structs.asdict(FULL)]


async def test_settled_means_on_disk(ledger: Ledger, path: Path) -> None:
    for number in range(20):
        await settle(ledger, row(number, "ok"))
        assert len(outcomes(path)) == number + 1


async def test_settled_twice_the_first_one_stands(ledger: Ledger, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await settle(ledger, row(1, "ok", prompt_tokens=5))
    await settle(ledger, row(1, "error", prompt_tokens=7), row(1, "error", prompt_tokens=9))
    assert query(path, "select outcome, prompt_tokens from requests") == [{"outcome": "ok", "prompt_tokens": 5}]
    assert query(path, "select sum(requests), sum(prompt_tokens) from usage_hourly") == [
        {"sum(requests)": 1, "sum(prompt_tokens)": 5}
    ]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert ledger.rows_settled == 1


async def test_many_at_once_add_up(ledger: Ledger, path: Path) -> None:
    rows = [row(number, "ok", key_name=f"k{number % 3}", prompt_tokens=number, ttft_ms=5.0) for number in range(500)]
    for one in rows:
        ledger.open(msgspec.structs.replace(one, outcome="open"))
    await settle(ledger, *rows)
    assert query(path, "select count(*) n, sum(prompt_tokens) t from requests") == [{"n": 500, "t": 124750}]
    for table in schema.ROLLUPS:
        assert query(path, f"select sum(requests) n, sum(prompt_tokens) t from {table}") == [{"n": 500, "t": 124750}]
    assert query(path, "select sum(requests) n from ttft_daily") == [{"n": 500}]
    assert ledger.rows_settled == 500


def test_close_writes_what_waits(path: Path) -> None:
    ledger = Ledger(path)
    for number in range(200):
        ledger.open(row(number))
    ledger.close()
    assert len(outcomes(path)) == 200
    with pytest.raises(RuntimeError, match="closed"):
        ledger.open(row(1))


async def test_close_writes_what_nobody_waits_for_any_more(path: Path) -> None:
    ledger = Ledger(path)
    futures = [ledger.settle(row(number, "ok")) for number in range(50)]
    for future in futures[:25]:
        future.cancel()
    ledger.close()
    assert list(outcomes(path).values()) == ["ok"] * 50


# -- crashes


def test_what_a_living_worker_has_open_stays_open(path: Path) -> None:
    first = Ledger(path)
    first.open(row(1, worker=first.worker))
    eventually(lambda: outcomes(path))
    second = Ledger(path)
    assert outcomes(path) == {"r1": "open"}
    second.close()
    first.close()
    third = Ledger(path)
    assert outcomes(path) == {"r1": "interrupted"}
    third.close()


CRASH = """
import sys, time
from pathlib import Path
sys.path.insert(0, {addon!r})
from gateway.records import Row
from gateway.ledger import Ledger
ledger = Ledger(Path({path!r}))
for number in range(20):
    ledger.open(Row(id=f"{name}{{number:02}}", started_at="2026-11-21T09:30:00.000Z", endpoint="/x", outcome="open",
                    worker=ledger.worker, key_name="alice", attempts=1))
time.sleep(60)
"""


def crash(path: Path, *names: str) -> None:
    """Workers side by side, each of which opens 20 rows; all are killed once these are written."""
    before = written(path)
    workers = [
        subprocess.Popen([sys.executable, "-c", CRASH.format(addon=str(ADDON), path=str(path), name=name)])
        for name in names
    ]
    eventually(lambda: written(path) == before + 20 * len(names), within_s=SOON_S)
    for worker in workers:
        worker.kill()
        worker.wait()


def written(path: Path) -> int:
    try:
        return len(outcomes(path))
    except sqlite3.OperationalError:  # the file is there, its tables are not yet
        return 0


def test_a_crash_leaves_open_rows_and_the_next_start_marks_them(path: Path) -> None:
    alive = Ledger(path)
    alive.open(row(1, worker=alive.worker))
    eventually(lambda: written(path) == 1)
    crash(path, "a", "b")
    assert set(outcomes(path).values()) == {"open"}
    Ledger(path).close()
    assert outcomes(path) == {"r1": "open"} | {
        f"{name}{number:02}": "interrupted" for name in "ab" for number in range(20)
    }
    assert query(path, "select key_name, requests, errors from usage_hourly") == [
        {"key_name": "alice", "requests": 40, "errors": 40}
    ]
    assert query(path, "select distinct attempts, endpoint from requests where id >= 'a' and id < 'c'") == [
        {"attempts": 1, "endpoint": "/x"}
    ]
    alive.close()


def test_locks_of_the_dead_go(path: Path) -> None:
    crash(path, "a")
    ledger = Ledger(path)
    assert [file.name for file in (path.parent / "workers").iterdir()] == [ledger.worker]
    ledger.close()
    assert list((path.parent / "workers").iterdir()) == []


def test_several_workers_start_at_once_after_a_crash(path: Path) -> None:
    crash(path, "a", "b", "c")
    code = (
        f"import sys; sys.path.insert(0, {str(ADDON)!r})\nfrom pathlib import Path; from gateway.ledger import Ledger\n"
    )
    code += f"Ledger(Path({str(path)!r})).close()"
    workers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [worker.wait(30) for worker in workers] == [0] * 4
    assert list(outcomes(path).values()) == ["interrupted"] * 60
    assert query(path, "select sum(requests) n from usage_daily") == [{"n": 60}]


def test_several_workers_make_the_file_at_once(path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ADDON)!r})\nfrom pathlib import Path; from gateway.ledger import Ledger\n"
    )
    code += "from gateway.records import Row\n"
    code += f"ledger = Ledger(Path({str(path)!r}))\n"
    code += "ledger.open(Row(id=sys.argv[1], started_at='2026', endpoint='/x', outcome='open', worker=ledger.worker))\n"
    code += "ledger.close()"
    workers = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(4)]
    assert [worker.wait(30) for worker in workers] == [0] * 4
    assert sorted(outcomes(path)) == ["0", "1", "2", "3"]


def test_a_killed_writer_loses_nothing_that_was_settled(path: Path) -> None:
    """What a process was told is settled is there after kill -9."""
    code = f"import sys; sys.path.insert(0, {str(ADDON)!r})\n" + (
        "import asyncio\nfrom pathlib import Path\n"
        "from gateway.records import Row\nfrom gateway.ledger import Ledger\n"
        "async def main():\n"
        f"    ledger = Ledger(Path({str(path)!r}))\n"
        "    for number in range(100000):\n"
        "        row = Row(id=f'{number:06}', started_at='2026', endpoint='/x', outcome='ok', worker='w')\n"
        "        await ledger.settle(row)\n"
        "        print(number, flush=True)\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout
        told = [worker.stdout.readline() for _ in range(30)]
        worker.send_signal(signal.SIGKILL)
        told += worker.stdout.readlines()
    assert len(outcomes(path)) >= len([line for line in told if line.endswith("\n")]) >= 30


# -- disk trouble


async def test_a_locked_file_is_waited_for(ledger: Ledger, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("begin immediate")
        futures = [ledger.settle(row(number, "ok", prompt_tokens=1)) for number in range(20)]
        await until(lambda: not ledger.healthy)
        assert not any(future.done() for future in futures)
        futures.append(ledger.settle(row(20, "ok", prompt_tokens=1)))
        other.execute("rollback")
    async with asyncio.timeout(SOON_S):
        await asyncio.gather(*futures)
    assert (ledger.healthy, ledger.rows_settled) == (True, 21)
    assert query(path, "select sum(requests) n, sum(prompt_tokens) t from usage_hourly") == [{"n": 21, "t": 21}]
    # Those who wait are told first.
    eventually(lambda: [record.levelname for record in caplog.records] == ["ERROR", "WARNING"])


async def test_a_full_disk_is_waited_for(ledger: Ledger, path: Path) -> None:
    await settle(ledger, row(0, "ok"))
    connection = ledger._books._db.conn
    (pages,) = connection.execute("pragma page_count").fetchone()
    connection.execute(f"pragma max_page_count = {pages}")
    futures = [ledger.settle(row(number, "ok", model="m" * 2000)) for number in range(1, 51)]
    await until(lambda: not ledger.healthy)
    connection.execute("pragma max_page_count = 1000000")
    async with asyncio.timeout(SOON_S):
        await asyncio.gather(*futures)
    assert ledger.healthy
    assert list(outcomes(path).values()) == ["ok"] * 51
    assert query(path, "select sum(requests) n from usage_hourly") == [{"n": 51}]


POISON = {
    "a number too large": {"prompt_tokens": 2**70},
    "no number": {"prompt_tokens": []},
}


@pytest.mark.parametrize("bad", POISON.values(), ids=POISON)
@pytest.mark.parametrize("place", [0, 5, 9])
async def test_a_row_that_can_never_be_written_does_not_hold_up_the_others(
    place: int, bad: dict[str, Any], ledger: Ledger, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(number, "ok", **(bad if number == place else {})) for number in range(10)]
    async with asyncio.timeout(SOON_S):
        results = await asyncio.gather(*(ledger.settle(one) for one in rows), return_exceptions=True)
    assert [isinstance(result, OSError) for result in results] == [number == place for number in range(10)]
    assert set(outcomes(path)) == {f"r{number}" for number in range(10)} - {f"r{place}"}
    assert ledger.rows_settled == 9
    assert [record.message for record in caplog.records if "LOST" in record.message and f"r{place}" in record.message]


async def test_a_row_that_can_never_be_written_holds_nothing(ledger: Ledger) -> None:
    rules = (Rule("key:1", Limits(concurrency=1)),)
    assert (await ledger.admit(Ask("r1", ledger.worker, "2026-11-21", rules))).denial is None
    with pytest.raises(OSError, match="can't be written"):
        await ledger.settle(row(1, "ok", prompt_tokens=2**70), [Settlement("r1", "2026-11-21", ("key:1",), rules)])
    assert [standing.held for standing in await ledger.standings(rules)] == [0]


async def test_what_the_counters_refuse_costs_no_row(
    ledger: Ledger, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("create trigger no before insert on spend_daily begin select raise(abort, 'no'); end")
    await ledger.settle(row(1, "ok"), [Settlement("r1", "2026-11-21", ("key:1",), tokens=5)])
    assert (outcomes(path), ledger.rows_settled) == ({"r1": "ok"}, 1)
    assert "what the request r1 used is not counted for its limits" in caplog.text


TEXTS = {
    "any letters": "é日本😀",
    "NUL": "a\0b",
    "quotes": "'\"; drop",
    "bytes that are no UTF-8": "a\udcff",
    "long": "x" * 100_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
async def test_no_text_of_a_client_can_keep_its_row_out(text: str, ledger: Ledger, path: Path) -> None:
    """Headers and paths reach us as text with surrogates where they are no UTF-8."""
    await settle(ledger, row(1, "ok", client_request_id=text, endpoint=text, model=text))
    assert outcomes(path) == {"r1": "ok"}


async def test_a_deleted_file_is_made_anew(ledger: Ledger, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await settle(ledger, row(1, "ok"))
    for file in path.parent.glob("usage.db*"):
        file.unlink()
    await settle(ledger, row(2, "ok"))
    assert outcomes(path) == {"r2": "ok"}
    assert "deleted or replaced" in caplog.text


async def test_a_replaced_file_gets_the_rows(ledger: Ledger, path: Path, tmp_path: Path) -> None:
    await settle(ledger, row(1, "ok"))
    other = Ledger(tmp_path / "other" / "usage.db")
    await settle(other, row(9, "ok"))
    other.close()
    with closing(sqlite3.connect(other.path)) as db:
        db.execute("pragma journal_mode = delete")
    for journal in path.parent.glob("usage.db-*"):
        journal.unlink()
    other.path.replace(path)
    await settle(ledger, row(2, "ok"))
    assert outcomes(path) == {"r2": "ok", "r9": "ok"}


async def test_a_damaged_file_is_waited_for(ledger: Ledger, path: Path) -> None:
    """Garbage in its place, then the true file again: nothing that came meanwhile is lost."""
    await settle(ledger, row(1, "ok"))
    with closing(sqlite3.connect(path)) as db:
        db.execute("pragma wal_checkpoint(truncate)")  # else SQLite mends the file from its journal
    kept = path.rename(path.with_name("kept"))
    path.write_bytes(b"no database at all" * 1000)
    future = ledger.settle(row(2, "ok"))
    await until(lambda: not ledger.healthy or future.done())
    assert (ledger.healthy, future.done()) == (False, False)
    path.unlink()
    kept.rename(path)
    async with asyncio.timeout(SOON_S):
        await future
    await settle(ledger, row(3, "ok"))
    assert outcomes(path) == {"r1": "ok", "r2": "ok", "r3": "ok"}


async def test_the_true_file_back_after_a_failed_opening(ledger: Ledger, path: Path) -> None:
    """After what stood in its place could not be opened, the file itself is opened again: its inode is the same."""
    await settle(ledger, row(1, "ok"))
    kept = path.rename(path.with_name("kept"))
    path.mkdir()
    future = ledger.settle(row(2, "ok"))
    await until(lambda: not ledger.healthy or future.done())
    path.rmdir()
    kept.rename(path)
    async with asyncio.timeout(SOON_S):
        await future
    assert outcomes(path) == {"r1": "ok", "r2": "ok"}


async def test_an_older_file_is_brought_up_to_date(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("create table notes (text)")
    ledger = Ledger(path)
    await settle(ledger, FULL)
    ledger.close()
    assert outcomes(path) == {"r1": "ok"}
