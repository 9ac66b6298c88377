"""Teams of keys.db: made and changed by name. Keys name their team; one that only config.yaml declares is not here."""

import builtins
from collections.abc import Callable
from datetime import datetime

import msgspec
from sqlite_utils import Database

from gateway import audit
from gateway.audit import Change
from gateway.database import changing
from gateway.key_checks import check_limits, check_new_team
from gateway.keys import InUse, KeyNotFound, NameTaken, Team, iso, team_of
from gateway.limits import NONE, Limits

# Of the keys that keep a team from being deleted, as many are named.
MAX_NAMED = 10


class Teams:
    """Every method is one transaction. `actor`: who does it, for the audit. Raises KeyProblem."""

    def __init__(self, db: Database, now: Callable[[], datetime]) -> None:
        self._db = db
        self._now = now

    def create(self, name: str, limits: Limits = NONE, *, actor: str) -> Team:
        check_new_team(name)
        check_limits(limits)
        row = {"name": name, "limits": msgspec.json.encode(limits).decode(), "created_at": iso(self._now())}
        with changing(self._db):
            if self._find(name):
                raise NameTaken(f"there is a team named {name!r} already; change or delete it", "name")
            self._db.table("teams").insert(row)
            team = self.get(name)
            self._record(actor, Change("create", "team", name, new=_facts(team)))
        return team

    def list(self) -> builtins.list[Team]:
        return [team_of(row) for row in self._db.query("select * from teams order by name")]

    def get(self, name: str) -> Team:
        team = self._find(name)
        if team is None:
            raise KeyNotFound(f"there is no team named {name!r}", "name")
        return team

    def change(self, name: str, limits: Limits | Callable[[Limits], Limits], *, actor: str) -> Team:
        """Its limits from now on, all of them; or what makes them of those it has."""
        with changing(self._db):
            old = self.get(name)
            new = msgspec.structs.replace(old, limits=limits(old.limits) if callable(limits) else limits)
            check_limits(new.limits)
            self._db.table("teams").update(old.id, {"limits": msgspec.json.encode(new.limits).decode()})
            self._record(actor, Change("change", "team", name, old=_facts(old), new=_facts(new)))
        return new

    def delete(self, name: str, *, actor: str) -> Team:
        """Raises InUse while keys name it."""
        with changing(self._db):
            team = self.get(name)
            keys = [row["name"] for row in self._db.query("select name from keys where team = ? order by id", [name])]
            if keys:
                named = ", ".join(keys[:MAX_NAMED]) + (f" and {len(keys) - MAX_NAMED} more" * (len(keys) > MAX_NAMED))
                raise InUse(f"the team {name!r} has keys: {named}; move them to another team first", "name")
            self._db.table("teams").delete(team.id)
            self._record(actor, Change("delete", "team", name, old=_facts(team)))
        return team

    def _find(self, name: str) -> Team | None:
        if not name.isprintable():  # it might be no Unicode, which SQLite can't be asked for
            return None
        row = next(self._db.query("select * from teams where name = ?", [name]), None)
        return team_of(row) if row else None

    def _record(self, actor: str, change: Change) -> None:
        audit.record(self._db, self._now(), actor, change)


def _facts(team: Team) -> dict[str, object]:
    return {"name": team.name, "limits": msgspec.to_builtins(team.limits)}
