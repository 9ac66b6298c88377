"""Reading usage.db while others write it."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlite_utils import Database

from gateway import books
from gateway.books import Books, BooksUnavailable
from gateway.schema import usage

ENDLESS = "with recursive n(i) as (select 1 union all select i + 1 from n) select sum(i) from n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a folder #1?" / "usage.db"
    path.parent.mkdir()
    with closing(Database(path)) as db:
        db.enable_wal()
        usage.apply(db)
        db.execute("insert into requests (id, started_at, endpoint, outcome) values ('a', 'b', '/v1/x', 'ok')")
        db.conn.commit()
    return path


async def test_rows_are_columns_and_values(path: Path) -> None:
    sql = "select id, outcome, status from requests where endpoint = ?"
    assert Books(path).query(sql, ["/v1/x"]) == [{"id": "a", "outcome": "ok", "status": None}]
    assert await Books(path).ask(sql, ["/v1/x"]) == [{"id": "a", "outcome": "ok", "status": None}]
    assert await Books(path).ask(sql, ["' or 1 = 1 --"]) == []


async def test_a_writer_in_a_transaction_is_not_in_the_way(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("begin immediate")
        writer.execute("delete from requests")
        assert await Books(path).ask("select count(*) as n from requests") == [{"n": 1}]
        writer.execute("commit")
    assert await Books(path).ask("select count(*) as n from requests") == [{"n": 0}]


@pytest.mark.parametrize("sql", ["delete from requests", "create table x (y)", "pragma user_version = 7"])
def test_it_can_not_write(path: Path, sql: str) -> None:
    with pytest.raises(BooksUnavailable, match="readonly"):
        Books(path).query(sql)


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(BooksUnavailable, match=r"usage\.db can't be read: unable to open database file"):
        Books(tmp_path / "usage.db").query("select 1")
    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    path.write_text("these are no books" * 100)
    with pytest.raises(BooksUnavailable, match="not a database"):
        await Books(path).ask("select * from requests")


async def test_a_question_without_an_end_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "QUERY_S", 0.05)
    with pytest.raises(BooksUnavailable, match="interrupted"):
        await Books(path).ask(ENDLESS)
