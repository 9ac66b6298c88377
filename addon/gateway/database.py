"""SQLite files that several processes use: opened one at a time, locked before a transaction reads or writes."""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

Identity = tuple[int, int]


def open_database(path: Path, migrations: Migrations, *, busy_timeout_s: float) -> Database:
    """Open a file (WAL) and bring its schema up to date. Usable from any one thread at a time.

    Raises OSError: the file, or what SQLite says of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(path):
        try:
            connection = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise OSError(f"{path}: {error}") from error
        try:
            db = Database(connection)
            db.enable_wal()
            # With WAL this survives the death of the process; a power cut may take the last commits.
            db.execute("pragma synchronous = normal")
            migrations.apply(db)
        except sqlite3.Error as error:
            connection.close()
            raise OSError(f"{path}: {error}") from error
    return db


def open_existing(path: Path) -> Database:
    """Only to read, as it is, without ever waiting for others. Usable from any one thread at a time.

    Raises OSError, and later sqlite3.Error.
    """
    try:
        # Not mode=ro: who reads a WAL takes part in its index.
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=0, isolation_level=None, check_same_thread=False
        )
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from error
    connection.execute("pragma query_only = on")
    return Database(connection)


@contextlib.contextmanager
def transaction(db: Database) -> Iterator[None]:
    """One transaction. It takes the write lock first: one that reads before it writes could not wait for others."""
    db.conn.execute("begin immediate")
    try:
        yield
        db.conn.execute("commit")
    except BaseException:
        db.conn.rollback()
        raise


@contextlib.contextmanager
def changing(db: Database) -> Iterator[None]:
    """One transaction, after which all is in the file itself.

    What stayed in the WAL would be played back into a copy that somebody puts in the file's place.
    """
    with transaction(db):
        yield
    empty_wal(db)


def empty_wal(db: Database) -> None:
    with contextlib.suppress(sqlite3.Error):  # what was changed is kept all the same
        db.conn.execute("pragma wal_checkpoint(truncate)").fetchone()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What SQLite says of the file is an OSError that names it."""
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from error


def identity(path: Path) -> Identity | None:
    """Tells a file from another one that was put in its place. None: there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def is_trouble_with_the_file(error: Exception) -> bool:
    """Whether an error is the file's, and may pass; others are about what is written. Damage is a DatabaseError."""
    return isinstance(error, OSError | sqlite3.OperationalError | sqlite3.InternalError) or (
        type(error) is sqlite3.DatabaseError
    )


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold off other processes that open the same file: workers start together, migrations must not."""
    file = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
