"""The commands of scripts/keys, on the keys and teams of keys.db and the teams of config.yaml."""

import argparse
import io
import json
import os
import pwd
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime

from msgspec import UNSET

from gateway.keys import Key, KeyNotFound, KeyProblem, Team, iso, parse_span
from gateway.keystore import Changes, KeyStore
from gateway.limits import NONE
from gateway.settings import Config
from key_options import changes_of, is_limited, limits_of
from key_texts import (
    ShownTeam,
    audit_line,
    audit_table,
    key_line,
    key_table,
    key_text,
    team_line,
    team_table,
)

NOTHING_TO_CHANGE = "nothing to change: give --rpm N or another of the options that --help shows"


class Commands:
    """Each does what its name says and returns what is to be printed. Raises KeyProblem."""

    def __init__(self, store: KeyStore, settings: Config, arguments: argparse.Namespace) -> None:
        self._store = store
        self._settings = settings
        self._arguments = arguments
        self._currency = settings.prices.currency
        self._actor = f"scripts/keys ({_user()})"
        self._now = iso(datetime.now(UTC))

    def run(self) -> str:
        commands: dict[str, Callable[[], str]] = {
            "create": self.create,
            "limits": self.limits,
            "list": self.list_keys,
            "show": lambda: self._shown(self._store.get(self._arguments.name)),
            "rotate": self.rotate,
            "disable": lambda: self._disabled(True),
            "enable": lambda: self._disabled(False),
            "revoke": self.revoke,
            "audit": self.audit,
            "team create": self.create_team,
            "team limits": self.limit_team,
            "team list": self.list_teams,
            "team show": lambda: self._shown_team(self._arguments.name),
            "team delete": self.delete_team,
        }
        return commands[self._arguments.command]()

    def create(self) -> str:
        changes = changes_of(self._arguments, NONE)
        given = {name: getattr(changes, name) for name in Changes.__struct_fields__}
        options = {name: value for name, value in given.items() if value is not UNSET}
        key, _ = self._store.create(self._arguments.name, **options, actor=self._actor, hand_over=self._print)
        if key.state(self._now) == "expired":
            _warn(f"--expires: {self._arguments.expires} is over: this key is expired from the start")
        self._warn_of_team(key)
        return ""

    def limits(self) -> str:
        if changes_of(self._arguments, NONE) == Changes():
            raise KeyProblem(NOTHING_TO_CHANGE)
        name, actor = self._arguments.name, self._actor
        key = self._store.change(name, lambda key: changes_of(self._arguments, key.limits), actor=actor)
        self._warn_of_team(key)
        return self._shown(key)

    def list_keys(self) -> str:
        keys = self._store.list()
        if self._arguments.json:
            return "\n".join(key_line(key, self._now) for key in keys)
        return key_table(keys, self._now, self._currency)

    def rotate(self) -> str:
        overlap = self._arguments.overlap
        try:
            overlap_s = 0 if overlap is None else parse_span(overlap).total_seconds()
        except ValueError as error:
            raise KeyProblem(str(error), "overlap_s") from None
        self._store.rotate(self._arguments.name, overlap_s, actor=self._actor, hand_over=self._print)
        return ""

    def revoke(self) -> str:
        key = self._store.revoke(self._arguments.name, actor=self._actor)
        shown = json.dumps({"id": key.id, "name": key.name, "state": "revoked"})
        return shown if self._arguments.json else f"revoked {key.name}"

    def audit(self) -> str:
        entries = self._store.audit(max(self._arguments.limit, 0))
        if self._arguments.json:
            return "\n".join(map(audit_line, entries))
        return audit_table(entries, self._currency)

    def create_team(self) -> str:
        name = self._arguments.name
        self._not_declared(name)
        self._store.teams.create(name, limits_of(self._arguments, NONE), actor=self._actor)
        return self._shown_team(name)

    def limit_team(self) -> str:
        name = self._arguments.name
        self._not_declared(name)
        if not is_limited(self._arguments):
            raise KeyProblem(NOTHING_TO_CHANGE)
        self._store.teams.change(name, lambda limits: limits_of(self._arguments, limits), actor=self._actor)
        return self._shown_team(name)

    def list_teams(self) -> str:
        teams = self._teams()
        return "\n".join(map(team_line, teams)) if self._arguments.json else team_table(teams, self._currency)

    def delete_team(self) -> str:
        self._not_declared(self._arguments.name)
        team = self._store.teams.delete(self._arguments.name, actor=self._actor)
        return json.dumps({"name": team.name, "state": "deleted"}) if self._arguments.json else f"deleted {team.name}"

    def _disabled(self, disabled: bool) -> str:
        return self._shown(self._store.set_disabled(self._arguments.name, disabled, actor=self._actor))

    def _shown(self, key: Key) -> str:
        return key_line(key, self._now) if self._arguments.json else key_text(key, self._now, self._currency)

    def _print(self, key: Key, secret: str) -> None:
        """Before it is made for good: a key that nobody has seen must not take the place of one that is in use."""
        say(json.dumps({"id": key.id, "name": key.name, "key": secret}) if self._arguments.json else secret)
        if not self._arguments.json:
            _warn(f"This is the key of {key.name}. It is shown this once: only its hash is kept.")

    def _teams(self) -> list[ShownTeam]:
        """Those of config.yaml first: one of the same name in keys.db is not in force."""
        counts = Counter(key.team for key in self._store.list())
        declared = [Team(0, name, limits, "") for name, limits in self._settings.teams.items()]
        made = [team for team in self._store.teams.list() if team.name not in self._settings.teams]
        return [ShownTeam(team, counts[team.name], team.name in self._settings.teams) for team in (*declared, *made)]

    def _shown_team(self, name: str) -> str:
        shown = next((shown for shown in self._teams() if shown.team.name == name), None)
        if shown is None:
            raise KeyNotFound(f"there is no team named {name!r}", "name")
        return team_line(shown) if self._arguments.json else team_table([shown], self._currency)

    def _not_declared(self, name: str) -> None:
        if name in self._settings.teams:
            raise KeyProblem(f"the team {name!r} is declared in {self._arguments.config}; change it there")

    def _warn_of_team(self, key: Key) -> None:
        if key.team is not None and all(shown.team.name != key.team for shown in self._teams()):
            _warn(f"--team: there is no team named {key.team!r} yet; make it: scripts/keys team create {key.team}")


class Unsaid(Exception):
    """What was to be printed could not be."""


def say(text: str) -> None:
    """Print to the end. Raises Unsaid."""
    if sys.stdout is None:
        raise Unsaid("its output is closed")
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        sys.stdout = io.StringIO()  # Python would try once more at its end
        raise Unsaid(f"its output can't be written: {error}") from error


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"user {os.getuid()}"
