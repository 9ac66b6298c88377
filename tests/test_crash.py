"""kill -9 under load, again and again: whoever saw the end of an answer has a row, nobody has two, none stays open.

CRASH_ROUNDS sets the number of kills.
"""

import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from itertools import count
from typing import Any

import pytest

from conftest import StartProxy
from llama import LlamaServer
from proxy import Key, Proxy, Row
from waiting import eventually

ROUNDS = int(os.environ.get("CRASH_ROUNDS", "4"))
CLIENTS = 16
ANSWERS_A_ROUND = 40  # at least, before the kill
TIMEOUT_S = 30

ENDPOINTS = [
    ("/v1/chat/completions", True, b"data: [DONE]\n\n"),
    ("/v1/chat/completions", False, b""),
    ("/v1/messages", True, b'data: {"type":"message_stop"}\n\n'),
    ("/v1/messages", False, b""),
]


@dataclass
class Load:
    """Clients that ask until they are told to stop, and what they saw: completed answers, by request id."""

    proxy: Proxy
    key: Key
    completed: dict[str, int | None] = field(default_factory=dict)  # tokens of the answer, where the client was told
    asked: "count[int]" = field(default_factory=count)
    stopping: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self, seed: int) -> None:
        self.stopping.clear()
        self.threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}-{n}"),)) for n in range(CLIENTS)
        ]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def _run(self, chance: random.Random) -> None:
        while not self.stopping.is_set():
            with closing(HTTPConnection("127.0.0.1", self.proxy.port, timeout=TIMEOUT_S)) as connection:
                try:
                    while not self.stopping.is_set():
                        self._ask(connection, chance)
                except TimeoutError:
                    raise
                except (OSError, HTTPException):
                    if self.stopping.wait(0.01):
                        return

    def _ask(self, connection: HTTPConnection, chance: random.Random) -> None:
        name = f"request-{next(self.asked)}"
        path, stream, end = chance.choice(ENDPOINTS)
        max_tokens = chance.randint(2, 60)
        body = {
            "model": "endless",
            "max_tokens": max_tokens,
            "stream": stream,
            "messages": [{"role": "user", "content": "tell me"}],
        }
        headers = {**self.key.headers, "x-request-id": name, "content-type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise HTTPException(f"{response.status} {response.read()!r}")
        if stream:
            if _saw(response, end):
                self.completed[name] = max_tokens
            response.read()
        else:
            usage = json.loads(response.read())["usage"]
            self.completed[name] = usage.get("completion_tokens", usage.get("output_tokens"))


def _saw(response: HTTPResponse, end: bytes) -> bool:
    """Read until this end. Whether its row is there counts from that moment, whatever becomes of the connection."""
    data = b""
    while piece := response.read1(1 << 16):
        data += piece
        if data.endswith(end):
            return True
    return False


@pytest.mark.parametrize("servers", [1, 2])
def test_kill_9_under_load(start_proxy: StartProxy, llama: Callable[[str], LlamaServer], servers: int) -> None:
    url = llama("endless").url
    # Two names for one server: what counts is that the proxy has to choose.
    proxy = start_proxy([{"name": f"s{n}", "url": url} for n in range(servers)])
    load = Load(proxy, proxy.create_key("alice"))
    rounds = ROUNDS // 2 + (ROUNDS % 2) * (servers - 1)
    for number in range(rounds):
        before = len(load.completed)
        load.start(number)
        wanted = before + ANSWERS_A_ROUND + random.Random(number).randrange(20)
        eventually(lambda wanted=wanted: len(load.completed) >= wanted, "answers", 60)  # type: ignore[misc]
        proxy.kill()
        load.stop()
        proxy.start()
        check(proxy.rows(), load.completed)
        check_rollups(proxy)
    outcomes = Counter(row["outcome"] for row in proxy.rows())
    print(f"{rounds} kills, {len(load.completed)} completed answers, rows: {dict(outcomes)}")
    assert outcomes["interrupted"], "nothing ran when the proxy was killed: this test has shown nothing"


def check(rows: list[Row], completed: dict[str, int | None]) -> None:
    by_name = {row["client_request_id"]: row for row in rows}
    assert len(by_name) == len(rows), "double rows"
    assert [row for row in rows if row["outcome"] == "open"] == []
    assert [name for name in completed if name not in by_name] == [], "completed answers without a row"
    wrong = {
        name: (tokens, by_name[name])
        for name, tokens in completed.items()
        if (by_name[name]["outcome"], by_name[name]["completion_tokens"]) != ("ok", tokens)
    }
    assert not wrong


def check_rollups(proxy: Proxy) -> None:
    """Roll-ups are the sums of the table, to the last request and token."""
    sums = (
        "count(*) as requests, sum(outcome = 'ok') as ok, sum(outcome = 'client_closed') as client_closed, "
        "sum(outcome = 'refused') as refused, "
        "sum(outcome in ('error', 'upstream_cut', 'unreachable', 'interrupted')) as errors, "
        "ifnull(sum(prompt_tokens), 0) as prompt_tokens, ifnull(sum(completion_tokens), 0) as completion_tokens, "
        "ifnull(sum(cached_tokens), 0) as cached_tokens"
    )
    names = "requests, ok, client_closed, refused, errors, prompt_tokens, completion_tokens, cached_tokens"
    added = ", ".join(f"sum({name}) as {name}" for name in names.split(", "))

    def both(table: str, period: str, length: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        cut = f"substr(started_at, 1, {length})" + (" || ':00Z'" if period == "hour" else "")
        group = "key_name, model, server"
        counted = proxy.query(
            f"select {cut} as period, key_name, ifnull(served_model, '(none)') as model, "
            f"ifnull(server, '(none)') as server, {sums} from requests group by 1, 2, 3, 4 order by 1, 2, 3, 4"
        )
        rolled = proxy.query(
            f"select {period} as period, {group}, {added} from {table} group by 1, 2, 3, 4 order by 1, 2, 3, 4"
        )
        return counted, rolled

    for counted, rolled in (both("usage_hourly", "hour", 13), both("usage_daily", "day", 10)):
        assert rolled == counted
    (timed,) = proxy.query("select count(ttft_ms) as requests from requests")
    assert proxy.query("select ifnull(sum(requests), 0) as requests from ttft_daily") == [timed]
