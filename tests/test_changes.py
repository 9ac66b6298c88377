"""What is said of two configs' differences: which names, and never a value."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.changes import changes, keeping, needs_restart, told
from gateway.limits import Limits
from gateway.prices import Price
from gateway.settings import Address, Auth, Config, LimitsSection, PricesSection, Routing, Secret, Server
from gateway.sources.settings import Local, Static, StaticKey

A = Server("a", "http://a:1", api_key=Secret("sk-secret"), models=("m",))
B = Server("b", "http://b:1")
ALICE, BOB, CAROL = (StaticKey(name=name, key=Secret(f"sk-{name}")) for name in ("alice", "bob", "carol"))
CONFIG = Config(
    (A, B),
    aliases={"fast": "m", "good": "m"},
    teams={"lab": Limits(rpm=1)},
    auth=Auth(sources=(Local(), Static(keys=(ALICE, BOB)))),
)

CHANGES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": ({}, ()),
    "another server": ({"servers": (A, B, Server("c", "http://c:1"))}, ("server c is new",)),
    "one is gone": ({"servers": (B,)}, ("server a is gone",)),
    "renamed": ({"servers": (A, Server("c", "http://b:1"))}, ("server b is gone", "server c is new")),
    "settings": (
        {"servers": (msgspec.structs.replace(A, api_key=Secret("sk-new"), weight=2), B)},
        ("server a: api_key, weight",),
    ),
    "order of servers": ({"servers": (B, A)}, ("the order of servers",)),
    "aliases": ({"aliases": {"fast": "n", "best": "m"}}, ("alias fast", "alias good", "alias best")),
    "order of aliases": ({"aliases": {"good": "m", "fast": "m"}}, ("the order of aliases",)),
    "a section's key": (
        {"routing": Routing(strategy="latency", max_attempts=2)},
        ("routing.strategy", "routing.max_attempts"),
    ),
    "limits": ({"limits": LimitsSection(key=Limits(rpm=5))}, ("limits.key.rpm",)),
    "prices": ({"prices": PricesSection("USD", {"m": Price(1)})}, ("prices.currency", "prices.models.m")),
    "limits of a model": ({"limits": LimitsSection(models={"m": Limits(rpm=5)})}, ("limits.models.m",)),
    "teams": ({"teams": {"new": Limits(rpm=5), "lab": Limits(rpm=2)}}, ("teams.lab.rpm", "teams.new")),
    "a team is gone": ({"teams": {}}, ("teams.lab",)),
    "a source": ({"auth": Auth(sources=(Local(),))}, ("auth.sources[1]",)),
    "another source": ({"auth": Auth(sources=(Local(), Local()))}, ("auth.sources[1]",)),
    "static keys": (
        {"auth": Auth(sources=(Local(), Static(keys=(msgspec.structs.replace(BOB, disabled=True), CAROL))))},
        ("auth.sources[1].keys.alice", "auth.sources[1].keys.bob.disabled", "auth.sources[1].keys.carol"),
    ),
    "another key": (
        {"auth": Auth(sources=(Local(), Static(keys=(ALICE, msgspec.structs.replace(BOB, key=Secret("sk-new"))))))},
        ("auth.sources[1].keys.bob.key",),
    ),
    "order of static keys": (
        {"auth": Auth(sources=(Local(), Static(keys=(BOB, ALICE))))},
        ("the order of auth.sources[1].keys",),
    ),
    "networks": ({"trusted_proxies": ("10.0.0.0/8",)}, ("trusted_proxies",)),
    "a secret": ({"admin_key": Secret("sk-admin")}, ("admin_key",)),
}


@pytest.mark.parametrize(("more", "expected"), CHANGES.values(), ids=CHANGES)
def test_changes(more: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert changes(CONFIG, msgspec.structs.replace(CONFIG, **more)) == expected


@pytest.mark.parametrize(("count", "last"), [(0, []), (1, ["0"]), (100, ["99"]), (101, ["99", "and 1 more"])])
def test_not_more_is_told_than_is_read(count: int, last: list[str]) -> None:
    assert told([str(number) for number in range(count)])[99 if count > 1 else 0 :] == last


RESTART: dict[str, dict[str, Any]] = {
    "listen": {"listen": Address("127.0.0.1:1")},
    "dashboard": {"dashboard": Address("127.0.0.1:1")},
    "data": {"data": Path("elsewhere")},
    "drain_s": {"drain_s": 1},
    "limits.storage": {"limits": LimitsSection(storage=Secret("redis://elsewhere"))},
}


@pytest.mark.parametrize("name", RESTART)
def test_what_takes_a_restart_stays(name: str) -> None:
    wanted = msgspec.structs.replace(CONFIG, **RESTART[name])
    assert needs_restart(CONFIG, wanted) == (name,)
    assert keeping(CONFIG, wanted) == CONFIG


def test_all_else_is_taken_over() -> None:
    limits = LimitsSection(storage=Secret("redis://elsewhere"), key=Limits(rpm=5))
    wanted = msgspec.structs.replace(CONFIG, listen=Address("127.0.0.1:1"), limits=limits, servers=(B,))
    assert needs_restart(CONFIG, wanted) == ("listen", "limits.storage")
    kept = keeping(CONFIG, wanted)
    assert changes(CONFIG, kept) == ("server a is gone", "limits.key.rpm")
