"""A key and a team as they are kept in keys.db, what can be wrong with them, and how their times are written."""

import hashlib
import re
from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec

from gateway.limits import NONE, Limits

# What a key's requests are when they wait for a server: a class of a lower number goes first.
PRIORITIES = {"high": 0, "normal": 1, "low": 2}


class KeyProblem(Exception):
    """A key or a team can't be made or changed; `str` says why, to a person.

    `field`: which part of what was given is at fault, named as in `Changes` ("weight", "networks[1]", "limits.rpm").
    """

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.reason = reason
        self.field = field


class KeyNotFound(KeyProblem):
    """There is no key or team of this name or id."""


class NameTaken(KeyProblem):
    """There is a key or team of this name already."""


class InUse(KeyProblem):
    """A team that keys still name can't be deleted."""


class KeysUnavailable(Exception):
    """keys.db can't be read. Nobody may come in until it can."""


class Key(msgspec.Struct, frozen=True):
    """A key as it is kept: times are UTC ISO 8601; `models` and `endpoints` are patterns, `networks` are CIDRs (of all
    three, none named means all).

    `weight`: its share among the waiting keys of its class, relative to theirs. `priority`: a name of PRIORITIES.
    `old_until`: after a rotation, when the key before this one ends.
    """

    id: int
    name: str
    hint: str
    created_at: str
    disabled: bool
    expires_at: str | None
    models: tuple[str, ...]
    weight: float = 1
    priority: str = "normal"
    team: str | None = None
    limits: Limits = NONE
    endpoints: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    not_before: str | None = None
    old_until: str | None = None

    def state(self, now: str) -> str:
        if self.disabled:
            return "disabled"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return "not_yet_valid" if self.not_before is not None and now < self.not_before else "active"


class Team(msgspec.Struct, frozen=True):
    """Keys that name it share its limits, on top of their own."""

    id: int
    name: str
    limits: Limits
    created_at: str


def key_of(row: dict[str, Any]) -> Key:
    """A row of `keys`. Raises msgspec.DecodeError, and ValidationError for what a key can't be."""
    lists = {column: msgspec.json.decode(row[column], type=list[str]) for column in ("models", "endpoints", "networks")}
    limits = msgspec.json.decode(row["limits"], type=Limits)
    return msgspec.convert({**row, **lists, "limits": limits, "disabled": bool(row["disabled"])}, Key)


def team_of(row: dict[str, Any]) -> Team:
    """A row of `teams`. Raises msgspec.DecodeError."""
    return msgspec.convert({**row, "limits": msgspec.json.decode(row["limits"], type=Limits)}, Team)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_expiry(text: str, now: datetime) -> str:
    """A span (90d, 12h), a date (valid through it) or an ISO 8601 time -> UTC ISO 8601. Raises ValueError."""
    return _parse_time(text, now, timedelta(days=1))


def parse_start(text: str, now: datetime) -> str:
    """The same, but a date means its beginning."""
    return _parse_time(text, now, timedelta())


def parse_span(text: str) -> timedelta:
    """90d, 12h, 30m, 45s. Raises ValueError."""
    span = re.fullmatch(r"([0-9]{1,6})([dhms])", text)
    if not span:
        raise ValueError(f"expected a span such as 90d, 12h, 30m; got {text!r}")
    unit = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}[span[2]]
    return timedelta(**{unit: int(span[1])})


def _parse_time(text: str, now: datetime, of_a_date: timedelta) -> str:
    try:
        if re.fullmatch(r"[0-9]{1,6}[dhms]", text):
            return iso(now + parse_span(text))
        moment = datetime.fromisoformat(text)
        if "W" in text:  # weeks (2027-W05) are dates to Python, and few people mean their first day
            raise ValueError(text)
        if _is_date(text):
            moment += of_a_date
        return iso(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except OverflowError:
        raise ValueError(f"expected a nearer time than {text!r}; leave it out for none") from None
    except ValueError:
        raise ValueError(
            f"expected a date (2027-01-31), a time (2027-01-31T18:00Z) or 90d, 12h, 30m; got {text!r}"
        ) from None


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
