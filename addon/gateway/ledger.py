"""The only writer of usage.db: a thread that commits whatever waits as one transaction, in the order of its coming.

A row is opened at admission and settled once; whoever settles awaits the commit, so that nobody sees the end of an
answer whose row a crash could lose. What limits count is in the same file, and in the same commit as the row that it
is about. When the disk fails, rows wait in memory, `healthy` turns false (requests are then refused rather than served
unbooked), and writing is tried again until it works.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from gateway.bookkeeper import Bookkeeper
from gateway.database import is_trouble_with_the_file
from gateway.limits import Rule
from gateway.quota import Ask, CountersUnavailable, Decision, LimitEvent, Settlement, Standing
from gateway.records import Row, ServerEvent, uuid7
from gateway.worker_lock import WorkerLock

log = logging.getLogger(__name__)

RETRY_S = 0.5
# Rows of refused requests that wait for a broken disk: some ten megabytes of them.
MAX_WAITING_ROWS = 10_000
# What is left when the process ends is tried this often, then logged.
LAST_ATTEMPTS = 5


class Ledger:
    """usage.db of one worker. Its methods are for the event loop; all SQL runs in the writer's thread.

    `clock`: seconds since 1970, for what limits count.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.worker = uuid7()
        self.healthy = True
        self.rows_settled = 0
        self._clock = clock
        self._waiting: list[_Entry] = []
        self._wake = threading.Condition()
        self._closing = False
        self._lock = WorkerLock(path.parent / "workers", self.worker)
        self._books = Bookkeeper(path)
        self._interrupt_rows_of_the_dead()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path:
        return self._books.path

    @property
    def is_full(self) -> bool:
        """The disk has failed for so long that no more rows can be kept in memory."""
        return len(self._waiting) >= MAX_WAITING_ROWS

    def open(self, row: Row) -> None:
        """Queue an open row, or what more is known of it. Nobody waits for it: the settlement carries all again."""
        self._put(_Entry(row, lambda: self._books.open_row(row)))

    def settle(self, row: Row, settlements: Sequence[Settlement] = ()) -> "asyncio.Future[None]":
        """Queue a final row, with what it means to the counters. The future is done once both are committed, or fails
        with OSError if they never can be.
        """
        write = partial(self._settle, row, settlements)
        return self._await(_Entry(row, write, is_final=True, give_up=partial(self._give_up, settlements)))

    def note(self, event: ServerEvent | LimitEvent) -> None:
        """Queue an event. Nobody waits for it; after `close` it is only in the log."""
        if not self._closing:
            self._put(_Entry(event, lambda: self._books.note(event, self.worker)))

    async def admit(self, ask: Ask) -> Decision:
        """Let a request in, or not. Raises CountersUnavailable."""
        entry = _Entry(None, lambda: self._books.accounts.admit(ask, self._clock()))
        decision: Decision = await self._await(entry)
        return decision

    async def standings(self, rules: tuple[Rule, ...]) -> tuple[Standing, ...]:
        """How much of these is used now. Raises CountersUnavailable."""
        entry = _Entry(None, lambda: self._books.accounts.standings(rules, self._clock()))
        standings: tuple[Standing, ...] = await self._await(entry)
        return standings

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

    def _await(self, entry: "_Entry") -> "asyncio.Future[Any]":
        entry.future = asyncio.get_running_loop().create_future()
        self._put(entry)
        return entry.future

    def _put(self, entry: "_Entry") -> None:
        with self._wake:
            if self._closing:
                raise RuntimeError("the ledger is closed")
            self._waiting.append(entry)
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
            left = _without_questions(left)
            if not left:
                continue
            with self._wake:
                self._waiting[:0] = left
                if self._closing:
                    last_attempts -= 1
                if not last_attempts:
                    log.critical("LOST: %d rows can't be written: %s", len(left), [entry.row for entry in left])
                    break
                self._wake.wait(timeout=RETRY_S)
        self._books.close()

    def _next_batch(self) -> "list[_Entry]":
        """Whatever waits; waits for it. Empty at the end."""
        with self._wake:
            while not self._waiting and not self._closing:
                self._wake.wait()
            batch, self._waiting = self._waiting, []
        return batch

    def _write(self, batch: "list[_Entry]") -> "list[_Entry]":
        """Commit a batch. Returns what has to be tried again later: all of it, or nothing, or the rest."""
        try:
            results = self._commit(batch)
        except Exception as error:
            if is_trouble_with_the_file(error):
                was_healthy, self.healthy = self.healthy, False
                if was_healthy:
                    log.error("usage.db can't be written, requests are refused until it can: %s", error)
                return batch
            return self._without_the_impossible(batch)
        was_healthy, self.healthy = self.healthy, True
        self.rows_settled += sum(entry.is_final and bool(result) for entry, result in results)
        _tell([partial(_resolve, entry.future, result) for entry, result in results if entry.future], batch)
        if not was_healthy:
            log.warning("usage.db can be written again")
        return []

    def _without_the_impossible(self, batch: "list[_Entry]") -> "list[_Entry]":
        """One entry of a batch can never be written: it must not hold up the others."""
        if len(batch) == 1:
            (entry,) = batch
            if entry.row is None:
                log.error("a limit can't be decided on", exc_info=True)
                _without_questions(batch)
                return []
            log.critical("LOST: a row can't be written: %s", entry.row, exc_info=True)
            try:
                entry.give_up()
            except Exception:
                log.exception("what its request held is not given back before the next start")
            if entry.future:
                _tell([partial(_reject, entry.future, OSError("the row can't be written"))], batch)
            return []
        for index, entry in enumerate(batch):
            if self._write([entry]):
                return batch[index:]
        return []

    def _commit(self, batch: "list[_Entry]") -> "list[tuple[_Entry, Any]]":
        settled = {entry.row.id for entry in batch if entry.is_final and isinstance(entry.row, Row)}
        with self._books.transaction():
            return [
                (entry, entry.write())
                for entry in batch
                if entry.is_final or not (isinstance(entry.row, Row) and entry.row.id in settled)
            ]

    def _settle(self, row: Row, settlements: Sequence[Settlement]) -> bool:
        return self._books.settle(row, settlements, self._clock())

    def _give_up(self, settlements: Sequence[Settlement]) -> None:
        with self._books.transaction():
            self._books.give_back(settlements, self._clock())

    def _interrupt_rows_of_the_dead(self) -> None:
        """Rows that a dead worker left open become `interrupted`. A living worker holds the lock on its own file."""
        known = self._books.workers_with_open_rows() | self._books.workers_that_hold() | self._lock.others()
        for worker in known - {self.worker}:
            if self._lock.is_dead(worker):
                self._books.interrupt(worker, self._clock())
        with self._books.transaction():
            self._books.accounts.tidy(self._clock())


