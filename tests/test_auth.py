"""From headers to a caller: starts from no."""

from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest

from gateway.auth import KEY_HEADERS, MAX_STRANGE_TEAMS, Authenticator, Caller
from gateway.keys import Key, KeysUnavailable, Team
from gateway.limits import Limits
from gateway.patterns import Pattern
from gateway.replies import Refusal
from gateway.settings import Config, LimitsSection

NOW = "2026-11-21T09:30:00.000Z"
CONFIG = Config(servers=())
ALICE = Key(id=1, name="alice", hint="", created_at=NOW, disabled=False, expires_at=None, models=())


@dataclass
class Store:
    keys: dict[str, Key] = field(default_factory=lambda: {"good": ALICE})
    teams: dict[str, Team] = field(default_factory=dict)

    def find(self, key: str) -> Key | None:
        if key == "trouble":
            raise KeysUnavailable("no disk")
        return self.keys.get(key)

    def team(self, name: str) -> Team | None:
        return self.teams.get(name)


def authenticate(
    headers: dict[str, list[str]], store: Store | None = None, config: Config = CONFIG, address: str = "10.0.0.1"
) -> Caller:
    """A key of keys.db is decided upon at once: nothing is waited for."""
    authenticator = Authenticator(config, store or Store(), lambda: NOW)
    asked = authenticator.authenticate({name: headers.get(name, []) for name in KEY_HEADERS}, address)
    try:
        asked.send(None)
    except StopIteration as end:
        return cast(Caller, end.value)
    raise AssertionError("it waits")


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


NOT_FOR_NOW: dict[str, tuple[dict[str, Any], str, str]] = {
    "not yet": ({"not_before": "2026-11-21T09:30:00.001Z"}, "10.0.0.1", "key_not_yet_valid"),
    "disabled before not yet": ({"not_before": "2027-01-01", "disabled": True}, "10.0.0.1", "key_disabled"),
    "from elsewhere": ({"networks": ("192.0.2.0/24",)}, "10.0.0.1", "network_not_allowed"),
    "from nowhere": ({"networks": ("0.0.0.0/0", "::/0")}, "unknown", "network_not_allowed"),
    "expired before from elsewhere": ({"networks": ("192.0.2.0/24",), "expires_at": NOW}, "10.0.0.1", "key_expired"),
}


@pytest.mark.parametrize(("fields", "address", "code"), NOT_FOR_NOW.values(), ids=NOT_FOR_NOW)
def test_keys_that_are_good_another_time_or_from_elsewhere(fields: dict[str, Any], address: str, code: str) -> None:
    with pytest.raises(Refusal) as caught:
        authenticate({"x-api-key": ["k"]}, Store({"k": msgspec.structs.replace(ALICE, **fields)}), address=address)
    assert (caught.value.status, caught.value.code) == (403, code)


FOR_NOW: dict[str, tuple[dict[str, Any], str]] = {
    "from now on": ({"not_before": NOW}, "10.0.0.1"),
    "from here": ({"networks": ("192.0.2.0/24", "10.0.0.0/8")}, "10.0.0.1"),
    "from here, over IPv6": ({"networks": ("10.0.0.0/8",)}, "::ffff:10.0.0.1"),
    "from nowhere, and that is all the same": ({}, "unknown"),
}


@pytest.mark.parametrize(("fields", "address"), FOR_NOW.values(), ids=FOR_NOW)
def test_keys_that_are_good_now_and_from_here(fields: dict[str, Any], address: str) -> None:
    store = Store({"k": msgspec.structs.replace(ALICE, **fields)})
    assert authenticate({"x-api-key": ["k"]}, store, address=address).key_id == 1


def test_limits_of_its_own_come_before_those_of_each_key() -> None:
    config = msgspec.structs.replace(CONFIG, limits=LimitsSection(key=Limits(rpm=60, tpm=1000)))
    store = Store({"k": msgspec.structs.replace(ALICE, limits=Limits(rpm=5, concurrency=2))})
    assert authenticate({"x-api-key": ["k"]}, store, config).limits == Limits(rpm=5, tpm=1000, concurrency=2)
    assert authenticate({"x-api-key": ["good"]}, config=config).limits == Limits(rpm=60, tpm=1000)


TEAMS: dict[str, tuple[dict[str, Limits], dict[str, Limits], Limits]] = {
    "of the config": ({"t": Limits(rpm=1)}, {}, Limits(rpm=1)),
    "of keys.db": ({}, {"t": Limits(rpm=2)}, Limits(rpm=2)),
    "the config's come first": ({"t": Limits(rpm=1)}, {"t": Limits(rpm=2)}, Limits(rpm=1)),
    "also where they are none": ({"t": Limits()}, {"t": Limits(rpm=2)}, Limits()),
    "nobody's": ({"u": Limits(rpm=1)}, {"u": Limits(rpm=2)}, Limits()),
}


@pytest.mark.parametrize(("declared", "made", "expected"), TEAMS.values(), ids=TEAMS)
def test_the_limits_of_a_team(declared: dict[str, Limits], made: dict[str, Limits], expected: Limits) -> None:
    teams = {name: Team(id=1, name=name, limits=limits, created_at=NOW) for name, limits in made.items()}
    store = Store({"k": msgspec.structs.replace(ALICE, team="t")}, teams)
    caller = authenticate({"x-api-key": ["k"]}, store, msgspec.structs.replace(CONFIG, teams=declared))
    assert (caller.team, caller.team_limits) == ("t", expected)


SCOPES = {
    "of keys.db": (Caller(3, "alice", ()), "key:3"),
    "of another source": (Caller(None, "alice", (), source="people"), "key:people/alice"),
}


@pytest.mark.parametrize(("caller", "expected"), SCOPES.values(), ids=SCOPES)
def test_what_is_counted_for_a_caller(caller: Caller, expected: str) -> None:
    assert caller.scope == expected


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


def test_a_team_that_nobody_knows_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"t{number}" for number in range(MAX_STRANGE_TEAMS + 1)]
    store = Store({name: msgspec.structs.replace(ALICE, team=name) for name in (*names, "known", "declared")})
    store.teams["known"] = Team(id=1, name="known", limits=Limits(), created_at=NOW)
    config = msgspec.structs.replace(CONFIG, teams={"declared": Limits()})
    by = Authenticator(config, store, lambda: NOW)
    for name in (*names, *names, "known", "declared"):
        with pytest.raises(StopIteration):
            by.authenticate({"x-api-key": [name]}, "").send(None)
    says = "keys name a team {!r} that neither the config nor keys.db knows: it has no limits"
    assert caplog.messages == [says.format(name) for name in names[:MAX_STRANGE_TEAMS]]


UNKNOWN = "401 invalid_api_key"
LONG = {"as long as may be": (1000, "1"), "longer": (1001, UNKNOWN), "far too long": (100_000, UNKNOWN)}


@pytest.mark.parametrize(("length", "expected"), LONG.values(), ids=LONG)
def test_nobody_is_asked_for_a_very_long_key(length: int, expected: str) -> None:
    key = "ü" * (length // 2) + "k" * (length % 2)
    try:
        found = f"{authenticate({'x-api-key': [key]}, Store({key: ALICE})).key_id}"
    except Refusal as refusal:
        found = f"{refusal.status} {refusal.code}"
    assert found == expected
