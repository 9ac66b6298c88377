"""The proxy's view of keys.db: who a key is, as the file says at this moment.

It asks SQLite before each answer whether anybody changed the file (`PRAGMA data_version`: microseconds), so that a
change acts at once. It never waits for others: a file that is locked can't be read, and nobody may come in.
"""

import contextlib
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
from sqlite_utils import Database

from gateway.database import Identity, empty_wal, identity
from gateway.key_checks import check_key, check_limits
from gateway.keys import Key, KeyProblem, KeysUnavailable, Team, hash_key, key_of, team_of
from gateway.keys_schema import open_keys, open_to_read
from gateway.records import utc_now

FIND = "select *, hash = :hash as is_current from keys where hash = :hash or old_hash = :hash"


log = logging.getLogger(__name__)


class _Found(msgspec.Struct, frozen=True):
    """`until`: for how long, where a newer key has taken its place."""

    key: Key
    until: str | None


class KeyReader:
    """Reads on the event loop: what it has looked up is kept until the file changes. `utc_now`: as UTC ISO 8601.

    It is made at the start, when it may block: then the file is created or brought up to date.
    """

    def __init__(self, path: Path, utc_now: Callable[[], str] = utc_now) -> None:
        self._path = path
        self._utc_now = utc_now
        with contextlib.closing(open_keys(path)) as db:
            empty_wal(db)
        self._db = open_to_read(path)
        self._file = identity(path)
        self._seen: tuple[Identity, int] | None = None
        self._told: str | None = None
        self._version = 0
        self._keys: dict[str, _Found] = {}
        self._teams: dict[str, Team] = {}

    def close(self) -> None:
        self._db.close()

    @property
    def version(self) -> int:
        """Another number after each change of the file, of any table. Raises KeysUnavailable."""
        return self._looked_up(lambda _: self._version)

    def find(self, key: str) -> Key | None:
        """The record of a key, or of one that was rotated and still holds. Raises KeysUnavailable."""
        digest = hash_key(key)
        found = self._looked_up(lambda db: self._keys.get(digest) or self._read_key(db, digest))
        if found is None or (found.until is not None and found.until <= self._utc_now()):
            return None
        return found.key

    def team(self, name: str) -> Team | None:
        """A team of keys.db. Raises KeysUnavailable."""
        return self._looked_up(lambda db: self._teams.get(name) or self._read_team(db, name))

    def _looked_up[T](self, look: Callable[[Database], T]) -> T:
        try:
            self._refresh()
            return look(self._db)
        except (OSError, sqlite3.Error, msgspec.MsgspecError, KeyProblem) as error:
            self._seen = None
            if str(error) != self._told:
                self._told = str(error)
                log.error("keys.db can't be read, and nobody comes in with a key of it: %s", error)
            raise KeysUnavailable(str(error)) from error

    def _read_key(self, db: Database, digest: str) -> _Found | None:
        row = next(db.query(FIND, {"hash": digest}), None)
        if row is None:
            return None
        key = key_of(row)
        check_key(key)
        self._keys[digest] = found = _Found(key, None if row["is_current"] else key.old_until or "")
        return found

    def _read_team(self, db: Database, name: str) -> Team | None:
        row = next(db.query("select * from teams where name = ?", [name]), None)
        if row is None:
            return None
        team = team_of(row)
        check_limits(team.limits)
        self._teams[name] = team
        return team

    def _refresh(self) -> None:
        stat = self._path.stat()
        file = stat.st_dev, stat.st_ino
        if self._seen is None or file != self._file:
            self._open_again(file)
        (version,) = self._db.conn.execute("pragma data_version").fetchone()
        if self._seen != (file, version):
            self._keys.clear()
            self._teams.clear()
            self._version += 1
            self._seen = file, version

    def _open_again(self, file: Identity) -> None:
        """After a failure; or it was replaced, say by a restored copy."""
        self._db.close()
        self._seen = None
        if file != self._file:
            wal = self._path.with_name(self._path.name + "-wal")
            if wal.exists() and wal.stat().st_size:  # SQLite would play it back into this file
                old = f"{wal.name} and {self._path.name}-shm"
                raise OSError(f"{self._path} was replaced beside the changes of the one before it: delete {old}")
            self._told = None
        self._db = open_to_read(self._path)
        self._file = file
