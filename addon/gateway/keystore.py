"""Makes and changes what stands in keys.db. Only the SHA-256 of a key is kept; of 256 random bits, a slow hash would
buy nothing.
"""

import builtins
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from gateway import audit
from gateway.audit import Change
from gateway.database import changing
from gateway.key_checks import check_key, check_new_name
from gateway.keyreader import KeyReader as KeyReader
from gateway.keys import PRIORITIES as PRIORITIES
from gateway.keys import InUse as InUse
from gateway.keys import Key as Key
from gateway.keys import KeyNotFound as KeyNotFound
from gateway.keys import KeyProblem as KeyProblem
from gateway.keys import KeysUnavailable as KeysUnavailable
from gateway.keys import NameTaken as NameTaken
from gateway.keys import Team as Team
from gateway.keys import hash_key as hash_key
from gateway.keys import iso, key_of, parse_expiry, parse_start
from gateway.keys_schema import open_keys
from gateway.limits import NONE, Limits
from gateway.teams import Teams

ACTOR = "scripts/keys"

MAX_ID = 2**63 - 1

# Gives a new key to whom it is for. When it raises, the key was not made.
type HandOver = Callable[[Key, str], None]


class Changes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to change of a key; what is left out stays. None: no team, no such time.

    `expires_at`, `not_before`: as `keys.parse_expiry` and `parse_start` read them.
    """

    name: str | UnsetType = UNSET
    disabled: bool | UnsetType = UNSET
    expires_at: str | UnsetType | None = UNSET
    not_before: str | UnsetType | None = UNSET
    models: tuple[str, ...] | UnsetType = UNSET
    endpoints: tuple[str, ...] | UnsetType = UNSET
    networks: tuple[str, ...] | UnsetType = UNSET
    weight: float | UnsetType = UNSET
    priority: str | UnsetType = UNSET
    team: str | UnsetType | None = UNSET
    limits: Limits | UnsetType = UNSET


class KeyStore:
    """Keys, by name or by id; `teams`; and the audit of both. Every method is one transaction and raises KeyProblem.

    `actor`: who does it, for the audit. `now`: the time. Not `create`: the file must be there, or OSError.
    """

    def __init__(
        self, path: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC), *, create: bool = True
    ) -> None:
        self._db = open_keys(path, create=create)
        self._now = now
        self.teams = Teams(self._db, now)

    def close(self) -> None:
        self._db.close()

    def create(
        self,
        name: str,
        *,
        models: tuple[str, ...] = (),
        expires_at: str | None = None,
        not_before: str | None = None,
        weight: float = 1,
        priority: str = "normal",
        team: str | None = None,
        limits: Limits = NONE,
        endpoints: tuple[str, ...] = (),
        networks: tuple[str, ...] = (),
        actor: str = ACTOR,
        hand_over: HandOver = lambda key, secret: None,
    ) -> tuple[Key, str]:
        """Returns the record and the key itself, which is nowhere kept. Times as in `Changes`."""
        secret = _new_key()
        now = self._now()
        key = Key(
            id=0,
            name=name,
            hint=_hint(secret),
            created_at=iso(now),
            disabled=False,
            expires_at=_time("expires_at", expires_at, now),
            models=models,
            weight=weight,
            priority=priority,
            team=team,
            limits=limits,
            endpoints=endpoints,
            networks=networks,
            not_before=_time("not_before", not_before, now),
        )
        _check_new(key)
        with changing(self._db):
            self._free(name)
            self._db.table("keys").insert({**_columns(key), "hash": hash_key(secret)})
            made = self.get(name)
            self._record(actor, Change("create", "key", name, new=_facts(made)))
            hand_over(made, secret)
        return made, secret

    def list(self) -> builtins.list[Key]:
        return [key_of(row) for row in self._db.query("select * from keys order by id")]

    def get(self, key: str | int) -> Key:
        column, known_as = ("id", "with the id") if isinstance(key, int) else ("name", "named")
        # SQLite can't be asked for numbers of more than 64 bits, nor for text that is no Unicode.
        can_be = 0 < key <= MAX_ID if isinstance(key, int) else key.isprintable()
        row = next(self._db.query(f"select * from keys where {column} = ?", [key]), None) if can_be else None
        if row is None:
            raise KeyNotFound(f"there is no key {known_as} {key!r}", column)
        return key_of(row)

    def change(
        self, key: str | int, changes: Changes | Callable[[Key], Changes], *, actor: str = ACTOR, action: str = "change"
    ) -> Key:
        """`changes`: what to change, or what says it of the key as it is."""
        with changing(self._db):
            old = self.get(key)
            new = _changed(old, changes(old) if callable(changes) else changes, self._now())
            _check_new(new, old)
            if new.name != old.name:
                self._free(new.name)
            self._db.table("keys").update(old.id, _columns(new))
            self._record(actor, Change(action, "key", old.name, old=_facts(old), new=_facts(new)))
        return new

    def set_disabled(self, key: str | int, disabled: bool, *, actor: str = ACTOR) -> Key:
        return self.change(key, Changes(disabled=disabled), actor=actor, action="disable" if disabled else "enable")

    def rotate(
        self,
        key: str | int,
        overlap_s: float = 0,
        *,
        actor: str = ACTOR,
        hand_over: HandOver = lambda key, secret: None,
    ) -> tuple[Key, str]:
        """A new key for the same name and rules. The one before it holds for `overlap_s` more; any older one ends."""
        secret = _new_key()
        until = _until(self._now(), overlap_s)
        with changing(self._db):
            old = self.get(key)
            new = msgspec.structs.replace(old, hint=_hint(secret), old_until=until)
            self._db.conn.execute(
                "update keys set hash = ?, hint = ?, old_hash = iif(?, hash, null), old_until = ? where id = ?",
                [hash_key(secret), new.hint, until is not None, until, old.id],
            )
            self._record(actor, Change("rotate", "key", old.name, old=_facts(old), new=_facts(new)))
            hand_over(new, secret)
        return new, secret

    def revoke(self, key: str | int, *, actor: str = ACTOR) -> Key:
        """Delete the key. Rows of `requests` keep its id and name."""
        with changing(self._db):
            old = self.get(key)
            self._db.table("keys").delete(old.id)
            self._record(actor, Change("revoke", "key", old.name, old=_facts(old)))
        return old

    def audit(self, limit: int, offset: int = 0) -> builtins.list[audit.Entry]:
        """The newest first."""
        return audit.entries(self._db, limit, offset)

    def audit_total(self) -> int:
        return audit.total(self._db)

    def _free(self, name: str) -> None:
        if next(self._db.query("select id from keys where name = ?", [name]), None) is not None:
            raise NameTaken(
                f"there is a key named {name!r} already; revoke it, rotate it or choose another name", "name"
            )

    def _record(self, actor: str, change: Change) -> None:
        audit.record(self._db, self._now(), actor, change)


def _check_new(key: Key, old: Key | None = None) -> None:
    check_key(key)
    if old is None or key.name != old.name:
        check_new_name(key.name)
    if key.team is not None and (old is None or key.team != old.team):
        check_new_name(key.team, "team")


def _new_key() -> str:
    return "sk-" + secrets.token_urlsafe(32)


def _hint(secret: str) -> str:
    """Enough of a key to recognise it by, far too little to guess it from."""
    return f"{secret[:7]}…{secret[-4:]}"


def _changed(key: Key, changes: Changes, now: datetime) -> Key:
    given = {name: value for name, value in msgspec.structs.asdict(changes).items() if value is not UNSET}
    for field in ("expires_at", "not_before"):
        if field in given:
            given[field] = _time(field, given[field], now)
    return msgspec.structs.replace(key, **given)


def _time(field: str, text: str | None, now: datetime) -> str | None:
    if text is None:
        return None
    try:
        return parse_expiry(text, now) if field == "expires_at" else parse_start(text, now)
    except ValueError as error:
        raise KeyProblem(str(error), field) from None


def _until(now: datetime, overlap_s: float) -> str | None:
    if not 0 <= overlap_s <= timedelta(days=3650).total_seconds():  # not a number is not either
        raise KeyProblem(f"expected seconds, 0 or more, at most ten years; got {overlap_s!r}", "overlap_s")
    return iso(now + timedelta(seconds=overlap_s)) if overlap_s else None


def _columns(key: Key) -> dict[str, object]:
    """What a row of `keys` holds of a record; the hashes are not in it."""
    columns = {name: value for name, value in msgspec.structs.asdict(key).items() if name != "id"}
    for name in ("models", "endpoints", "networks", "limits"):
        columns[name] = msgspec.json.encode(columns[name]).decode()
    return columns


def _facts(key: Key) -> dict[str, object]:
    facts = msgspec.to_builtins(key)
    return {name: value for name, value in facts.items() if name != "created_at"}
