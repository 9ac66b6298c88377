"""Limits that several machines share: gateways with books of their own, and one Redis."""

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import pytest

from conftest import StartProxy
from databases import Database, RedisServer
from llama import LlamaServer
from proxy import Key, Proxy
from test_limits_e2e import ANSWER, ASK, CHAT, ask, ask_all, served, standing, statuses
from upstream import STALL, Upstream, reply
from waiting import eventually

type Databases = Callable[[str], Database]

ALICE = Key(0, "alice", "sk-alice-of-two-machines")


@pytest.fixture
def redis(database: Databases) -> Database:
    server = database("redis")
    assert isinstance(server, RedisServer)
    server.client().flushall()
    return server


def machines(
    start_proxy: StartProxy, servers: list[dict[str, Any]], redis: Database, limits: dict[str, Any], **more: Any
) -> list[Proxy]:
    """Two of them: nothing is shared but Redis, and who alice is."""
    static = {"name": "alice", "sha256": hashlib.sha256(ALICE.key.encode()).hexdigest(), "limits": limits}
    auth = {"sources": [{"type": "static", "keys": [static]}]}
    return [start_proxy(servers, auth=auth, limits={"storage": redis.url}, **more) for _ in range(2)]


async def test_fifty_at_once(tiny: LlamaServer, start_proxy: StartProxy, redis: Database) -> None:
    one, two = machines(start_proxy, [{"name": "a", "url": tiny.url}], redis, {"rpm": 5})
    assert statuses(await ask_all([one.url, two.url], ALICE, 50)) == {200: 5, 429: 45}
    one.restart()
    assert statuses(await ask_all([one.url, two.url], ALICE, 10)) == {429: 10}


def test_a_budget_of_both(upstream: Upstream, start_proxy: StartProxy, redis: Database) -> None:
    upstream.always(CHAT, reply(ANSWER))
    budgets = [{"per": "day", "tokens": 500}]
    both = machines(start_proxy, served(upstream), redis, {"budgets": budgets})
    assert [ask(both[number % 2], ALICE).status_code for number in range(7)] == [200] * 5 + [429] * 2
    assert [standing(proxy, ALICE)["day tokens"]["used"] for proxy in both] == [500, 500]
    assert sum(len(proxy.query("select * from limit_events")) for proxy in both) == 2


def test_a_dead_machine_gives_back(upstream: Upstream, start_proxy: StartProxy, redis: Database) -> None:
    upstream.plan(STALL)
    one, two = machines(start_proxy, served(upstream), redis, {"concurrency": 1})
    with closing(HTTPConnection("127.0.0.1", one.port)) as connection:
        connection.request("POST", CHAT, json.dumps(ASK), ALICE.headers)
        eventually(lambda: upstream.asked, "the request")
        one.kill()
    upstream.always(CHAT, reply(ANSWER))
    assert ask(two, ALICE).status_code == 429
    eventually(lambda: ask(two, ALICE).status_code == 200, "the dead machine's place", within_s=40)


def test_without_redis_nobody_comes_in(upstream: Upstream, start_proxy: StartProxy, redis: Database) -> None:
    upstream.always(CHAT, reply(ANSWER))
    one, _ = machines(start_proxy, served(upstream), redis, {"rpm": 100})
    assert ask(one, ALICE).status_code == 200
    redis.stop()
    try:
        refused = ask(one, ALICE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "limits_unavailable")
        with one.client() as client:
            assert client.get("/health").json()["limits"]["ok"] is False
            assert "llmproxy_limits_healthy 0" in client.get("/metrics").text
    finally:
        redis.start()
    eventually(lambda: ask(one, ALICE).status_code == 200, "Redis' return", within_s=20)
    assert standing(one, ALICE)["rpm"]["used"] >= 2
