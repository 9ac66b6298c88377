"""`fallbacks`: another model answers when no server of the one asked for is up, or its queue is full. All are told."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dialects import CHAT
from pairs import CALM, SCRIPTED, Actor, good_body, good_reply, let_play, row_of, states
from proxy import Key, Proxy
from rawhttp import Answer, post
from upstream import HEALTH, STALL, Upstream, reply
from waiting import eventually

PROBED = {"interval_s": 0.1, "timeout_s": 1, "down_after": 1, "eject_after": 1000}


@dataclass
class Bench:
    """One server for each model: big and small, and one whose fallback has no server that runs."""

    proxy: Proxy
    upstreams: dict[str, Upstream]
    actors: dict[str, Actor]
    alice: Key

    def ask(self, model: str, key: Key | None = None) -> Answer:
        return post(self.proxy.port, CHAT, key or self.alice, {"model": model, "x": 1})

    def down(self, model: str) -> None:
        """It is there, and its probes fail."""
        self.upstreams[model].always("/health", reply({"error": "broken"}, 500))
        eventually(lambda: states(self.proxy)[model] == "down", f"{model} to be down")

    def up(self, model: str) -> None:
        self.upstreams[model].always("/health", HEALTH)
        eventually(lambda: states(self.proxy)[model] == "up", f"{model} to be up")

    def gone(self, model: str) -> None:
        """Nothing listens there. `listen` on its upstream brings it back."""
        self.upstreams[model].refuse()
        eventually(lambda: states(self.proxy)[model] == "down", f"{model} to be down")


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[Bench]:
    models = ("big", "small", "other")
    upstreams = {model: Upstream().__enter__() for model in models}
    actors = {model: Actor(model, upstream) for model, upstream in upstreams.items()}
    for upstream in upstreams.values():
        let_play(upstream, actors)
    servers = [
        {"name": model, "url": upstreams[model].url, "models": [model], **SCRIPTED, "slots": 1} for model in models
    ]
    config: dict[str, Any] = {**CALM, "health": PROBED, "queue": {"max_length": 0}}
    fallbacks = {"big": ["other", "small"]}
    with Proxy(tmp_path_factory.mktemp("fallbacks"), servers, confdir=confdir, fallbacks=fallbacks, **config) as proxy:
        yield Bench(proxy, upstreams, actors, proxy.create_key("alice"))
        print(proxy.log()[-6000:])
    assert "Traceback" not in proxy.log()
    for upstream in upstreams.values():
        upstream.__exit__()


@pytest.fixture
def bench(long_lived: Bench) -> Iterator[Bench]:
    """All models up, but for `other`."""
    for model, actor in long_lived.actors.items():
        actor.reset()
        long_lived.up(model)
    long_lived.down("other")
    yield long_lived
    for upstream in long_lived.upstreams.values():
        upstream.release()


def is_from_small(bench: Bench, answer: Answer) -> None:
    assert (answer.status, answer.body) == (200, good_body("small"))
    assert answer.values("x-llmproxy-fallback") == ["big"]
    assert answer.values("x-llmproxy-server") == ["small"]
    assert bench.actors["small"].requests[-1].body == b'{"model": "small", "x": 1}'
    row = row_of(bench.proxy, answer)
    assert (row["model"], row["served_model"], row["fallback_from"]) == ("big", "small", "big")
    assert (row["server"], row["outcome"], row["status"]) == ("small", "ok", 200)


def test_no_fallback_is_needed(bench: Bench) -> None:
    answer = bench.ask("big")
    assert answer.body == good_body("big")
    assert answer.values("x-llmproxy-fallback") == []
    row = row_of(bench.proxy, answer)
    assert (row["served_model"], row["fallback_from"]) == ("big", None)


def test_no_server_is_up(bench: Bench) -> None:
    bench.down("big")
    is_from_small(bench, bench.ask("big"))
    bench.up("big")
    assert bench.ask("big").body == good_body("big")


def test_its_server_is_gone(bench: Bench) -> None:
    bench.gone("big")
    try:
        is_from_small(bench, bench.ask("big"))
    finally:
        bench.upstreams["big"].listen()


def test_the_queue_is_full(bench: Bench) -> None:
    bench.actors["big"].plan((STALL, good_reply("big")))
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(bench.ask, "big")
        bench.upstreams["big"].wait_stalled()
        is_from_small(bench, bench.ask("big"))
        bench.upstreams["big"].release()
        assert one.result(timeout=5).body == good_body("big")


def test_no_queue_and_no_fallback(bench: Bench) -> None:
    bench.actors["small"].plan((STALL, good_reply("small")))
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(bench.ask, "small")
        bench.upstreams["small"].wait_stalled()
        answer = bench.ask("small")
        assert (answer.status, answer.code) == (503, "no_server_available")
        assert int(answer.value("retry-after") or 0) >= 1
        bench.upstreams["small"].release()
        assert one.result(timeout=5).body == good_body("small")


def test_a_key_that_may_not_use_it(bench: Bench) -> None:
    bench.down("big")
    narrow = bench.proxy.create_key("narrow", "--model", "big")
    answer = bench.ask("big", narrow)
    assert (answer.status, answer.code) == (503, "no_server_available")
    assert bench.actors["small"].requests == []
    row = row_of(bench.proxy, answer)
    assert (row["outcome"], row["fallback_from"], row["attempts"]) == ("refused", None, 0)
    wide = bench.proxy.create_key("wide", "--model", "big", "--model", "small")
    is_from_small(bench, bench.ask("big", wide))


def test_it_does_not_work_the_other_way(bench: Bench) -> None:
    bench.down("small")
    answer = bench.ask("small")
    assert (answer.status, answer.code) == (503, "no_server_available")
    assert bench.actors["big"].requests == []


def test_none_is_up(bench: Bench) -> None:
    bench.down("big")
    bench.down("small")
    answer = bench.ask("big")
    assert (answer.status, answer.code) == (503, "no_server_available")
    assert int(answer.value("retry-after") or 0) >= 1


def test_an_error_is_no_reason(bench: Bench) -> None:
    bench.actors["big"].plan(reply({"error": {"message": "yours"}}, 500))
    answer = bench.ask("big")
    assert (answer.status, answer.values("x-llmproxy-fallback")) == (500, [])
    assert bench.actors["small"].requests == []
