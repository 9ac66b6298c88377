"""What is written into usage.db, within transactions of the ledger's: rows and their roll-ups, events, counters."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec

from gateway import schema
from gateway.accounts import SqliteAccounts
from gateway.database import Identity, identity, is_trouble_with_the_file, open_database, transaction
from gateway.quota import LimitEvent, Settlement
from gateway.records import Row, ServerEvent

log = logging.getLogger(__name__)

# Several workers share the file; each holds it for a few milliseconds at a time.
BUSY_TIMEOUT_S = 1.0

_COLUMNS = Row.__struct_fields__
_INSERT = f"insert into requests ({', '.join(_COLUMNS)}) values ({', '.join(':' + name for name in _COLUMNS)})"
# What is known at admission does not change any more, and is not written again: indexes stand on it.
_KNOWN_AT_ADMISSION = {"id", "started_at", "key_id", "key_name", "team", "endpoint", "worker", "client_request_id"}
_WRITE = (
    f"{_INSERT} on conflict (id) do update set "
    + ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS if name not in _KNOWN_AT_ADMISSION)
    + " where outcome = 'open'"
)


class Bookkeeper:
    """One connection to usage.db. Raises what SQLite raises."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rollups = schema.rollup_statements()
        self._identity: Identity | None = None
        self._open()

    def close(self) -> None:
        self._db.close()

    def transaction(self) -> AbstractContextManager[None]:
        """All that is written within it, or nothing."""
        self._reopen_if_replaced()
        return transaction(self._db)

    def open_row(self, row: Row) -> None:
        """A row that is not settled, or what more is known of it."""
        self._db.conn.execute(_WRITE, _storable(row))

    def settle(self, row: Row, settlements: Sequence[Settlement], now: float) -> bool:
        """Write the final row, its roll-ups and what it used, once. False: it is settled already, and stays so."""
        values = _storable(row)
        if self._db.conn.execute(_WRITE, values).rowcount != 1:
            log.error("the request %s was settled twice; the first one stands", row.id)
            return False
        values["ttft_upto_ms"] = schema.ttft_bucket(row.ttft_ms) if row.ttft_ms is not None else None
        for statement in self._rollups:
            self._db.conn.execute(statement, values)
        for settlement in settlements:
            self._count(settlement, row.worker, now)
        return True

    def _count(self, settlement: Settlement, worker: str, now: float) -> None:
        """A fault in the counters costs no row."""
        try:
            for event in self.accounts.settle(settlement, now):
                self.note(event, worker)
        except Exception as error:
            if is_trouble_with_the_file(error):  # all of it is tried again
                raise
            log.exception("what the request %s used is not counted for its limits", settlement.id)

    def note(self, event: ServerEvent | LimitEvent, worker: str) -> None:
        table = "server_events" if isinstance(event, ServerEvent) else "limit_events"
        values = {**_storable(event), "worker": worker}
        columns = f"{', '.join(values)}) values ({', '.join(':' + name for name in values)}"
        self._db.conn.execute(f"insert into {table} ({columns})", values)

    def workers_with_open_rows(self) -> set[str]:
        rows = self._db.query("select distinct worker from requests where outcome = 'open'")
        return {row["worker"] for row in rows}

    def workers_that_hold(self) -> set[str]:
        """Workers whose requests hold what limits count."""
        return {row["worker"] for row in self._db.query("select distinct worker from limit_held")}

    def give_back(self, settlements: Sequence[Settlement], now: float) -> None:
        """A request's row can't be written: what it held is given back, and nothing is counted."""
        for each in settlements:
            self.accounts.settle(Settlement(each.id, each.day, (), each.rules), now)

    def interrupt(self, worker: str, now: float) -> None:
        """A worker is dead: its open rows become `interrupted`, and what they held is given back."""
        with self.transaction():
            rows = list(self._open_rows_of(worker))
            for row in rows:
                self.settle(row, (), now)
            self.accounts.forget_worker(worker)
        if rows:
            log.warning("%d requests were interrupted by a crash; they are marked", len(rows))

    def _open_rows_of(self, worker: str) -> Iterator[Row]:
        open_rows = "select * from requests where outcome = 'open' and worker = ?"
        return (Row(**{**values, "outcome": "interrupted"}) for values in self._db.query(open_rows, [worker]))

    def _open(self) -> None:
        self._db = open_database(self.path, schema.usage, busy_timeout_s=BUSY_TIMEOUT_S)
        self.accounts = SqliteAccounts(self._db.conn)
        self._identity = identity(self.path)

    def _reopen_if_replaced(self) -> None:
        """A file that was deleted or replaced would go on taking rows that nobody could ever read."""
        found = identity(self.path)
        if self._identity is not None and found == self._identity:
            return
        if self._identity is not None:
            log.error("usage.db was deleted or replaced while running: it is opened anew")
            self._identity = None
            self._db.close()
        self._open()


def _storable(row: Row | ServerEvent | LimitEvent) -> dict[str, Any]:
    """A row as SQLite takes it. Clients may send bytes that are no text; they become question marks."""
    values = msgspec.structs.asdict(row)
    for name, value in values.items():
        if isinstance(value, str) and not value.isascii():
            values[name] = value.encode("utf-8", "replace").decode()
    return values
