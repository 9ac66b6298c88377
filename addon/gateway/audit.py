"""Who changed what, and when: a row of keys.db's `audit` for each change, written in the change's own transaction."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec
from sqlite_utils import Database

from gateway.keys import iso


class Difference(msgspec.Struct, frozen=True):
    """A field before and after. None: there was nothing, or there is nothing now."""

    old: object = None
    new: object = None


class Entry(msgspec.Struct, frozen=True):
    """`kind`: "key", "team", "server", "alias" or "config". `detail`: what changed; secrets only as hints."""

    id: int
    at: str
    actor: str
    action: str
    kind: str
    name: str
    detail: dict[str, Difference]


class Change(msgspec.Struct, frozen=True):
    """What is to be written down. `old` {}: it was made; `new` {}: it was deleted."""

    action: str
    kind: str
    name: str
    old: Mapping[str, object] = {}
    new: Mapping[str, object] = {}

    def differences(self) -> dict[str, Difference]:
        """What is empty on both sides is not worth a word."""
        fields = dict.fromkeys((*self.old, *self.new))
        pairs = {field: Difference(self.old.get(field), self.new.get(field)) for field in fields}
        return {field: pair for field, pair in pairs.items() if pair.old != pair.new and (pair.old or pair.new)}


def record(db: Database, at: datetime, actor: str, change: Change) -> None:
    """To be called within the transaction that makes the change."""
    db.table("audit").insert(
        {
            "at": iso(at),
            "actor": actor,
            "action": change.action,
            "kind": change.kind,
            "name": change.name,
            "detail": msgspec.json.encode(change.differences()).decode(),
        }
    )


def record_reload(db: Database, at: datetime, reason: str, facts: Mapping[str, object]) -> None:
    """That the config file was taken over. Of several workers that read the same one, one row tells it."""
    change = Change("reload", "config", "config file", new=facts)
    newest = db.query("select * from audit where kind = 'config' order by id desc limit 1")
    if not any(_entry(row).detail == change.differences() for row in newest):
        record(db, at, f"config file ({reason})", change)


def entries(db: Database, limit: int, offset: int = 0) -> list[Entry]:
    """The newest first."""
    rows = db.query("select * from audit order by id desc limit ? offset ?", [limit, offset])
    return [_entry(row) for row in rows]


def _entry(row: dict[str, Any]) -> Entry:
    return msgspec.convert({**row, "detail": msgspec.json.decode(row["detail"], type=dict[str, Difference])}, Entry)


def total(db: Database) -> int:
    (count,) = db.conn.execute("select count(*) from audit").fetchone()
    return int(count)
