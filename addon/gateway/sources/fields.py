"""The fields that a source may give of a key: what they are called, and how each value is read. Nothing is guessed."""

import json
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec

from gateway.limits import Budget, Limits
from gateway.sources import moments

# Other names of the same fields, as databases have them.
ALIASES = {
    "user": "name",
    "user_id": "name",
    "username": "name",
    "key_name": "name",
    "expires": "expires_at",
    "date_expiry": "expires_at",
    "rpm_limit": "rpm",
    "tpm_limit": "tpm",
    "enabled": "active",
    "is_active": "active",
    "is_disabled": "disabled",
    "revoked": "disabled",
    "blocked": "disabled",
    "state": "status",
    "why": "reason",
}
GOOD_STATUS = ("active", "ok", "enabled", "valid")
BAD_STATUS = ("disabled", "inactive", "revoked", "blocked", "suspended")
EXPIRED = "expired"
MAX_WHY = 200
_TRUE, _FALSE = ("1", "true", "yes", "t", "on"), ("0", "false", "no", "f", "off")


class Nonsense(Exception):
    """Expected something else."""


def _text(value: object) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise Nonsense("UTF-8") from None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) and type(value).__name__ in ("UUID", "ObjectId"):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise Nonsense("text")
    return value.strip()


def _number(value: object) -> float:
    if isinstance(value, str | bytes):
        try:
            value = float(Decimal(_text(value)))
        except (ArithmeticError, ValueError):
            raise Nonsense("a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not math.isfinite(value):
        raise Nonsense("a number")
    return float(value)


def _whole(value: object) -> int:
    number = _number(value)
    if number != int(number):
        raise Nonsense("a whole number")
    return int(number)


def _truth(value: object) -> bool:
    text = str(_text(value)).lower() if isinstance(value, str | bytes) else value
    if text in (True, *_TRUE):
        return True
    if text in (False, *_FALSE):
        return False
    raise Nonsense("true or false")


def _names(value: object) -> tuple[str, ...]:
    """A list, JSON's list as text, or names with commas between them. An empty one might be meant as "nothing"."""
    if isinstance(value, str | bytes):
        text = _text(value)
        value = _json(text) if text.startswith("[") else text.split(",")
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) and item.strip() for item in value):
        raise Nonsense("a list of names")
    if not value:
        raise Nonsense("one name at least, or no such field for all")
    return tuple(item.strip() for item in value)


def _ends(value: object) -> str:
    return _moment(value, moments.end)


def _starts(value: object) -> str:
    return _moment(value, moments.start)


def _moment(value: object, read: Callable[[object], str]) -> str:
    try:
        return read(_text(value) if isinstance(value, str | bytes) else value)
    except ValueError:
        raise Nonsense("a time as in 2027-01-31T18:00Z") from None


def _limits(value: object) -> Limits:
    try:
        return msgspec.convert(_json(value), Limits)
    except msgspec.ValidationError as error:
        raise Nonsense(f"limits ({error})") from None


def _budgets(value: object) -> tuple[Budget, ...]:
    try:
        return msgspec.convert(_json(value), tuple[Budget, ...])
    except msgspec.ValidationError as error:
        raise Nonsense(f"a list of budgets ({error})") from None


def _json(value: object) -> object:
    try:
        return json.loads(value) if isinstance(value, str | bytes) else value
    except (ValueError, RecursionError):
        raise Nonsense("JSON") from None


def _status(value: object) -> str:
    status = _text(value).lower()
    known = (*GOOD_STATUS, *BAD_STATUS, EXPIRED)
    if status not in known:
        raise Nonsense(f"one of {', '.join(known)}")
    return status


def _why(value: object) -> str:
    return "".join(filter(str.isprintable, _text(value)))[:MAX_WHY]


# What may be given, and how it is read. ALIASES has other names of the same.
FIELDS: dict[str, Callable[[object], Any]] = {
    "name": _text,
    "team": _text,
    "models": _names,
    "endpoints": _names,
    "networks": _names,
    "rpm": _whole,
    "rps": _number,
    "burst": _whole,
    "tpm": _whole,
    "concurrency": _whole,
    "budgets": _budgets,
    "limits": _limits,
    "weight": _number,
    "priority": _text,
    "not_before": _starts,
    "expires_at": _ends,
    "disabled": _truth,
    "active": _truth,
    "status": _status,
    "allowed": _truth,
    "code": _text,
    "reason": _why,
}
# They say whether a key may come in: nothing is neither yes nor no.
DECISIVE = ("allowed", "active", "disabled", "status")
# Like a field's name, and nothing of the kind.
HARMLESS = ("key", "id", "key_id", "created", "created_at", "updated_at", "access_level")
