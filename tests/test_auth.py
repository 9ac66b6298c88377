"""From headers to a caller: starts from no."""

from dataclasses import dataclass, field

import msgspec
import pytest

from gateway.auth import KEY_HEADERS, Authenticator, Caller
from gateway.keystore import Key, KeysUnavailable
from gateway.patterns import Pattern
from gateway.replies import Refusal

NOW = "2026-11-21T09:30:00.000Z"
ALICE = Key(id=1, name="alice", hint="", created_at=NOW, disabled=False, expires_at=None, models=())


@dataclass
class Store:
    keys: dict[str, Key] = field(default_factory=lambda: {"good": ALICE})

    def find(self, key: str) -> Key | None:
        if key == "trouble":
            raise KeysUnavailable("no disk")
        return self.keys.get(key)


def authenticate(headers: dict[str, list[str]], store: Store | None = None) -> Caller:
    return Authenticator(store or Store(), lambda: NOW).authenticate(
        {name: headers.get(name, []) for name in KEY_HEADERS}
    )


LET_IN: dict[str, dict[str, list[str]]] = {
    "Bearer": {"authorization": ["Bearer good"]},
    "bearer": {"authorization": ["bearer good"]},
    "BEARER, spaces": {"authorization": ["  BEARER   good  "]},
    "x-api-key": {"x-api-key": [" good "]},
    "api-key": {"api-key": ["good"]},
    "Authorization first": {"authorization": ["Bearer good"], "x-api-key": ["bad"], "api-key": ["bad"]},
    "x-api-key before api-key": {"x-api-key": ["good"], "api-key": ["bad"]},
    "another scheme is passed over": {"authorization": ["Basic Z29vZA=="], "x-api-key": ["good"]},
    "an empty one is passed over": {"authorization": ["Bearer "], "x-api-key": [""], "api-key": ["good"]},
    "doubled ones behind it don't matter": {"authorization": ["Bearer good"], "x-api-key": ["a", "b"]},
}


@pytest.mark.parametrize("headers", LET_IN.values(), ids=LET_IN)
def test_let_in(headers: dict[str, list[str]]) -> None:
    assert authenticate(headers) == Caller(1, "alice", ())


KEPT_OUT: dict[str, dict[str, list[str]]] = {
    "nothing": {},
    "empty": {"authorization": [""]},
    "no scheme": {"authorization": ["good"]},
    "another scheme": {"authorization": ["Basic good"]},
    "an unknown key": {"authorization": ["Bearer bad"]},
    "the first one decides": {"authorization": ["Bearer bad"], "x-api-key": ["good"]},
    "doubled": {"authorization": ["Bearer good", "Bearer good"]},
    "doubled, with different ones": {"authorization": ["Bearer good", "Bearer bad"], "x-api-key": ["good"]},
    "doubled x-api-key": {"x-api-key": ["good", "good"]},
    "joined": {"authorization": ["Bearer good, Bearer good"]},
    "case matters": {"authorization": ["Bearer GOOD"]},
    "no text at all": {"authorization": ["Bearer \udcff"]},
}


@pytest.mark.parametrize("headers", KEPT_OUT.values(), ids=KEPT_OUT)
def test_kept_out(headers: dict[str, list[str]]) -> None:
    with pytest.raises(Refusal) as caught:
        authenticate(headers)
    refusal = caught.value
    assert (refusal.status, refusal.code, refusal.headers) == (401, "invalid_api_key", {"www-authenticate": "Bearer"})
    assert "good" not in refusal.message


STATES = {
    "disabled": (True, None, "key_disabled"),
    "expired": (False, "2026-11-21T09:29:59.999Z", "key_expired"),
    "expires now": (False, NOW, "key_expired"),
    "disabled before expired": (True, NOW, "key_disabled"),
}


@pytest.mark.parametrize(("disabled", "expires_at", "code"), STATES.values(), ids=STATES)
def test_keys_that_are_known_but_no_good(disabled: bool, expires_at: str | None, code: str) -> None:
    key = Key(id=1, name="alice", hint="", created_at=NOW, disabled=disabled, expires_at=expires_at, models=())
    with pytest.raises(Refusal) as caught:
        authenticate({"x-api-key": ["k"]}, Store({"k": key}))
    assert (caught.value.status, caught.value.code) == (403, code)


def test_a_key_that_is_still_good() -> None:
    key = Key(id=1, name="a", hint="", created_at=NOW, disabled=False, expires_at="2026-11-21T09:30:00.001Z", models=())
    assert authenticate({"x-api-key": ["k"]}, Store({"k": key})).key_id == 1


LIMITS = {"high": 0, "normal": 1, "low": 2}


@pytest.mark.parametrize("name", LIMITS)
def test_a_callers_place_among_those_that_wait(name: str) -> None:
    key = msgspec.structs.replace(ALICE, weight=2.5, priority=name)
    expected = Caller(1, "alice", (), weight=2.5, priority=LIMITS[name])
    assert authenticate({"x-api-key": ["k"]}, Store({"k": key})) == expected


def test_a_key_without_limits_is_a_usual_caller() -> None:
    assert authenticate({"x-api-key": ["good"]}) == Caller(1, "alice", (), weight=1, priority=1)


def test_keys_that_can_not_be_read_let_nobody_in() -> None:
    with pytest.raises(Refusal) as caught:
        authenticate({"x-api-key": ["trouble"]})
    assert (caught.value.status, caught.value.code) == (503, "keys_unavailable")


MAY_USE = {
    "no patterns": ((), ("m",), True),
    "as asked": (("fast",), ("fast", "m"), True),
    "as served": (("m",), ("fast", "m"), True),
    "neither": (("n", "m?"), ("fast", "m"), False),
    "wildcard": (("qwen*",), ("qwen3-8b",), True),
    "regular expression": (("/qwen[23]-.*/",), ("qwen3-8b",), True),
    "the whole name": (("/qwen/",), ("qwen3",), False),
}


@pytest.mark.parametrize(("patterns", "names", "expected"), MAY_USE.values(), ids=MAY_USE)
def test_may_use(patterns: tuple[str, ...], names: tuple[str, ...], expected: bool) -> None:
    assert Caller(1, "a", tuple(map(Pattern, patterns))).may_use(*names) is expected
