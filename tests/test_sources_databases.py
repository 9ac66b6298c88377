"""What only one kind of database has: texts that would end a query's text, wrong types of Redis, MongoDB's query."""

import contextlib
import json
import socketserver
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime
from pathlib import Path

import psycopg
import pytest
from bson.datetime_ms import DatetimeMS

from benches import GetDatabase, MongoDB
from databases import MariaDB, RedisServer
from gateway.keys import Key, hash_key
from gateway.secret import Secret
from gateway.sources import settings
from gateway.sources.kinds import REMOTE
from gateway.sources.moments import NEVER
from gateway.sources.mongodb import MongoKeys
from gateway.sources.redis_keys import RedisKeys
from gateway.sources.remote import Remote
from gateway.sources.source import Answer, Asked, SourceFailed
from gateway.sources.sql import SqlKeys


def asked(key: str) -> Asked:
    return Asked(Secret(key), hash_key(key), "")


def name_of(answer: Answer) -> str | None:
    return answer.name if isinstance(answer, Key) else None


# Keys as they stand in a table, and ones that would match all of its rows if they were a part of the query.
NASTY = ["o'brien", "back\\slash", "100%", "%(key)s", "%s", ":sha256", "a;b", 'q"q', "ü€😀", "ends with\\"]
INJECTIONS = ["' or '1'='1", "\\' or 1=1 -- ", '" or ""="', "'; drop table plain; --", "x' union select 'a' -- ", "\\"]


def fill(name: str, folder: Path, database: GetDatabase) -> str:
    """A table `plain` with keys as they are. Gives its URL."""
    rows = [(key, f"name {index}") for index, key in enumerate(NASTY)]
    columns = "secret varchar(100), name varchar(100)"
    if name == "sqlite":
        with closing(sqlite3.connect(folder / "plain.db")) as file, file:
            file.execute(f"create table plain ({columns})")
            file.executemany("insert into plain values (?, ?)", rows)
        return f"sqlite:///{folder / 'plain.db'}"
    server = database(name)
    if isinstance(server, MariaDB):
        with closing(server.connect()) as maria, maria.cursor() as cursor:
            cursor.execute("drop table if exists plain")
            cursor.execute(f"create table plain ({columns}) character set utf8mb4")
            cursor.executemany("insert into plain values (%s, %s)", rows)
    else:
        with psycopg.connect(server.url, autocommit=True) as postgres:
            postgres.execute("drop table if exists plain")
            postgres.execute(f"create table plain ({columns})".encode())
            postgres.cursor().executemany("insert into plain values (%s, %s)", rows)
    return server.url


@pytest.mark.parametrize("name", ["sqlite", "postgres", "mariadb"])
def test_a_key_is_a_value_whatever_it_holds(name: str, tmp_path: Path, database: GetDatabase) -> None:
    query = "select name from plain where secret = :key and '%' <> ':key' -- :key"
    source = SqlKeys(settings.Sql(url=Secret(fill(name, tmp_path, database)), query=query, timeout_s=20))
    assert [name_of(source.find(asked(key))) for key in NASTY] == [f"name {index}" for index in range(len(NASTY))]
    assert [source.find(asked(key)) for key in INJECTIONS] == [None] * len(INJECTIONS)
    assert name_of(source.find(asked(NASTY[0]))) == "name 0"
    source.close()


WRONG_QUERIES = {
    "two rows": ("select name from plain where :key = :key", "gives more than one row"),
    "no such table": ("select name from nowhere where secret = :key", ""),
    "no SQL": ("where is :key", ""),
    "no rows at all": ("create table if not exists other (a int) -- ' \n/* */ ; select :key", ""),
}


@pytest.mark.parametrize("name", ["sqlite", "postgres", "mariadb"])
@pytest.mark.parametrize(("query", "expected"), WRONG_QUERIES.values(), ids=WRONG_QUERIES)
def test_wrong_queries(name: str, query: str, expected: str, tmp_path: Path, database: GetDatabase) -> None:
    """What they say may hold the query, and so the key: it is not told."""
    source = SqlKeys(settings.Sql(url=Secret(fill(name, tmp_path, database)), query=query, timeout_s=20))
    with pytest.raises(SourceFailed) as caught:
        source.find(asked("sk-secret"))
    assert expected in str(caught.value)
    assert "sk-secret" not in str(caught.value)
    source.close()


