"""Probes: who is down, who is back, and who still loads its model. No request has to meet it."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dialects import CHAT
from pairs import (
    CALM,
    FIRST_ALWAYS,
    LOADING,
    SCRIPTED,
    Actor,
    events_of,
    good_body,
    health,
    let_play,
    row_of,
    states,
)
from proxy import Key, Proxy
from rawhttp import Answer, post
from upstream import HEALTH, Upstream, reply
from waiting import eventually

PROBED = {"interval_s": 0.1, "timeout_s": 1, "down_after": 3, "eject_after": 1000}
# Each model's servers: a server has an upstream of its own, since a probe names no model.
MODELS = {
    "returns": ["first", "second"],
    "hiccup": ["only"],
    "waits": ["only"],
    "probed": ["only"],
    "ready": ["first", "second"],
}


@dataclass
class Bench:
    proxy: Proxy
    key: Key
    upstreams: dict[str, Upstream]
    actors: dict[str, Actor]

    def ask(self, model: str) -> Answer:
        return post(self.proxy.port, CHAT, self.key, {"model": model})

    def wait_state(self, name: str, state: str) -> None:
        eventually(lambda: states(self.proxy)[name] == state, f"{name} to be {state}")

    def changes(self, name: str) -> list[tuple[str, str]]:
        return [(row["previous"], row["state"]) for row in events_of(self.proxy, name)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[Bench]:
    """`returns first` is not there at first. What else a server does, its test says."""
    servers: list[dict[str, Any]] = []
    upstreams: dict[str, Upstream] = {}
    actors: dict[str, Actor] = {}
    with ExitStack() as stack:
        for model, ranks in MODELS.items():
            for rank, weight in zip(ranks, (FIRST_ALWAYS, 1), strict=False):
                name = f"{model} {rank}"
                upstreams[name] = stack.enter_context(Upstream())
                actors[name] = Actor(name, upstreams[name])
                let_play(upstreams[name], {model: actors[name]})
                url = upstreams[name].url
                servers.append({"name": name, "url": url, "models": [model], "weight": weight, **SCRIPTED})
        upstreams["returns first"].refuse()
        folder = tmp_path_factory.mktemp("probes")
        config = {**CALM, "health": PROBED, "loading_wait_s": 10}
        proxy = stack.enter_context(Proxy(folder, servers, confdir=confdir, **config))
        yield Bench(proxy, proxy.create_key("alice"), upstreams, actors)
        print(proxy.log()[-6000:])
    assert "Traceback" not in proxy.log()


def test_a_server_that_comes_and_goes(bench: Bench) -> None:
    first = bench.upstreams["returns first"]
    answer = bench.ask("returns")  # the first probe came before it
    assert (answer.body, row_of(bench.proxy, answer)["attempts"]) == (good_body("returns second"), 1)
    seen = health(bench.proxy)["servers"]
    assert (seen["states"]["returns first"], seen["states"]["returns second"]) == ("down", "up")
    assert seen["total"] - seen["up"] == list(seen["states"].values()).count("down") == 1
    first.listen()
    bench.wait_state("returns first", "up")
    assert bench.ask("returns").body == good_body("returns first")
    first.always("/health", reply({"error": "broken"}, 500))
    bench.wait_state("returns first", "down")
    assert bench.ask("returns").body == good_body("returns second")
    assert bench.changes("returns first") == [("unknown", "down"), ("down", "up"), ("up", "down")]


def test_one_failed_probe_is_not_enough(bench: Bench) -> None:
    upstream = bench.upstreams["hiccup only"]
    bench.wait_state("hiccup only", "up")
    upstream.plan(*[reply({}, 500)] * 2, path="/health")
    upstream.wait_requests(len(upstream.requests) + 5)
    assert bench.changes("hiccup only") == [("unknown", "up")]


# -- a server that loads its model -------------------------------------------------------------------------------------


def test_loading_is_waited_out(bench: Bench) -> None:
    bench.actors["waits only"].plan(LOADING, LOADING)
    answer = bench.ask("waits")
    assert (answer.status, answer.body) == (200, good_body("waits only"))
    row = row_of(bench.proxy, answer)
    assert (row["outcome"], row["attempts"]) == ("ok", 3)


def test_loading_as_the_probe_sees_it(bench: Bench) -> None:
    """Nothing is sent before the server is ready: the request waits in the gateway."""
    upstream, actor = bench.upstreams["probed only"], bench.actors["probed only"]
    upstream.always("/health", LOADING)
    bench.wait_state("probed only", "loading")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(bench.ask, "probed")
        eventually(lambda: health(bench.proxy)["waiting"] == 1, "the request that waits")
        assert actor.times == []
        upstream.always("/health", HEALTH)
        answer = asked.result(timeout=10)
    assert (answer.status, answer.body) == (200, good_body("probed only"))
    row = row_of(bench.proxy, answer)
    assert (row["outcome"], row["attempts"]) == ("ok", 1)
    assert row["queue_ms"] > 0
    assert bench.changes("probed only") == [("unknown", "up"), ("up", "loading"), ("loading", "up")]


def test_a_ready_server_is_taken_at_once(bench: Bench) -> None:
    """Whether the gateway knows already that the other one is not ready, or meets it."""
    upstream, actor = bench.upstreams["ready first"], bench.actors["ready first"]
    upstream.always("/health", LOADING)
    actor.always = LOADING
    for _ in range(2):
        answer = bench.ask("ready")
        assert answer.body == good_body("ready second")
        assert row_of(bench.proxy, answer)["duration_ms"] < 5000
        bench.wait_state("ready first", "loading")


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[Bench]:
    """Two servers that never come to an end with loading; one says so only to requests."""
    with Upstream() as one, Upstream() as other:
        other.always("/health", LOADING)
        servers = []
        for name, upstream in (("asked", one), ("probed", other)):
            upstream.always(CHAT, LOADING)
            servers.append({"name": name, "url": upstream.url, "models": [name], **SCRIPTED})
        config = {**CALM, "health": PROBED, "loading_wait_s": 0.5}
        with Proxy(tmp_path_factory.mktemp("impatient"), servers, confdir=confdir, **config) as proxy:
            yield Bench(proxy, proxy.create_key("alice"), {"asked": one, "probed": other}, {})
        assert "Traceback" not in proxy.log()


@pytest.mark.parametrize("model", ["asked", "probed"])
def test_loading_for_too_long(impatient: Bench, model: str) -> None:
    began = time.monotonic()
    answer = impatient.ask(model)
    assert 0.4 < time.monotonic() - began < 5
    assert answer.status == 503
    if model == "asked":
        assert answer.body == LOADING.partition(b"\r\n\r\n")[2]
        assert row_of(impatient.proxy, answer)["outcome"] == "error"
    else:  # it was not sent: there may be no answer of the server's own
        assert json.loads(answer.body)["error"]
