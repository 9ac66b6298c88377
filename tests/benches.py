"""Each kind of key source with something real behind it, which a test fills, stops and chokes. BENCHES has them all."""

import json
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import psycopg

from databases import Database, MariaDB, RedisServer
from gateway.keys import hash_key
from gateway.secret import Secret
from gateway.sources import settings
from mongo import Mongo

QUERY = "select name, team, models, rpm, expires, disabled from people where secret = :sha256"
COLUMNS = "secret varchar(64), name varchar(40), team varchar(40), models varchar(200), rpm varchar(20)"
FIELDS = ("name", "team", "models", "rpm", "expires", "disabled")

type GetDatabase = Callable[[str], Database]


class Bench(ABC):
    """`put`: this is what the source says of a key from now on. `can_stop`: a test may do it."""

    can_stop: ClassVar[bool] = True

    def __init__(self, folder: Path, database: GetDatabase) -> None:
        self.folder = folder

    @abstractmethod
    def source(self, **common: Any) -> settings.Source: ...

    @abstractmethod
    def put(self, key: str, **fields: Any) -> None: ...

    @abstractmethod
    def freeze(self) -> None: ...

    @abstractmethod
    def thaw(self) -> None: ...

    def stop(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.thaw()


class Sqlite(Bench):
    can_stop = False

    def __init__(self, folder: Path, database: GetDatabase) -> None:
        super().__init__(folder, database)
        self.db = sqlite3.connect(folder / "people.db", isolation_level=None, check_same_thread=False)
        self.db.execute(f"create table people ({COLUMNS}, expires text, disabled integer)")

    def source(self, **common: Any) -> settings.Source:
        return settings.Sql(url=Secret(f"sqlite:///{self.folder / 'people.db'}"), query=QUERY, **common)

    def put(self, key: str, **fields: Any) -> None:
        self.db.execute("delete from people where secret = ?", [hash_key(key)])
        self.db.execute("insert into people values (?, ?, ?, ?, ?, ?, ?)", [hash_key(key), *_row(fields)])

    def freeze(self) -> None:
        """Somebody writes for long, and nobody may read meanwhile."""
        self.db.execute("begin exclusive")

    def thaw(self) -> None:
        if self.db.in_transaction:
            self.db.execute("rollback")

    def close(self) -> None:
        self.thaw()
        self.db.close()


class Server(Bench):
    """A database of the session."""

    name: ClassVar[str]

    def __init__(self, folder: Path, database: GetDatabase) -> None:
        super().__init__(folder, database)
        self.server = database(self.name)

    def stop(self) -> None:
        self.server.stop()

    def start(self) -> None:
        self.server.start()

    def freeze(self) -> None:
        self.server.freeze()

    def thaw(self) -> None:
        self.server.thaw()


class Postgres(Server):
    name = "postgres"

    def __init__(self, folder: Path, database: GetDatabase) -> None:
        super().__init__(folder, database)
        with psycopg.connect(self.server.url, autocommit=True) as db:
            db.execute("drop table if exists people")
            db.execute(f"create table people ({COLUMNS}, expires timestamptz, disabled boolean)".encode())

    def source(self, **common: Any) -> settings.Source:
        return settings.Sql(url=Secret(self.server.url), query=QUERY.replace(":sha256", ":sha256::text"), **common)

    def put(self, key: str, **fields: Any) -> None:
        with psycopg.connect(self.server.url, autocommit=True) as db:
            db.execute("delete from people where secret = %s", [hash_key(key)])
            db.execute("insert into people values (%s, %s, %s, %s, %s, %s, %s)", [hash_key(key), *_row(fields)])


class Maria(Server):
    name = "mariadb"
    server: MariaDB

    def __init__(self, folder: Path, database: GetDatabase) -> None:
        super().__init__(folder, database)
        with closing(self.server.connect()) as db, db.cursor() as cursor:
            cursor.execute("drop table if exists people")
            cursor.execute(f"create table people ({COLUMNS}, expires datetime, disabled boolean)")

    def source(self, **common: Any) -> settings.Source:
        return settings.Sql(url=Secret(self.server.url), query=QUERY, **common)

    def put(self, key: str, **fields: Any) -> None:
        row = [
            datetime.fromisoformat(value).replace(tzinfo=None) if name == "expires" and value else value
            for name, value in zip(FIELDS, _row(fields), strict=True)
        ]
        with closing(self.server.connect()) as db, db.cursor() as cursor:
            cursor.execute("delete from people where secret = %s", [hash_key(key)])
            cursor.execute("insert into people values (%s, %s, %s, %s, %s, %s, %s)", [hash_key(key), *row])


def _row(fields: dict[str, Any]) -> list[Any]:
    models = fields.get("models")
    given = {"disabled": False, **fields, "models": None if models is None else json.dumps(models)}
    return [given.get(name) for name in FIELDS]


class RedisHash(Server):
    name = "redis"
    server: RedisServer

    def source(self, **common: Any) -> settings.Source:
        return settings.Redis(url=Secret(self.server.url), **common)

    def put(self, key: str, **fields: Any) -> None:
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        with closing(self.server.client()) as db:
            db.delete(f"llmproxy:key:{hash_key(key)}")
            for name, text in texts.items():
                db.hset(f"llmproxy:key:{hash_key(key)}", name, text)


class RedisJson(RedisHash):
    def source(self, **common: Any) -> settings.Source:
        return settings.Redis(url=Secret(self.server.url), key="people/{sha256}", **common)

    def put(self, key: str, **fields: Any) -> None:
        with closing(self.server.client()) as db:
            db.set(f"people/{hash_key(key)}", json.dumps(fields))


class MongoDB(Bench):
    def __init__(self, folder: Path, database: GetDatabase) -> None:
        super().__init__(folder, database)
        self.mongo = Mongo()

    def source(self, **common: Any) -> settings.Source:
        return settings.MongoDB(url=Secret(self.mongo.url), **common)

    def put(self, key: str, **fields: Any) -> None:
        place = self.mongo.documents.setdefault("cgc.api_keys", [])
        place[:] = [document for document in place if document["secret"] != hash_key(key)]
        expires = fields.pop("expires", None)
        place.append(
            {
                "access_level": "LLM",
                "secret": hash_key(key),
                "user_id": fields.pop("name"),
                "name": "a label",
                "date_expiry": datetime.fromisoformat(expires) if expires else None,
                **fields,
            }
        )

    def stop(self) -> None:
        self.mongo.stop()

    def start(self) -> None:
        self.mongo.start()

    def freeze(self) -> None:
        self.mongo.goes_on.clear()

    def thaw(self) -> None:
        self.mongo.goes_on.set()

    def close(self) -> None:
        self.thaw()
        self.mongo.stop()


class Hook(Bench):
    """`replies`: by SHA-256; what is not there is answered with 404. `asked`: the questions as they came."""

    def __init__(self, folder: Path, database: GetDatabase) -> None:
        super().__init__(folder, database)
        self.replies: dict[str, tuple[int, bytes]] = {}
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/keys"

    def source(self, **common: Any) -> settings.Source:
        return settings.Webhook(url=self.url, api_key=Secret("hook-secret"), **common)

    def put(self, key: str, **fields: Any) -> None:
        self.say(key, 200, json.dumps({"allowed": True, **fields}).encode())

    def say(self, key: str, status: int, body: bytes) -> None:
        self.replies[hash_key(key)] = (status, body)

    def start(self) -> None:
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["content-length"])))
                hook.asked.append(({name.lower(): value for name, value in self.headers.items()}, question))
                hook.goes_on.wait()
                status, body = hook.replies.get(question["key_sha256"], (404, b""))
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.send_header("location", hook.url)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def freeze(self) -> None:
        self.goes_on.clear()

    def thaw(self) -> None:
        self.goes_on.set()

    def close(self) -> None:
        self.thaw()
        self.stop()


