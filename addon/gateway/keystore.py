"""keys.db: who may come in. Only the SHA-256 of a key is kept; of 256 random bits, a slow hash would buy nothing.

The file is created with mode 0600 and is never published. A running proxy reads it through `KeyReader`, which asks
SQLite before each request whether anybody changed the file (`PRAGMA data_version`: microseconds), so that a change
acts at once.
"""

import contextlib
import hashlib
import os
import re
import secrets
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from sqlite_utils import Database
from sqlite_utils.db import NotFoundError
from sqlite_utils.migrations import Migrations

from gateway.database import open_database, transaction
from gateway.patterns import Pattern

# A change of a key takes milliseconds; somebody who runs many at once waits for each.
BUSY_TIMEOUT_S = 5.0

# What a key's requests are when they wait for a server: a class of a lower number goes first.
PRIORITIES = {"high": 0, "normal": 1, "low": 2}

# A thousand to one starves the others, or oneself, for every use but a mistake.
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000

migrations = Migrations("llmproxy-keys")


class KeyProblem(Exception):
    """A key can't be made or changed; `str` says why, to a person."""


class KeysUnavailable(Exception):
    """keys.db can't be read. Nobody may come in until it can."""


class Key(msgspec.Struct, frozen=True):
    """A key as it is kept: times are UTC ISO 8601, `models` are patterns (empty: all).

    `weight`: its share among the waiting keys of its class, relative to theirs. `priority`: a name of PRIORITIES.
    """

    id: int
    name: str
    hint: str
    created_at: str
    disabled: bool
    expires_at: str | None
    models: tuple[str, ...]
    weight: float = 1
    priority: str = "normal"

    def state(self, now: str) -> str:
        if self.disabled:
            return "disabled"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


@migrations()
def m001_keys(db: Database) -> None:
    # "autoincrement" keeps the ids of deleted keys from being given again: rows of `requests` go on naming them.
    db.execute(
        "create table keys ("
        "id integer primary key autoincrement, "
        "name text not null unique, "
        "hash text not null unique, "
        "hint text not null, "
        "created_at text not null, "
        "disabled integer not null default 0, "
        "expires_at text, "
        "models text not null default '[]')"
    )


@migrations()
def m002_fair_queue(db: Database) -> None:
    db.execute("alter table keys add column weight real not null default 1")
    db.execute("alter table keys add column priority text not null default 'normal'")


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def iso(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def parse_expiry(text: str, now: datetime) -> str:
    """A span (90d, 12h), a date (valid through it) or an ISO 8601 time -> UTC ISO 8601. Raises ValueError."""
    try:
        return iso(_expiry(text, now))
    except OverflowError:
        raise ValueError(f"expected a nearer time than {text!r}; a key without one never expires") from None


def _expiry(text: str, now: datetime) -> datetime:
    relative = re.fullmatch(r"(\d{1,6})([dhm])", text)
    if relative:
        unit = {"d": "days", "h": "hours", "m": "minutes"}[relative[2]]
        return now + timedelta(**{unit: int(relative[1])})
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"expected a date (2027-01-31), a time (2027-01-31T18:00Z) or 90d, 12h, 30m; got {text!r}"
        ) from None
    if "T" not in text and ":" not in text:
        moment += timedelta(days=1)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class KeyStore:
    """Makes and changes keys. Every method is one transaction."""

    def __init__(self, path: Path) -> None:
        self._db = _open(path)

    def close(self) -> None:
        self._db.close()

    def create(
        self,
        name: str,
        *,
        models: tuple[str, ...] = (),
        expires_at: str | None = None,
        weight: float = 1,
        priority: str = "normal",
    ) -> tuple[Key, str]:
        """Returns the record and the key itself, which is nowhere kept. Raises KeyProblem."""
        if not name.strip() or len(name) > 200 or not name.isprintable():
            raise KeyProblem(f"{name!r} is no name for a key: expected 1 to 200 printable characters")
        for model in models:
            try:
                Pattern(model)
            except ValueError as error:
                raise KeyProblem(f"--model: {error}") from None
        _check_limits(weight, priority)
        key = _new_key()
        row = {
            "name": name,
            **_secret_columns(key),
            "created_at": iso(datetime.now(UTC)),
            "expires_at": expires_at,
            "models": msgspec.json.encode(models).decode(),
            "weight": weight,
            "priority": priority,
        }
        try:
            with transaction(self._db):
                self._db.table("keys").insert(row)
        except sqlite3.IntegrityError:
            raise KeyProblem(
                f"there is a key named {name!r} already; revoke it, rotate it or choose another name"
            ) from None
        return self.get(name), key

    def list(self) -> list[Key]:
        return [_record(row) for row in self._db.query("select * from keys order by id")]

    def get(self, name: str) -> Key:
        try:
            return _record(next(self._db.query("select * from keys where name = ?", [name])))
        except StopIteration:
            raise KeyProblem(f"there is no key named {name!r}") from None

    def rotate(self, name: str) -> tuple[Key, str]:
        """A new key for the same name and rules; the old one ends at once."""
        key = _new_key()
        self._update(name, _secret_columns(key))
        return self.get(name), key

    def set_disabled(self, name: str, disabled: bool) -> Key:
        self._update(name, {"disabled": int(disabled)})
        return self.get(name)

    def set_limits(self, name: str, *, weight: float | None = None, priority: str | None = None) -> Key:
        """Change what is given, one or both. Raises KeyProblem."""
        given = {"weight": weight, "priority": priority}
        changes = {column: value for column, value in given.items() if value is not None}
        if not changes:
            raise KeyProblem(f"nothing to change: give --weight W, --priority {'|'.join(PRIORITIES)}, or both")
        key = self.get(name)
        _check_limits(changes.get("weight", key.weight), changes.get("priority", key.priority))
        self._update(name, changes)
        return self.get(name)

    def revoke(self, name: str) -> Key:
        """Delete the key. Rows of `requests` keep its id and name."""
        key = self.get(name)
        with transaction(self._db):
            self._db.table("keys").delete(key.id)
        return key

    def _update(self, name: str, values: dict[str, Any]) -> None:
        key = self.get(name)
        with transaction(self._db):
            try:
                self._db.table("keys").update(key.id, values)
            except NotFoundError:
                raise KeyProblem(f"there is no key named {name!r}") from None


