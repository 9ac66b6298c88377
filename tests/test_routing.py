"""From a model's name to the servers that have it."""

from functools import partial
from pathlib import Path

import pytest

from gateway.auth import Caller
from gateway.changes import ReloadReport
from gateway.exchange import Exchange
from gateway.patterns import Pattern
from gateway.replies import Refusal
from gateway.routing import Router
from gateway.servers import Claim
from gateway.servers import Server as Upstream
from gateway.service import Service
from gateway.settings import Config, Server
from gateway.wire import MAX_MODEL_NAME


def router(*servers: str, aliases: dict[str, str] | None = None, default: str | None = None) -> Router:
    """Servers as "NAME MODEL MODEL…", a name alone for one that has not told its models yet."""
    records = []
    for server in servers:
        name, *models = server.split()
        records.append(Server(name, f"http://{name}:1", models=tuple(models) or None))
    return Router(Config(tuple(records), aliases=aliases or {}, default_model=default, data=Path("data")))


ALIASES = {"fast": "m", "m2": "n", "gpt-*": "m", "/claude-.*/": "n", "gpt-4*": "n"}
RESOLVED = {
    "a model": ("m", "m"),
    "an alias": ("fast", "m"),
    "an alias beats a model": ("m2", "n"),
    "a wildcard": ("gpt-3", "m"),
    "the first pattern": ("gpt-4", "m"),
    "a regular expression": ("claude-x", "n"),
    "the longest name that patterns see": ("gpt-" + "x" * (MAX_MODEL_NAME - 4), "m"),
}


@pytest.mark.parametrize(("asked", "model"), RESOLVED.values(), ids=RESOLVED)
def test_resolve(asked: str, model: str) -> None:
    assert router("a m m2", "b n", aliases=ALIASES).resolve(asked) == model


UNKNOWN = {
    "no such model": "x",
    "empty": "",
    "another case": "M",
    "half an alias": "fas",
    "a pattern's own text": "/claude-.*/x",
}


@pytest.mark.parametrize("asked", UNKNOWN.values(), ids=UNKNOWN)
def test_resolve_refuses(asked: str) -> None:
    with pytest.raises(Refusal) as caught:
        router("a m m2", "b n", aliases=ALIASES).resolve(asked)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert len(caught.value.message) < 300


MISSING: dict[str, tuple[Router, str | None]] = {
    "the only model": (router("a m", "b m"), "m"),
    "the default": (router("a m n", default="n"), "n"),
    "the default is an alias": (router("a m n", aliases={"fast": "n"}, default="fast"), "n"),
    "nothing to choose from": (router("a"), None),
}


@pytest.mark.parametrize(("chooser", "model"), MISSING.values(), ids=MISSING)
def test_no_model_named(chooser: Router, model: str | None) -> None:
    assert chooser.resolve(None) == model


def test_no_model_named_and_several_to_choose_from() -> None:
    with pytest.raises(Refusal) as caught:
        router("a m", "b n").resolve(None)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_no_server_has_told_its_models() -> None:
    with pytest.raises(Refusal) as caught:
        router("a").resolve("m")
    assert (caught.value.status, caught.value.code) == (503, "no_server_available")
    assert caught.value.headers == {"retry-after": "5"}


def test_learn() -> None:
    routes = router("a", "b m")
    assert list(routes.models()) == ["m"]
    routes.servers[0].models = ("n", "m")
    routes.learn()
    assert {model: [s.name for s in servers] for model, servers in routes.models().items()} == {
        "n": ["a"],
        "m": ["a", "b"],
    }


VISIBLE = {
    "models, then plain aliases": ({}, [("m", "m"), ("m2", "m2"), ("n", "n"), ("fast", "m")]),
    "one of two servers down": ({"a": "down"}, [("m", "m"), ("n", "n"), ("fast", "m")]),
    "both down": ({"a": "down", "b": "down", "c": "up"}, [("n", "n")]),
    "soon there": ({"a": "loading"}, [("m", "m"), ("m2", "m2"), ("n", "n"), ("fast", "m")]),
    "left alone for now": ({"a": "paused", "c": "ejected"}, [("m", "m"), ("m2", "m2"), ("n", "n"), ("fast", "m")]),
}


def bring(server: Upstream, state: str) -> None:
    health = server.health
    match state:
        case "up":
            health.probe_ok(0.0)
        case "down":
            health.refused(0.0, "refuses connections")
        case "loading":
            health.probe_loading(0.0, "loads its model")
        case "paused":
            health.asked_to_wait(0.0, 60)
        case "ejected":
            for _ in range(3):
                health.failed(0.0, "failed")
    assert health.state == state


@pytest.mark.parametrize(("states", "expected"), VISIBLE.values(), ids=VISIBLE)
def test_visible(states: dict[str, str], expected: list[tuple[str, str]]) -> None:
    routes = router("a m m2", "b m", "c n", aliases={"fast": "m", "gpt-*": "m", "gone": "x"})
    for server in routes.servers:
        if server.name in states:
            bring(server, states[server.name])
    assert list(routes.visible()) == expected


def test_a_name_is_visible_once() -> None:
    names = [name for name, _ in router("a m n", aliases={"m": "n"}).visible()]
    assert sorted(names) == ["m", "n"]


SERVERS_OF: dict[str | None, list[str]] = {"m": ["a", "b"], "n": ["c"], "nobody's": [], None: ["a", "b", "c"]}


@pytest.mark.parametrize(("model", "expected"), SERVERS_OF.items(), ids=map(str, SERVERS_OF))
def test_servers_of(model: str | None, expected: list[str]) -> None:
    assert [server.name for server in router("a m", "b m", "c n").servers_of(model)] == expected


def test_a_claim_is_given_back_once() -> None:
    released: list[str] = []
    (server,) = router("a m").servers
    first, second = (Claim(server, 0.0, partial(released.append, name)) for name in ("first", "second"))
    assert server.running == 2
    first.release()
    first.release()
    assert (server.running, released) == (1, ["first"])
    second.release()
    assert (server.running, released) == (0, ["first", "second"])


URLS = {
    "http://h": ("http", "h", 80, "", "h"),
    "http://h:8080/": ("http", "h", 8080, "", "h:8080"),
    "https://h": ("https", "h", 443, "", "h"),
    "https://h:80/llm/": ("https", "h", 80, "/llm", "h:80"),
    "http://[::1]:8080": ("http", "::1", 8080, "", "[::1]:8080"),
    "http://[::1]": ("http", "::1", 80, "", "[::1]"),
}


@pytest.mark.parametrize(("url", "expected"), URLS.items())
def test_urls(url: str, expected: tuple[str, str, int, str, str]) -> None:
    server = Upstream(Server("s", url))
    assert (server.scheme, server.host, server.port, server.path_prefix, server.authority) == expected


def test_a_key_for_some_models_gets_none_that_nobody_knows(tmp_path: Path) -> None:
    """No model named, none told yet: that leaves nothing this key is known to be allowed."""

    async def never(reason: str) -> ReloadReport:
        raise AssertionError(reason)

    service = Service(Config((Server("a", "http://a:1"),), data=tmp_path), never)
    caller = Caller(1, "bob", (Pattern("only-this"),))
    one = Exchange("id", caller, "/v1/chat/completions", "/v1/chat/completions", "2026", 0.0, "w", 10)
    try:
        with pytest.raises(Refusal):
            service.allow(one)
    finally:
        service.close()