class Script(Bench):
    """Keys stand beside the script, which sleeps while a file says so."""

    def __init__(self, folder: Path, database: GetDatabase) -> None:
        super().__init__(folder, database)
        self.keys: dict[str, Any] = {}
        self.is_frozen = False
        self.write()

    @abstractmethod
    def write(self) -> None: ...

    def put(self, key: str, **fields: Any) -> None:
        self.keys[hash_key(key)] = fields
        self.write()

    def stop(self) -> None:
        self.path.rename(self.path.with_suffix(".gone"))

    def start(self) -> None:
        self.path.with_suffix(".gone").rename(self.path)

    def freeze(self) -> None:
        self.is_frozen = True
        self.write()

    def thaw(self) -> None:
        self.is_frozen = False
        self.write()

    @property
    @abstractmethod
    def path(self) -> Path: ...

    def replace(self, text: str) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(text)
        part.replace(self.path)


class Python(Script):
    @property
    def path(self) -> Path:
        return self.folder / "who.py"

    def source(self, **common: Any) -> settings.Source:
        return settings.Python(path=self.path, **common)

    def write(self) -> None:
        hang = "while True: pass" if self.is_frozen else ""
        self.replace(f"KEYS = {self.keys!r}\n\ndef find(request):\n    {hang}\n    return KEYS.get(request.sha256)\n")


class Lua(Script):
    @property
    def path(self) -> Path:
        return self.folder / "who.lua"

    def source(self, **common: Any) -> settings.Source:
        return settings.Lua(path=self.path, **common)

    def write(self) -> None:
        hang = "while true do end" if self.is_frozen else ""
        self.replace(
            f"local keys = {_lua(self.keys)}\nfunction find(request)\n  {hang}\n  return keys[request.sha256]\nend\n"
        )


def _lua(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"[{json.dumps(name)}] = {_lua(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "{" + ", ".join(map(_lua, value)) + "}"
    return "nil" if value is None else json.dumps(value)


BENCHES: dict[str, type[Bench]] = {
    "sqlite": Sqlite,
    "postgres": Postgres,
    "mariadb": Maria,
    "redis hash": RedisHash,
    "redis json": RedisJson,
    "mongodb": MongoDB,
    "webhook": Hook,
    "python": Python,
    "lua": Lua,
}
