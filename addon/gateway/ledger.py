"""The only writer of usage.db: a thread that commits whatever waits as one transaction.

A row is opened at admission and settled once; whoever settles awaits the commit, so that nobody sees the end of an
answer whose row a crash could lose. When the disk fails, rows wait in memory, `healthy` turns false (requests are then
refused rather than served unbooked), and writing is tried again until it works.
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

from gateway import schema
from gateway.database import Identity, identity, open_database, transaction
from gateway.records import Row, ServerEvent, uuid7

log = logging.getLogger(__name__)

RETRY_S = 0.5
# Several workers share the file; each holds it for a few milliseconds at a time.
BUSY_TIMEOUT_S = 1.0
# Rows of refused requests that wait for a broken disk: some ten megabytes of them.
MAX_WAITING_ROWS = 10_000
# What is left when the process ends is tried this often, then logged.
LAST_ATTEMPTS = 5

_COLUMNS = Row.__struct_fields__
_INSERT = f"insert into requests ({', '.join(_COLUMNS)}) values ({', '.join(':' + name for name in _COLUMNS)})"
_EVENT_COLUMNS = ServerEvent.__struct_fields__
_EVENT_VALUES = ", ".join(":" + name for name in _EVENT_COLUMNS)
_WRITE_EVENT = f"insert into server_events ({', '.join(_EVENT_COLUMNS)}) values ({_EVENT_VALUES})"
# What is known at admission does not change any more, and is not written again: indexes stand on it.
_KNOWN_AT_ADMISSION = {"id", "started_at", "key_id", "key_name", "endpoint", "worker", "client_request_id"}
_WRITE = (
    f"{_INSERT} on conflict (id) do update set "
    + ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS if name not in _KNOWN_AT_ADMISSION)
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
        self._db = open_database(path, schema.usage, busy_timeout_s=BUSY_TIMEOUT_S)
        self._identity: Identity | None = identity(path)
        self._interrupt_rows_of_the_dead()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        """The disk has failed for so long that no more rows can be kept in memory."""
        return len(self._waiting) >= MAX_WAITING_ROWS

    def open(self, row: Row) -> None:
        """Queue an open row, or what more is known of it. Nobody waits for it: the settlement carries all again."""
        self._put(_Write(row))

    def settle(self, row: Row) -> "asyncio.Future[None]":
        """Queue a final row. The future is done once it is committed, or fails with OSError if it never can be."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put(_Write(row, future))
        return future

    def note(self, event: ServerEvent) -> None:
        """Queue a server's event. Nobody waits for it; after `close` it is only in the log."""
        if not self._closing:
            self._put(_Write(event))

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
        last_attempts = LAST_ATTEMPTS
        while batch := self._next_batch():
            try:
                left = self._write(batch)
            except BaseException:  # even SystemExit, which mitmproxy's log raises when it can't be written
                self.healthy, left = False, batch
                with contextlib.suppress(BaseException):
                    log.exception("the ledger failed; it tries again")
            if not left:
                continue
            with self._wake:
                self._waiting[:0] = left
                if self._closing:
                    last_attempts -= 1
                if not last_attempts:
                    log.critical("LOST: %d rows can't be written: %s", len(left), [write.row for write in left])
                    break
                self._wake.wait(timeout=RETRY_S)
        self._db.close()

    def _next_batch(self) -> "list[_Write]":
        """Whatever waits; waits for it. Empty at the end."""
        with self._wake:
            while not self._waiting and not self._closing:
                self._wake.wait()
            batch, self._waiting = self._waiting, []
        return batch

    def _write(self, batch: "list[_Write]") -> "list[_Write]":
        """Commit a batch. Returns what has to be tried again later: all of it, or nothing, or the rest."""
        try:
            self._reopen_if_replaced()
            self._commit(batch)
        except Exception as error:
            if _is_trouble_with_the_file(error):
                was_healthy, self.healthy = self.healthy, False
                if was_healthy:
                    log.error("usage.db can't be written, requests are refused until it can: %s", error)
                return batch
            return self._without_the_impossible(batch)
        was_healthy, self.healthy = self.healthy, True
        _tell([write.future for write in batch], lambda future: future.set_result(None))
        if not was_healthy:
            log.warning("usage.db can be written again")
        return []

    def _without_the_impossible(self, batch: "list[_Write]") -> "list[_Write]":
        """One row of a batch can never be written: it must not hold up the others."""
        if len(batch) == 1:
            log.critical("LOST: a row can't be written: %s", batch[0].row, exc_info=True)
            _tell([batch[0].future], lambda future: future.set_exception(OSError("the row can't be written")))
            return []
        for index, write in enumerate(batch):
            if self._write([write]):
                return batch[index:]
        return []

    def _commit(self, batch: "list[_Write]") -> None:
        events = [write.row for write in batch if isinstance(write.row, ServerEvent)]
        final = [write.row for write in batch if isinstance(write.row, Row) and write.future]
        last = {write.row.id: write.row for write in batch if isinstance(write.row, Row)}
        for row in final:
            last.pop(row.id, None)
        with transaction(self._db):
            for row in last.values():
                self._db.conn.execute(_WRITE, _storable(row))
            for event in events:
                self._db.conn.execute(_WRITE_EVENT, _storable(event))
            settled = sum(self._settle(row) for row in final)
        self.rows_settled += settled

    def _settle(self, row: Row) -> bool:
        """Write the final row and its roll-ups, once: a row that is settled already stays as it is."""
        values = _storable(row)
        if self._db.conn.execute(_WRITE, values).rowcount != 1:
            log.error("the request %s was settled twice; the first one stands", row.id)
            return False
        values["ttft_upto_ms"] = schema.ttft_bucket(row.ttft_ms) if row.ttft_ms is not None else None
        for statement in self._rollups:
            self._db.conn.execute(statement, values)
        return True

    def _reopen_if_replaced(self) -> None:
        """A file that was deleted or replaced would go on taking rows that nobody could ever read."""
        found = identity(self.path)
        if self._identity is not None and found == self._identity:
            return
        if self._identity is not None:
            log.error("usage.db was deleted or replaced while running: it is opened anew")
            self._identity = None
            self._db.close()
        self._db = open_database(self.path, schema.usage, busy_timeout_s=BUSY_TIMEOUT_S)
        self._identity = identity(self.path)

    def _interrupt_rows_of_the_dead(self) -> None:
        """Rows that a dead worker left open become `interrupted`. A living worker holds the lock on its own file."""
        workers = self._db.query("select distinct worker from requests where outcome = 'open'")
        for worker in {row["worker"] for row in workers} | self._lock.others():
            if worker == self.worker or not self._lock.is_dead(worker):
                continue
            with transaction(self._db):
                rows = list(self._db.query("select * from requests where outcome = 'open' and worker = ?", [worker]))
                for values in rows:
                    self._settle(Row(**{**values, "outcome": "interrupted"}))
            if rows:
                log.warning("%d requests were interrupted by a crash; they are marked", len(rows))


class _Write(msgspec.Struct, frozen=True):
    """A row to be written; `future`, of a request's final row, is done when it is."""

    row: Row | ServerEvent
    future: "asyncio.Future[None] | None" = None


def _is_trouble_with_the_file(error: Exception) -> bool:
    """Whether an error is the file's, and may pass; others are about the row. Damage is a plain DatabaseError."""
    return isinstance(error, OSError | sqlite3.OperationalError | sqlite3.InternalError) or (
        type(error) is sqlite3.DatabaseError
    )


def _storable(row: Row | ServerEvent) -> dict[str, Any]:
    """A row as SQLite takes it. Clients may send bytes that are no text; they become question marks."""
    values = msgspec.structs.asdict(row)
    for name, value in values.items():
        if isinstance(value, str) and not value.isascii():
            values[name] = value.encode("utf-8", "replace").decode()
    return values


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
        while True:
            self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if os.fstat(self._file).st_nlink:
                break
            os.close(self._file)  # before it was locked, another worker took it for a dead one's

    def others(self) -> set[str]:
        return {path.name for path in self._path.parent.iterdir()} - {self._path.name}

    def is_dead(self, worker: str) -> bool:
        """Whether nobody holds that worker's lock; then its file is removed."""
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
