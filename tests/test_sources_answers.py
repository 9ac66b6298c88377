"""What a source gives -> a key, a refusal, or an error that names the field."""

from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.keys import Key
from gateway.limits import Budget, Limits
from gateway.sources.answers import Reader, read
from gateway.sources.moments import NEVER
from gateway.sources.settings import Lua
from gateway.sources.source import Refused, SourceFailed

A = Key(id=0, name="a", hint="", created_at="", disabled=False, expires_at=None, models=())
MONTH = Budget(per="month", tokens=5)

KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a name alone": ({}, {}),
    "null is left out": ({"rpm": None, "models": None, "team": None, "expires": None}, {}),
    "others are not looked at": ({"id": 7, "secret": "x", "email": "a@b", "created_at": "never"}, {}),
    "a team": ({"team": "t"}, {"team": "t"}),
    "a list": ({"models": ["m", "n*"]}, {"models": ("m", "n*")}),
    "a list as JSON": ({"models": '["m", "n*"]'}, {"models": ("m", "n*")}),
    "a list with commas": ({"models": "m, n*"}, {"models": ("m", "n*")}),
    "endpoints and networks": (
        {"endpoints": "/v1/embeddings", "networks": "10.0.0.0/8,::1"},
        {"endpoints": ("/v1/embeddings",), "networks": ("10.0.0.0/8", "::1")},
    ),
    "limits": (
        {"rpm": 1, "rps": 1.5, "burst": 3, "tpm": 2, "concurrency": 0},
        {"limits": Limits(rpm=1, rps=1.5, burst=3, tpm=2, concurrency=0)},
    ),
    "limits as texts": ({"rpm": "1", "rps": "0.5"}, {"limits": Limits(rpm=1, rps=0.5)}),
    "limits as a database has them": ({"rpm": Decimal(60), "tpm": 5.0}, {"limits": Limits(rpm=60, tpm=5)}),
    "smol-llm-proxy's names": ({"rpm_limit": 1, "tpm_limit": 2, "active": 1}, {"limits": Limits(rpm=1, tpm=2)}),
    "limits within": ({"limits": {"rpm": 1}, "tpm": 2}, {"limits": Limits(rpm=1, tpm=2)}),
    "limits as JSON": ({"limits": '{"rpm": 1}'}, {"limits": Limits(rpm=1)}),
    "budgets": ({"budgets": '[{"per": "month", "tokens": 5}]'}, {"limits": Limits(budgets=(MONTH,))}),
    "place in the queue": ({"weight": "2.5", "priority": "high"}, {"weight": 2.5, "priority": "high"}),
    "a time": ({"expires": "2030-01-31T18:00:00+01:00"}, {"expires_at": "2030-01-31T17:00:00.000Z"}),
    "a time without a zone": ({"expires_at": "2030-01-31 18:00:00"}, {"expires_at": "2030-01-31T18:00:00.000Z"}),
    "a date, through it": ({"date_expiry": "2030-01-31"}, {"expires_at": "2030-02-01T00:00:00.000Z"}),
    "a date to begin at": ({"not_before": date(2030, 1, 31)}, {"not_before": "2030-01-31T00:00:00.000Z"}),
    "a driver's time": (
        {"expires": datetime(2030, 1, 31, tzinfo=UTC).replace(tzinfo=None)},
        {"expires_at": "2030-01-31T00:00:00.000Z"},
    ),
    "a driver's time with a zone": (
        {"expires": datetime(2030, 1, 31, tzinfo=UTC)},
        {"expires_at": "2030-01-31T00:00:00.000Z"},
    ),
    "seconds since 1970": ({"expires": 1893456000}, {"expires_at": "2030-01-01T00:00:00.000Z"}),
    "seconds as text": ({"expires": "1893456000"}, {"expires_at": "2030-01-01T00:00:00.000Z"}),
    "milliseconds since 1970": ({"expires": 1893456000000}, {"expires_at": "2030-01-01T00:00:00.000Z"}),
    "milliseconds as text": ({"expires": "1577836800000"}, {"expires_at": "2020-01-01T00:00:00.000Z"}),
    "never, as a date": ({"expires": "9999-12-31"}, {"expires_at": NEVER}),
    "never, as a driver's date": ({"expires": date.max}, {"expires_at": NEVER}),
    "never, as a time": ({"expires": "9999-12-31T23:59:59.999999Z"}, {"expires_at": NEVER}),
    "never, as a driver's time": ({"expires": datetime.max.replace(tzinfo=UTC)}, {"expires_at": NEVER}),
    "never, west of Greenwich": ({"expires": "9999-12-31T23:59:59-05:00"}, {"expires_at": NEVER}),
    "never, in PostgreSQL's word": ({"expires": "infinity"}, {"expires_at": NEVER}),
    "after the year 9999": ({"expires": "10000-01-01 00:00:00+00"}, {"expires_at": NEVER}),
    "not before then": ({"not_before": "9999-12-31"}, {"not_before": "9999-12-31T00:00:00.000Z"}),
    "disabled": ({"disabled": True}, {"disabled": True}),
    "disabled, as text": ({"disabled": "true"}, {"disabled": True}),
    "not active": ({"active": 0}, {"disabled": True}),
    "not active and not disabled": ({"active": 0, "disabled": 0}, {"disabled": True}),
    "revoked": ({"revoked": "1"}, {"disabled": True}),
    "a bad status": ({"status": "Suspended"}, {"disabled": True}),
    "a good status": ({"status": "active"}, {}),
    "expired, by its status": ({"status": "expired"}, {"expires_at": ""}),
    "expired, and of use some day": ({"status": "expired", "not_before": "2020-01-01"}, {"expires_at": ""}),
    "names in capitals": ({"RPM": 1, "Team": "t"}, {"limits": Limits(rpm=1), "team": "t"}),
}


