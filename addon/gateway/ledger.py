"""The only writer of usage.db: a thread that commits whatever waits as one transaction.

A row is opened at admission and settled once; whoever settles awaits the commit, so that nobody sees the end of an
answer whose row a crash could lose. When the disk fails, rows wait in memory, `healthy` turns false (requests are
then refused rather than served unbooked), and writing is tried again until it works.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from sqlite_utils import Database

from gateway import schema
from gateway.exchange import Row, uuid7
from gateway.files import one_at_a_time

log = logging.getLogger(__name__)

RETRY_S = 0.5
# Several workers share the file; each holds it for a few milliseconds at a time.
BUSY_TIMEOUT_S = 1.0

_COLUMNS = Row.__struct_fields__
_INSERT = f"insert into requests ({', '.join(_COLUMNS)}) values ({', '.join(':' + name for name in _COLUMNS)})"
_SETTLE = (
    f"{_INSERT} on conflict (id) do update set "
    + ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS if name != "id")
    + " where outcome = 'open'"
)


class Ledger:
    """usage.db of one worker. `open` and `settle` are for the event loop; all SQL runs in the writer's thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.worker = uuid7()
        self.healthy = True
        self.rows_settled = 0
        self._rollups = schema.rollup_statements()
        self._waiting: list[_Write] = []
        self._wake = threading.Condition()
        self._closing = False
        self._lock = _WorkerLock(path.parent / "workers", self.worker)
        self._db = _open(path)
        self._identity = _identity(path)
        self._interrupt_rows_of_the_dead()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def open(self, row: Row) -> None:
        """Queue an open row. It is not waited for: the row's settlement carries everything again."""
        self._put(_Write(row))

    def settle(self, row: Row) -> "asyncio.Future[None]":
        """Queue a final row. The future is done once it is committed."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(_Write(row, future))
        return future

    def close(self, *, keep_lock: bool = False) -> None:
        """Write what waits and stop. Rows that can't be written within a few retries are logged: they are lost.

        `keep_lock`: open rows of this worker are still somebody's to settle, for as long as the process lives.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=10)
        if not keep_lock:
            self._lock.release()

    def _put(self, write: "_Write") -> None:
        with self._wake:
            if self._closing:
                raise RuntimeError("the ledger is closed")
            self._waiting.append(write)
            self._wake.notify()

    def _run(self) -> None:
        attempts_left = 5  # once closing
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                batch, self._waiting = self._waiting, []
            if not batch:
                break
            if self._write(batch):
                continue
            with self._wake:
                self._waiting[:0] = batch
                if self._closing and (attempts_left := attempts_left - 1) <= 0:
                    log.critical("LOST: %d rows can't be written: %s", len(batch), [write.row for write in batch])
                    break
                self._wake.wait(timeout=RETRY_S)
        self._db.close()

    def _write(self, batch: "list[_Write]") -> bool:
        """Commit a batch. False: try again later."""
        try:
            self._reopen_if_replaced()
            self._commit(batch)
        except (OSError, sqlite3.OperationalError, sqlite3.InternalError) as error:
            if self.healthy:
                log.error("usage.db can't be written, requests are refused until it can: %s", error)
            self.healthy = False
            return False
        except Exception:
            if len(batch) == 1:
                log.critical("LOST: a row can't be written: %s", batch[0].row, exc_info=True)
                _tell([batch[0].future], lambda future: future.set_exception(OSError("the row can't be written")))
                return True
            log.exception("a batch of rows can't be written; trying them one by one")
            return self._write_singly(batch)
        if not self.healthy:
            log.warning("usage.db can be written again")
        self.healthy = True
        _tell([write.future for write in batch], lambda future: future.set_result(None))
        return True

    def _write_singly(self, batch: "list[_Write]") -> bool:
        for index, write in enumerate(batch):
            if not self._write([write]):
                with self._wake:
                    self._waiting[:0] = batch[index:]
                    self._wake.wait(timeout=RETRY_S)
                return True
        return True

    def _commit(self, batch: "list[_Write]") -> None:
        settled = {write.row.id for write in batch if write.future}
        with self._db.atomic():
            for write in batch:
                if write.future:
                    self._settle(write.row)
                elif write.row.id not in settled:
                    self._db.conn.execute(_INSERT, msgspec.structs.asdict(write.row))

    def _settle(self, row: Row) -> None:
        """Write the final row and its roll-ups, once: a row that is settled already stays as it is."""
        values: dict[str, Any] = msgspec.structs.asdict(row)
        if self._db.conn.execute(_SETTLE, values).rowcount != 1:
            log.error("the request %s was settled twice; the first one stands", row.id)
            return
        values["ttft_upto_ms"] = schema.ttft_bucket(row.ttft_ms) if row.ttft_ms is not None else None
        for statement in self._rollups:
            self._db.conn.execute(statement, values)
        self.rows_settled += 1

    def _reopen_if_replaced(self) -> None:
        """A file that was deleted or replaced would go on taking rows that nobody could ever read."""
        if _identity(self.path) != self._identity:
            log.error("usage.db was replaced or deleted while running: it is opened anew")
            self._db.close()
            self._db = _open(self.path)
            self._identity = _identity(self.path)

    def _interrupt_rows_of_the_dead(self) -> None:
        """Rows that a dead worker left open become `interrupted`. A living worker holds the lock on its own file."""
        workers = self._db.query("select distinct worker from requests where outcome = 'open'")
        for worker in [row["worker"] for row in workers]:
            if worker == self.worker or not self._lock.is_dead(worker):
                continue
            with self._db.atomic():
                rows = list(self._db.query("select * from requests where outcome = 'open' and worker = ?", [worker]))
                for values in rows:
                    self._settle(Row(**{**values, "outcome": "interrupted"}))
            log.warning("%d requests were interrupted by a crash; they are marked", len(rows))


class _Write(msgspec.Struct, frozen=True):
    """A row to be written; `future`, of a final row, is done when it is."""

    row: Row
    future: "asyncio.Future[None] | None" = None


def _tell(futures: "list[asyncio.Future[None] | None]", result: "Callable[[asyncio.Future[None]], None]") -> None:
    """Finish futures on their event loop: it is woken once for a whole batch."""
    waited_for = [future for future in futures if future]

    def finish() -> None:
        for future in waited_for:
            if not future.done():
                result(future)

    if waited_for:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            waited_for[0].get_loop().call_soon_threadsafe(finish)


class _WorkerLock:
    """A locked file per worker: the kernel frees it however the worker ends, and no PID can be mistaken for another."""

    def __init__(self, folder: Path, worker: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / worker
        self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def is_dead(self, worker: str) -> bool:
        path = self._path.parent / Path(worker or "-").name
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            path.unlink(missing_ok=True)
            return True
        finally:
            os.close(file)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._file)


def _open(path: Path) -> Database:
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path):
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        db = Database(connection)
        db.enable_wal()
        # With WAL this survives the death of the process; a power cut may take the last commits.
        db.execute("pragma synchronous = normal")
        schema.usage.apply(db)
    return db


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino
