"""Key sources behind the real proxy: who gets through, under which name the row stands, and that one frozen source is
nobody else's trouble.
"""

import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from benches import Hook
from conftest import StartProxy
from databases import Database, RedisServer
from gateway.keys import hash_key
from llama import LlamaServer
from proxy import Proxy

BODY = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}
QUERY = "select name, rpm, disabled from people where secret = :sha256"


def server_of(llama: LlamaServer) -> dict[str, object]:
    return {"name": "gpu-1", "url": llama.url}


def ask(proxy: Proxy, key: str, timeout_s: float = 60, came: str = "") -> tuple[int, str]:
    with httpx.Client(base_url=proxy.url, trust_env=False, timeout=timeout_s) as client:
        answer = client.post("/v1/chat/completions", json=BODY, headers={"x-api-key": key, "x-forwarded-for": came})
    return answer.status_code, answer.json().get("error", {}).get("code", "")


def test_four_sources_in_a_row(
    start_proxy: StartProxy, tiny: LlamaServer, database: Callable[[str], Database], tmp_path: Path
) -> None:
    server = database("redis")
    assert isinstance(server, RedisServer)
    with closing(server.client()) as db:
        db.hset(f"llmproxy:key:{hash_key('sk-redis')}", "name", "rita")
    people = tmp_path / "people.db"
    with closing(sqlite3.connect(people)) as file, file:
        file.execute("create table people (name text, rpm integer, disabled integer, secret text)")
        file.execute("insert into people values ('sue', 5, 0, ?)", [hash_key("sk-sql")])
        file.execute("insert into people values ('sam', 5, 1, ?)", [hash_key("sk-off")])
    sources = [
        {"type": "local"},
        {"type": "static", "keys": [{"name": "ci", "key": "${CI_KEY}", "models": ["other"]}]},
        {"type": "sql", "url": f"sqlite:///{people}", "query": QUERY, "timeout_s": 30},
        {"type": "redis", "url": server.url, "timeout_s": 30},
    ]
    proxy = start_proxy([server_of(tiny)], auth={"sources": sources}, env={"CI_KEY": "sk-static"})
    alice = proxy.create_key("alice")
    keys = [alice.key, "sk-sql", "sk-redis", "sk-static", "sk-off", "sk-nobody"]
    assert [ask(proxy, key) for key in keys] == [
        (200, ""),
        (200, ""),
        (200, ""),
        (403, "model_not_allowed"),
        (403, "key_disabled"),
        (401, "invalid_api_key"),
    ]
    named = [(row["key_id"], row["key_name"], row["status"]) for row in proxy.wait_rows(4)]
    assert named == [(alice.id, "alice", 200), (None, "sue", 200), (None, "rita", 200), (None, "ci", 403)]
    assert not [key for key in keys if key in proxy.log()]


def test_a_frozen_source_holds_up_nobody_else(start_proxy: StartProxy, tiny: LlamaServer, tmp_path: Path) -> None:
    hook = Hook(tmp_path, lambda name: None)  # type: ignore[arg-type, return-value]
    hook.put("sk-hook", name="hugo")
    sources = [{"type": "local"}, {"type": "webhook", "url": hook.url, "timeout_s": 6}]
    proxy = start_proxy([server_of(tiny)], auth={"sources": sources})
    alice = proxy.create_key("alice")
    assert ask(proxy, alice.key) == (200, "")
    hook.freeze()
    with ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(ask, proxy, "sk-hook") for _ in range(4)]
        waiting += [pool.submit(ask, proxy, f"sk-{number}") for number in range(16)]
        while not hook.asked:
            time.sleep(0.005)
        assert [ask(proxy, alice.key) for _ in range(3)] == [(200, "")] * 3
        with pytest.raises(httpx.ReadTimeout):  # one leaves before it is known who it is
            ask(proxy, "sk-hook", timeout_s=0.2)
        assert not any(future.done() for future in waiting[:4])
        assert [future.result() for future in waiting] == [(503, "keys_unavailable")] * 20
    hook.thaw()
    assert ask(proxy, "sk-hook") == (200, "")
    hook.close()
    named = [(row["key_name"], row["outcome"]) for row in proxy.wait_rows(5)]
    assert named == [("alice", "ok")] * 4 + [("hugo", "ok")]


def test_whose_word_counts_for_an_address(start_proxy: StartProxy, tiny: LlamaServer) -> None:
    sources = [{"type": "static", "keys": [{"name": "office", "key": "sk-office", "networks": ["192.0.2.0/24"]}]}]
    lies = start_proxy([server_of(tiny)], auth={"sources": sources})
    trusts = start_proxy([server_of(tiny)], auth={"sources": sources}, trusted_proxies=["127.0.0.0/8"])
    came = ["192.0.2.7", "198.51.100.1", "198.51.100.1, 192.0.2.7", "192.0.2.7, 198.51.100.1", "unknown"]
    assert [ask(lies, "sk-office", came=each) for each in came] == [(403, "network_not_allowed")] * 5
    assert [ask(trusts, "sk-office", came=each) for each in came] == [
        (200, ""),
        (403, "network_not_allowed"),
        (200, ""),
        (403, "network_not_allowed"),
        (403, "network_not_allowed"),
    ]


def test_a_start_without_a_driver_or_a_file_says_so(start_proxy: StartProxy, tiny: LlamaServer) -> None:
    proxy = start_proxy([server_of(tiny)], auth={"sources": [{"type": "lua", "path": "none.lua"}]}, start=False)
    proxy.launch()
    assert proxy.wait() != 0
    assert "auth.sources[0].path:" in proxy.log()
    assert "none.lua can't be read: No such file or directory" in proxy.log()
