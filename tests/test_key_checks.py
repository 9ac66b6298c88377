"""What a key may hold, field by field."""

from typing import Any

import msgspec
import pytest

from gateway.key_checks import check_key
from gateway.keys import Key, KeyProblem
from gateway.limits import Budget, Limits

KEY = Key(id=1, name="alice", hint="", created_at="", disabled=False, expires_at=None, models=())

GOOD: dict[str, dict[str, Any]] = {
    "as it is": {},
    "name of any script": {"name": "Ålice 王"},
    "longest name": {"name": "x" * 200},
    "models": {"models": ("m", "gpt-*", "/gpt-[34]/")},
    "endpoints": {"endpoints": ("/v1/embeddings", "/v1/audio/*", "/")},
    "networks": {"networks": ("10.0.0.0/8", "192.0.2.1", "2001:db8::/32", "::1")},
    "weights": {"weight": 0.001},
    "a time of validity": {"not_before": "2026-01-01T00:00:00.000Z", "expires_at": "2026-01-01T00:00:00.001Z"},
    "nothing allowed": {"limits": Limits(rpm=0, tpm=0, concurrency=0, rps=0, budgets=(Budget("total", money=0),))},
}


@pytest.mark.parametrize("facts", GOOD.values(), ids=GOOD)
def test_good(facts: dict[str, Any]) -> None:
    check_key(msgspec.structs.replace(KEY, **facts))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": ""}, "name"),
    "a name of spaces": ({"name": "  "}, "name"),
    "a name with a line end": ({"name": "a\nb"}, "name"),
    "a name too long": ({"name": "x" * 201}, "name"),
    "no team name": ({"team": ""}, "team"),
    "a model that is no Unicode": ({"models": ("\ud800",)}, "models[0]"),
    "an endpoint that is no Unicode": ({"endpoints": ("/\ud800",)}, "endpoints[0]"),
    "no model": ({"models": ("m", "")}, "models[1]"),
    "a broken pattern": ({"models": ("/(/",)}, "models[0]"),
    "an endpoint without /": ({"endpoints": ("v1/models",)}, "endpoints[0]"),
    "an endpoint that ends in /": ({"endpoints": ("/v1/models/",)}, "endpoints[0]"),
    "an endpoint in capitals": ({"endpoints": ("/", "/V1/models")}, "endpoints[1]"),
    "no endpoint": ({"endpoints": ("",)}, "endpoints[0]"),
    "no network": ({"networks": ("",)}, "networks[0]"),
    "a host's name": ({"networks": ("::1", "example.org")}, "networks[1]"),
    "host bits": ({"networks": ("10.0.0.1/8",)}, "networks[0]"),
    "a prefix too long": ({"networks": ("10.0.0.0/33",)}, "networks[0]"),
    "weight 0": ({"weight": 0}, "weight"),
    "weight nan": ({"weight": float("nan")}, "weight"),
    "weight text": ({"weight": "1"}, "weight"),
    "priority": ({"priority": "urgent"}, "priority"),
    "expires when it begins": (
        {"not_before": "2026-01-01T00:00:00.000Z", "expires_at": "2026-01-01T00:00:00.000Z"},
        "expires_at",
    ),
    "rpm below 0": ({"limits": Limits(rpm=-1)}, "limits.rpm"),
    "burst alone": ({"limits": Limits(burst=3)}, "limits.burst"),
    "an unknown period": ({"limits": Limits(budgets=(Budget("year", tokens=1),))}, "limits.budgets[0].per"),
    "a budget twice": (
        {"limits": Limits(budgets=(Budget("day", tokens=1), Budget("day", tokens=2)))},
        "limits.budgets[1]",
    ),
}


@pytest.mark.parametrize(("facts", "field"), BAD.values(), ids=BAD)
def test_bad(facts: dict[str, Any], field: str) -> None:
    with pytest.raises(KeyProblem) as caught:
        check_key(msgspec.structs.replace(KEY, **facts))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