class KeyReader:
    """The proxy's view of keys.db: hash -> key, read again whenever the file has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = _open(path)
        self._seen: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}

    def close(self) -> None:
        self._db.close()

    def find(self, key: str) -> Key | None:
        """The record of a key. Raises KeysUnavailable."""
        try:
            self._refresh()
        except (OSError, sqlite3.Error, msgspec.DecodeError, KeyProblem) as error:
            self._seen = None
            raise KeysUnavailable(str(error)) from error
        return self._keys.get(hash_key(key))

    def _refresh(self) -> None:
        stat = self._path.stat()
        file = (stat.st_dev, stat.st_ino)
        if self._seen is None or self._seen[:2] != file:  # replaced, say by a restored copy
            self._db.close()
            self._db = _open(self._path)
        (version,) = self._db.conn.execute("pragma data_version").fetchone()
        if self._seen != (*file, version):
            self._keys = {row["hash"]: _record(row) for row in self._db.query("select * from keys")}
            self._seen = (*file, version)


def _open(path: Path) -> Database:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    path.chmod(0o600)
    return open_database(path, migrations, busy_timeout_s=BUSY_TIMEOUT_S)


def _new_key() -> str:
    return "sk-" + secrets.token_urlsafe(32)


def _secret_columns(key: str) -> dict[str, str]:
    # Enough of the key to recognise it by, far too little to guess it from.
    return {"hash": hash_key(key), "hint": f"{key[:7]}…{key[-4:]}"}


def _check_limits(weight: object, priority: object) -> None:
    # Not a number is not above 0 either.
    if not isinstance(weight, int | float) or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise KeyProblem(f"--weight: expected a number from {MIN_WEIGHT} to {MAX_WEIGHT}, got {weight!r}")
    if priority not in PRIORITIES:
        raise KeyProblem(f"--priority: expected one of {', '.join(PRIORITIES)}, got {priority!r}")


def _record(row: dict[str, Any]) -> Key:
    _check_limits(row["weight"], row["priority"])
    return Key(
        id=row["id"],
        name=row["name"],
        hint=row["hint"],
        created_at=row["created_at"],
        disabled=bool(row["disabled"]),
        expires_at=row["expires_at"],
        models=tuple(msgspec.json.decode(row["models"], type=list[str])),
        weight=row["weight"],
        priority=row["priority"],
    )