class _Entry(msgspec.Struct):
    """What is to be written: `write` does it, within a transaction. `future` is done with its result once that is
    committed. `give_up`: what is left to do when it can't be. `row` None: a question, which is asked again rather than
    kept when the disk fails.
    """

    row: Row | ServerEvent | LimitEvent | None
    write: Callable[[], Any]
    is_final: bool = False
    give_up: Callable[[], None] = lambda: None
    future: "asyncio.Future[Any] | None" = None


def _without_questions(entries: "list[_Entry]") -> "list[_Entry]":
    """Whoever asked a question is told that there is no answer."""
    asked = [entry for entry in entries if entry.row is None and entry.future]
    unavailable = CountersUnavailable("usage.db can't be written")
    _tell([partial(_reject, entry.future, unavailable) for entry in asked if entry.future], asked)
    return [entry for entry in entries if entry.row is not None]


def _resolve(future: "asyncio.Future[Any]", result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _reject(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _tell(steps: Sequence[Callable[[], None]], entries: "Sequence[_Entry]") -> None:
    """Finish futures on their event loop: it is woken once for a whole batch."""
    loop = next((entry.future.get_loop() for entry in entries if entry.future), None)

    def finish() -> None:
        for step in steps:
            step()

    if loop and steps:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(finish)
