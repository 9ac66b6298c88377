"""Reads usage.db to answer people: each time on a connection of its own that can't write, and in a thread."""

import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from gateway.threads import in_thread

# Readers wait for nobody in WAL, but for a moment while the file is opened or recovered.
BUSY_TIMEOUT_S = 2.0
# A person waits for the answer. What takes longer reads more than it should.
QUERY_S = 10.0
# Virtual machine steps between two looks at the clock: well below a millisecond.
STEPS = 10_000

type Fact = str | int | float | None


class BooksUnavailable(Exception):
    """usage.db can't be read, or takes too long; `str` says why."""


class Books:
    """usage.db, for reading."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def query(self, sql: str, values: Sequence[Fact] = ()) -> list[dict[str, Any]]:
        """The rows, as column -> value. Blocks. Raises BooksUnavailable."""
        deadline = time.monotonic() + QUERY_S
        try:
            with closing(self._open()) as db:
                db.row_factory = sqlite3.Row
                db.set_progress_handler(lambda: time.monotonic() > deadline, STEPS)
                return [dict(row) for row in db.execute(sql, values)]
        except sqlite3.Error as error:
            raise BooksUnavailable(f"{self._path.name} can't be read: {error}") from error

    async def ask(self, sql: str, values: Sequence[Fact] = ()) -> list[dict[str, Any]]:
        """`query`, in a thread. Raises BooksUnavailable."""
        try:
            return await in_thread(lambda: self.query(sql, values), "books", QUERY_S + BUSY_TIMEOUT_S)
        except TimeoutError as error:
            raise BooksUnavailable(f"{self._path.name} took too long to be read") from error

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)