@pytest.mark.parametrize(("given", "expected"), KEYS.values(), ids=KEYS)
def test_keys(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read({"name": "a", **given}) == msgspec.structs.replace(A, **expected)


NAMES = ["name", "user", "username", "user_id", "key_name", "NAME"]


@pytest.mark.parametrize("field", NAMES)
def test_who_it_is(field: str) -> None:
    assert read({field: "a"}) == A
    assert read({field: 7}) == msgspec.structs.replace(A, name="7")


NOT_LET_IN: dict[str, tuple[object, object]] = {
    "not known": (None, None),
    "no": (False, Refused("key_disabled")),
    "not allowed": ({"allowed": False}, Refused("key_disabled")),
    "why": ({"allowed": False, "reason": "not paid\n"}, Refused("key_disabled", "not paid")),
    "why, in a code": ({"allowed": False, "code": "key_expired", "name": "a"}, Refused("key_expired")),
    "a code of nobody": ({"allowed": False, "code": "hugo"}, Refused("key_disabled")),
    "a long story": ({"allowed": 0, "reason": "x" * 999}, Refused("key_disabled", "x" * 200)),
}


@pytest.mark.parametrize(("given", "expected"), NOT_LET_IN.values(), ids=NOT_LET_IN)
def test_not_let_in(given: object, expected: object) -> None:
    assert read(given) == expected


NONSENSE: dict[str, tuple[object, str]] = {
    "a text": ("a", "str instead of fields"),
    "yes": (True, "bool instead of fields"),
    "a list": ([{"name": "a"}], "list instead of fields"),
    "no fields": ({}, "name: missing"),
    "no name": ({"rpm": 1}, "name: missing"),
    "a name that is none": ({"name": ["a"]}, "name: expected text, got list"),
    "a long name": ({"name": "a" * 201}, "name"),
    "two names": ({"name": "a", "user": "b"}, "'user': says the same"),
    "a number in words": ({"name": "a", "rpm": "sk-123"}, "rpm: expected a number, got str"),
    "true as a number": ({"name": "a", "rpm": True}, "rpm: expected a number"),
    "not a number": ({"name": "a", "rps": float("nan")}, "rps: expected a number"),
    "not a number, as text": ({"name": "a", "rps": "nan"}, "rps: expected a number"),
    "not a number at all": ({"name": "a", "rps": "sNaN"}, "rps: expected a number"),
    "endless": ({"name": "a", "tpm": "1e999"}, "tpm: expected a"),
    "half": ({"name": "a", "rpm": 0.5}, "rpm: expected a whole number"),
    "negative": ({"name": "a", "concurrency": -1}, "concurrency"),
    "an empty number": ({"name": "a", "rpm": ""}, "rpm: expected text"),
    "burst alone": ({"name": "a", "burst": 1}, "burst"),
    "limits twice": ({"name": "a", "rpm": 1, "limits": {"rpm": 2}}, "rpm: stands within limits"),
    "limits with a strange one": ({"name": "a", "limits": {"rmp": 2}}, "limits: expected limits"),
    "limits that are no JSON": ({"name": "a", "limits": "{"}, "limits: expected JSON"),
    "a budget of nothing": ({"name": "a", "budgets": [{"per": "month"}]}, "budgets"),
    "a mistyped limit": ({"name": "a", "rmp": 5}, "'rmp': not known"),
    "a mistyped restriction": ({"name": "a", "model": "m"}, "'model': not known; is 'models' meant?"),
    "models a number": ({"name": "a", "models": 5}, "models: expected a list"),
    "models empty": ({"name": "a", "models": ""}, "models: expected text"),
    "a model that is empty": ({"name": "a", "models": "m,,n"}, "models: expected a list"),
    "a model that is a number": ({"name": "a", "models": "[1]"}, "models: expected a list"),
    "a wrong pattern": ({"name": "a", "models": ["/(/"]}, "models"),
    "a wrong network": ({"name": "a", "networks": ["10.0.0.1/8"]}, "networks"),
    "a wrong endpoint": ({"name": "a", "endpoints": ["chat"]}, "endpoints"),
    "no time": ({"name": "a", "expires": "soon"}, "expires: expected a time"),
    "an empty time": ({"name": "a", "expires": ""}, "expires: expected"),
    "a time that is true": ({"name": "a", "expires": True}, "expires: expected a time"),
    "a time in microseconds": ({"name": "a", "expires": 1893456000000000}, "expires: expected a time"),
    "a time of no end": ({"name": "a", "expires": float("inf")}, "expires: expected a time"),
    "a very long number": ({"name": "a", "expires": 10**400}, "expires: expected a time"),
    "a very long number as text": ({"name": "a", "expires": "1" * 5000}, "expires: expected a time"),
    "before all times": ({"name": "a", "expires": "-infinity"}, "expires: expected a time"),
    "before Christ": ({"name": "a", "expires": "0044-03-15 BC"}, "expires: expected a time"),
    "before the year 1": ({"name": "a", "not_before": "0001-01-01T00:00+01:00"}, "not_before: expected a time"),
    "no models": ({"name": "a", "models": []}, "models: expected one name at least"),
    "no models, as JSON": ({"name": "a", "models": "[]"}, "models: expected one name at least"),
    "no endpoints": ({"name": "a", "endpoints": []}, "endpoints: expected one name at least"),
    "no networks": ({"name": "a", "networks": ()}, "networks: expected one name at least"),
    "neither allowed nor not": ({"name": "a", "allowed": None}, "allowed: expected true or false, got nothing"),
    "neither disabled nor not": ({"name": "a", "disabled": None}, "disabled: expected true or false, got nothing"),
    "neither active nor not": ({"name": "a", "is_active": None}, "is_active: expected true or false, got nothing"),
    "no status": ({"name": "a", "status": None}, "status: expected text, got nothing"),
    "it ends before it begins": ({"name": "a", "not_before": "2030-01-02", "expires": "2030-01-01"}, "expires"),
    "neither true nor false": ({"name": "a", "disabled": "maybe"}, "disabled: expected true or false"),
    "an unknown status": ({"name": "a", "status": "hugo"}, "status: expected one of"),
    "an unknown priority": ({"name": "a", "priority": "urgent"}, "priority"),
    "a weight of nothing": ({"name": "a", "weight": 0}, "weight"),
    "not UTF-8": ({"name": b"\xff"}, "name: expected UTF-8"),
    "a field that is a number": ({1: "a"}, "names a field by int"),
}


@pytest.mark.parametrize(("given", "expected"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense(given: object, expected: str) -> None:
    with pytest.raises(SourceFailed) as caught:
        read(given)
    assert expected in str(caught.value)
    assert "sk-123" not in str(caught.value)


def test_fields_that_sound_like_a_rule_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    reader = Reader(Lua(path=Path("who.lua"), name="people"))
    plain = {"name": "a", "id": 3, "email": "a@b", "created_at": "x", "description": "x", "zip": "1", "rpm": 5}
    rules = ["max_rpm", "requests_per_minute", "deleted", "banned", "valid_until", "ip_whitelist", "quota"]
    for _ in range(2):
        assert reader.read({**plain, **dict.fromkeys(rules, 1)}) == reader.read(plain)
    assert reader.read({**plain, "suspended": 1, "banned": 1, "scopes": None}) == reader.read(plain)
    line = "key source people gives fields that are not looked at: "
    assert caplog.messages == [line + ", ".join(rules), line + "suspended"]


def test_how_many_fields_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    reader = Reader(Lua(path=Path("who.lua")))
    for number in range(100):
        reader.read({"name": "a", f"quota_{number}": 1, f"a quota\n{number}": 1})
    assert len(caplog.messages) == 20
