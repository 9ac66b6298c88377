"""What people are told of values that do not fit: words for types, and names that are near."""

from typing import Any

import msgspec
import pytest

from gateway.admin.keys import NewKey
from gateway.admin.limits import LimitChanges
from gateway.hints import fields_at, in_words, located, meant
from gateway.settings import Config

WRONG: list[tuple[type, Any, str, str]] = [
    (NewKey, {"weight": "a"}, "weight", "expected a number, got text"),
    (NewKey, {"models": "a"}, "models", "expected a list, got text"),
    (NewKey, {"models": ["a", 1]}, "models[1]", "expected text, got a number"),
    (NewKey, {"team": []}, "team", "expected text or null, got a list"),
    (NewKey, {"limits": 5}, "limits", "expected an object, as in {…}, got a number"),
    (NewKey, {"limits": {"budgets": [{"per": None}]}}, "limits.budgets[0].per", "expected text, got null"),
    (LimitChanges, {"rpm": 1.5}, "rpm", "expected a whole number or null, got a number with a fraction"),
    (LimitChanges, {"rpm": -1}, "rpm", "expected a whole number, 0 or more"),
    (LimitChanges, {"rpm": True}, "rpm", "expected a whole number or null, got true or false"),
]


@pytest.mark.parametrize(("kind", "value", "path", "words"), WRONG, ids=[words for *_, words in WRONG])
def test_words(kind: type, value: Any, path: str, words: str) -> None:
    with pytest.raises(msgspec.ValidationError) as error:
        msgspec.convert(value, kind)
    message, where = located(error.value)
    assert (where, in_words(message)) == (path, words)


@pytest.mark.parametrize(
    ("kind", "path", "fields"),
    [
        (NewKey, "limits", ["rpm", "rps", "burst", "tpm", "concurrency", "budgets"]),
        (NewKey, "limits.budgets[0]", ["per", "tokens", "money"]),
        (Config, "prices.models[...]", ["prompt", "cached", "completion", "gpu_second"]),
    ],
    ids=["a record in a record", "an item of a list", "a value of a mapping"],
)
def test_fields(kind: type, path: str, fields: list[str]) -> None:
    assert fields_at(kind, path) == fields


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("nmae", ["name", "team"], "did you mean 'name'? There are: name, team"),
        ("colour", ["name", "team"], "There are: name, team"),
        ("x", [], "There are: none"),
    ],
)
def test_meant(name: str, known: list[str], said: str) -> None:
    assert meant(name, known) == said