def test_an_endless_query_of_sqlite_is_ended(tmp_path: Path, database: GetDatabase) -> None:
    query = (
        "with recursive n (i) as (select 1 union all select i + 1 from n) "
        "select name from plain, n where secret = :key and i < 0"
    )
    source = SqlKeys(settings.Sql(url=Secret(fill("sqlite", tmp_path, database)), query=query, timeout_s=0.2))
    began = time.monotonic()
    with pytest.raises(SourceFailed, match="interrupted"):
        source.find(asked(NASTY[0]))
    assert time.monotonic() - began < 20


def test_what_redis_may_hold(database: GetDatabase) -> None:
    server = database("redis")
    assert isinstance(server, RedisServer)
    source = RedisKeys(settings.Redis(url=Secret(server.url), timeout_s=20))
    texts = {
        "json": json.dumps({"name": "alice"}),
        "null": "null",
        "no": "false",
        "list": "[]",
        "text": '"alice"',
        "half": '{"name": ',
        "deep": "[" * 100_000,
        "empty": "",
    }
    with closing(server.client()) as db:
        for key, text in texts.items():
            db.set(f"llmproxy:key:{hash_key(key)}", text)
        db.rpush(f"llmproxy:key:{hash_key('a list')}", "alice")
        db.set(f"llmproxy:key:{hash_key('latin')}", b'{"name": "\xff"}')
    found: dict[str, str | None] = {}
    for key in (*texts, "a list", "latin"):
        try:
            found[key] = name_of(source.find(asked(key)))
        except SourceFailed as error:
            found[key] = str(error).split(":")[0]
    source.close()
    assert found == {
        "json": "alice",
        "null": None,
        "no": None,
        "list": "answers with list instead of fields",
        "text": "answers with str instead of fields",
        "half": "has a string that is not JSON",
        "deep": "has a string that is not JSON",
        "empty": "has a string that is not JSON",
        "a list": "has a list where a hash or a string is expected",
        "latin": "can't be asked",
    }


def test_mongodb_is_asked_as_comtegras_llmproxy_asks(tmp_path: Path, database: GetDatabase) -> None:
    bench = MongoDB(tmp_path, database)
    bench.put("sk-1", name="alice", expires="2100-01-01T00:00:00+00:00")
    bench.mongo.documents["cgc.api_keys"].append(
        {"access_level": "ADMIN", "secret": hash_key("sk-admin"), "user_id": "root", "date_expiry": None}
    )
    source = MongoKeys(settings.MongoDB(url=Secret(bench.mongo.url), timeout_s=20))
    assert name_of(source.find(asked("sk-1"))) == "alice"
    (query,) = bench.mongo.asked
    (never, later) = query.pop("$or")
    assert query == {"access_level": "LLM", "secret": hash_key("sk-1")}
    assert never == {"date_expiry": None}
    assert isinstance(later["date_expiry"]["$gt"], datetime)
    assert source.find(asked("sk-admin")) is None
    source.close()
    bench.close()


TIMES: dict[str, tuple[str | None, str | None]] = {
    "a time": ("2030-01-31 18:00:00+01", "2030-01-31T17:00:00.000Z"),
    "none": (None, None),
    "endless": ("infinity", NEVER),
    "the last day": ("9999-12-31 23:59:59+00", "9999-12-31T23:59:59.000Z"),
    "after the year 9999": ("10000-01-01 00:00:00+00", NEVER),
    "before all times": ("-infinity", "field expires: expected a time as in 2027-01-31T18:00Z, got str"),
    "before Christ": ("0044-03-15 BC", "field expires: expected a time as in 2027-01-31T18:00Z, got str"),
}


@pytest.mark.parametrize("column", ["timestamptz", "timestamp", "date"])
def test_times_of_postgresql(column: str, database: GetDatabase) -> None:
    server = database("postgres")
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("set timezone to 'UTC'")
        db.execute("drop table if exists times")
        db.execute(f"create table times (secret text, expires {column})".encode())
        for key, (moment, _) in TIMES.items():
            db.execute("insert into times values (%s, %s)", [key, moment])
    query = "select secret as name, expires from times where secret = :key"
    source = SqlKeys(settings.Sql(url=Secret(server.url), query=query, timeout_s=20))
    found: dict[str, str | None] = {}
    for key in TIMES:
        try:
            answer = source.find(asked(key))
            found[key] = answer.expires_at if isinstance(answer, Key) else "not found"
        except SourceFailed as error:
            found[key] = str(error)
    source.close()
    expected = {key: expected for key, (_, expected) in TIMES.items()}
    if column == "timestamp":
        expected["a time"] = "2030-01-31T18:00:00.000Z"
    elif column == "date":
        expected |= {"a time": "2030-02-01T00:00:00.000Z", "the last day": NEVER}
    assert found == expected


def test_never_in_mongodb(tmp_path: Path, database: GetDatabase) -> None:
    bench = MongoDB(tmp_path, database)
    bench.put("sk-1", name="alice")
    bench.mongo.documents["cgc.api_keys"][0]["date_expiry"] = DatetimeMS(8_640_000_000_000_000)
    source = MongoKeys(settings.MongoDB(url=Secret(bench.mongo.url), timeout_s=20))
    answer = source.find(asked("sk-1"))
    assert isinstance(answer, Key)
    assert answer.expires_at == NEVER
    source.close()
    bench.close()


TRICKLES: dict[str, tuple[Callable[[str], settings.Source], bytes]] = {
    "mysql": (
        lambda host: settings.Sql(url=Secret(f"mysql://u:p@{host}/d"), query=":key", timeout_s=0.2),
        b"\xff\xff\0\0",
    ),
    "postgresql": (
        lambda host: settings.Sql(
            url=Secret(f"postgresql://u:p@{host}/d?sslmode=disable"), query=":key", timeout_s=0.2
        ),
        b"E\0\0\x10\0",
    ),
    "redis": (lambda host: settings.Redis(url=Secret(f"redis://{host}"), timeout_s=0.2), b"+"),
    "mongodb": (lambda host: settings.MongoDB(url=Secret(f"mongodb://{host}/"), timeout_s=0.2), b"\0\x10\0\0"),
}


@pytest.mark.parametrize(("make", "begin"), TRICKLES.values(), ids=TRICKLES)
def test_one_that_answers_byte_by_byte_keeps_no_thread(make: Callable[[str], settings.Source], begin: bytes) -> None:
    is_over = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(begin)
            with contextlib.suppress(OSError):
                while not is_over.wait(0.02):
                    self.request.sendall(b"1")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        kind = make(f"127.0.0.1:{server.server_address[1]}")
        source = REMOTE[type(kind)](kind)
        try:
            with ThreadPoolExecutor(1) as pool:
                asking = pool.submit(source.find, asked("sk-1"))
                try:
                    assert asking.exception(20) is not None
                finally:
                    is_over.set()
        finally:
            source.close()
            server.shutdown()


NOISE: dict[str, list[bytes]] = {
    "redis": [b"$99999999999\r\n", b":abc\r\n", b"*1\r\n" * 3000, b"+\xff\r\n", b"#q\r\n", b"+hash\r\n:5\r\n"],
    "mysql": [
        b"\x0a\0\0\0\x0a5.5.5\0" + b"x" * 5,
        b"\x05\0\0\0\xff\x15\x04ab",
        b"HTTP/1.1 400\r\n\r\n",
        b"\x02\0\0\0\x0a\0",
    ],
    "postgresql": [b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05IT\0\0\0\x06\0\x05", b"HTTP/1.1\r\n", b"S"],
    "mongodb": [
        b"HTTP/1.1 400 Bad\r\n\r\n",
        b"\x26\0\0\0\1\0\0\0\0\0\0\0\xdd\7\0\0\0\0\0\0\0\x05\0\0\0\0" + b"\0" * 20,
    ],
}


@pytest.mark.parametrize(("name", "noise"), [(name, noise) for name, noises in NOISE.items() for noise in noises])
async def test_noise_is_a_failure(name: str, noise: bytes) -> None:
    """Whatever a driver makes of it."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.sendall(noise)
                self.request.settimeout(1)
                while self.request.recv(65536):
                    self.request.sendall(noise)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        kind = TRICKLES[name][0](f"127.0.0.1:{server.server_address[1]}")
        by = Remote(REMOTE[type(kind)](kind), kind)
        with pytest.raises(SourceFailed):
            await by.find(asked("sk-1"))
        by.close()
        server.shutdown()
