"""Limits through the real gateway: exact under concurrency, over workers and restarts; given back on every ending."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest

from conftest import StartProxy
from gateway.bounds import estimate
from llama import LlamaServer
from proxy import Key, Proxy
from upstream import CLOSE, RESET, STALL, Upstream, chunk, head, reply
from waiting import eventually

CHAT = "/v1/chat/completions"
ASK = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
USED = {"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100}
ANSWER = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}],
    "usage": USED,
}


def served(upstream: Upstream) -> list[dict[str, Any]]:
    return [{"name": "a", "url": upstream.url, "models": ["tiny"]}]


async def ask_all(urls: list[str], key: Key, count: int, body: dict[str, Any] = ASK) -> list[httpx.Response]:
    """All at once, over the addresses in turn."""
    async with httpx.AsyncClient(timeout=60, trust_env=False, headers=key.headers, limits=httpx.Limits()) as client:
        return await asyncio.gather(
            *(client.post(urls[number % len(urls)] + CHAT, json=body) for number in range(count))
        )


def ask(proxy: Proxy, key: Key, **more: Any) -> httpx.Response:
    with proxy.client(key) as client:
        return client.post(CHAT, json={**ASK, **more})


def statuses(answers: list[httpx.Response]) -> dict[int, int]:
    return dict(Counter(answer.status_code for answer in answers))


def standing(proxy: Proxy, key: Key) -> dict[str, dict[str, Any]]:
    """What /v1/usage says of the key's own limits, by limit; of a budget, by period and unit."""
    with proxy.client(key) as client:
        said = client.get("/v1/usage").json()
    own = [each for each in said["limits"] if each["scope"] == "key"]
    budgets = [each for each in said["budgets"] if each["scope"] == "key"]
    return {each["limit"]: each for each in own} | {f"{each['per']} {each['unit']}": each for each in budgets}


async def test_fifty_at_once(tiny: LlamaServer, start_proxy: StartProxy) -> None:
    """Exactly five pass, and after a restart within the minute none."""
    proxy = start_proxy([{"name": "a", "url": tiny.url}])
    key = proxy.create_key("alice", "--rpm", "5")
    answers = await ask_all([proxy.url], key, 50)
    assert statuses(answers) == {200: 5, 429: 45}
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "5"
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert 55 <= int(answer.headers["retry-after"]) <= 60
            assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    rows = proxy.wait_rows(50)
    assert Counter((row["outcome"], row["status"], row["error_code"]) for row in rows) == {
        ("ok", 200, None): 5,
        ("refused", 429, "rate_limit_exceeded"): 45,
    }
    proxy.restart()
    assert statuses(await ask_all([proxy.url], key, 10)) == {429: 10}
    proxy.kill()
    proxy.start()
    assert statuses(await ask_all([proxy.url], key, 10)) == {429: 10}


async def test_two_workers_count_as_one(tiny: LlamaServer, start_proxy: StartProxy) -> None:
    one = start_proxy([{"name": "a", "url": tiny.url}])
    two = start_proxy([{"name": "a", "url": tiny.url}], start=False)
    two.write_config(data=str(one.folder / "data"))
    two.start()
    key = one.create_key("alice", "--rpm", "5")
    assert statuses(await ask_all([one.url, two.url], key, 50)) == {200: 5, 429: 45}


def test_rates_of_tokens(upstream: Upstream, start_proxy: StartProxy) -> None:
    upstream.always(CHAT, reply(ANSWER))
    proxy = start_proxy(served(upstream))
    key = proxy.create_key("alice", "--tpm", "250")
    left = [ask(proxy, key) for _ in range(4)]
    assert [answer.status_code for answer in left] == [200, 200, 200, 429]
    assert left[3].json()["error"]["code"] == "rate_limit_exceeded"
    assert 55 <= int(left[3].headers["retry-after"]) <= 60
    assert left[3].headers["x-ratelimit-limit-tokens"] == "250"
    assert left[3].headers["x-ratelimit-remaining-tokens"] == "0"


@pytest.mark.parametrize(
    ("option", "value"), [("--rpm", "0"), ("--tpm", "0"), ("--concurrency", "0"), ("--budget", "day:tokens:0")]
)
def test_nothing_allowed(option: str, value: str, upstream: Upstream, start_proxy: StartProxy) -> None:
    proxy = start_proxy(served(upstream))
    key = proxy.create_key("alice", option, value)
    answer = ask(proxy, key)
    assert (answer.status_code, upstream.asked) == (429, [])
    assert answer.headers["retry-after"]


def test_concurrency_is_given_back(upstream: Upstream, start_proxy: StartProxy) -> None:
    upstream.plan((head(200, "Content-Type: application/json", "Content-Length: 2"), STALL, b"{}"))
    proxy = start_proxy(served(upstream))
    key = proxy.create_key("alice", "--concurrency", "1")
    with closing(HTTPConnection("127.0.0.1", proxy.port)) as held:
        held.request("POST", CHAT, json.dumps(ASK), key.headers)
        eventually(lambda: upstream.asked, "the first request")
        assert ask(proxy, key).status_code == 429
        assert standing(proxy, key)["concurrency"]["held"] == 1
        upstream.release()
        assert held.getresponse().status == 200
    upstream.always(CHAT, reply(ANSWER))
    assert ask(proxy, key).status_code == 200


STREAM = (head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked"),)
EVENT = chunk('data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n')
ENDINGS: dict[str, Any] = {
    "the connection is reset": RESET,
    "the server breaks off": (head(200, "Content-Type: application/json", "Content-Length: 9"), b"{", CLOSE),
    "a server error": reply({"error": {"message": "no"}}, status=500),
    "a client's mistake": reply({"error": {"message": "no"}}, status=400),
    "cut after an event": (*STREAM, EVENT, CLOSE),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("reserve", ["prompt", "max_tokens"])
def test_what_was_held_is_given_back(reserve: str, ending: Any, upstream: Upstream, start_proxy: StartProxy) -> None:
    upstream.always(CHAT, ending)
    proxy = start_proxy(
        served(upstream), limits={"reserve": reserve}, routing={"max_attempts": 1}, health={"eject_after": 99}
    )
    key = proxy.create_key("alice", "--tpm", "100000", "--concurrency", "3", "--budget", "day:tokens:100000")
    with proxy.client(key) as client:
        try:
            client.post(CHAT, json=ASK)
        except httpx.HTTPError:
            assert ending == ENDINGS["cut after an event"] or ending == ENDINGS["the server breaks off"]
    (row,) = proxy.wait_rows(1)
    used = row["completion_tokens"] or 0
    now = standing(proxy, key)
    assert {name: (each["used"], each["held"]) for name, each in now.items()} == {
        "concurrency": (0, 0),
        "tpm": (used, 0),
        "day tokens": (used, 0),
    }


@pytest.mark.parametrize("after_first_byte", [False, True])
def test_a_hang_up_gives_back(after_first_byte: bool, upstream: Upstream, start_proxy: StartProxy) -> None:
    upstream.plan((*STREAM, *([EVENT] if after_first_byte else []), STALL))
    proxy = start_proxy(served(upstream))
    key = proxy.create_key("alice", "--tpm", "100000", "--concurrency", "3")
    with closing(HTTPConnection("127.0.0.1", proxy.port)) as connection:
        connection.request("POST", CHAT, json.dumps({**ASK, "stream": True}), key.headers)
        eventually(lambda: upstream.asked, "the request")
        if after_first_byte:
            assert connection.getresponse().read(5)
        assert standing(proxy, key)["concurrency"]["held"] == 1
        assert standing(proxy, key)["tpm"]["held"] > 0
    eventually(lambda: [row for row in proxy.rows() if row["outcome"] == "client_closed"], "the hang-up's row")
    now = standing(proxy, key)
    prompt = estimate(json.dumps({**ASK, "stream": True}).encode())
    used = prompt + 1 if after_first_byte else 0
    assert (now["concurrency"]["held"], now["tpm"]["held"], now["tpm"]["used"]) == (0, 0, used)


def test_a_crash_gives_back(upstream: Upstream, start_proxy: StartProxy) -> None:
    upstream.plan((*STREAM, EVENT, STALL))
    proxy = start_proxy(served(upstream))
    key = proxy.create_key("alice", "--tpm", "100000", "--concurrency", "1", "--budget", "total:tokens:1000")
    with closing(HTTPConnection("127.0.0.1", proxy.port)) as connection:
        connection.request("POST", CHAT, json.dumps({**ASK, "stream": True}), key.headers)
        assert connection.getresponse().read(5)
        assert ask(proxy, key).status_code == 429
        proxy.kill()
    proxy.start()
    now = standing(proxy, key)
    assert {name: each["held"] for name, each in now.items()} == {"concurrency": 0, "tpm": 0, "total tokens": 0}
    assert ask(proxy, key).status_code != 429


def test_what_no_server_got_costs_no_request(start_proxy: StartProxy, upstream: Upstream) -> None:
    """Refused by another limit, or for want of a server."""
    proxy = start_proxy([{"name": "a", "url": "http://127.0.0.1:9", "models": ["tiny"]}])
    key = proxy.create_key("alice", "--rpm", "2")
    assert {ask(proxy, key).status_code for _ in range(5)} <= {502, 503}
    assert standing(proxy, key)["rpm"]["used"] == 0


PRICES = {"currency": "USD", "models": {"tiny": {"prompt": 1.0, "cached": 0.1, "completion": 10.0}}}


@pytest.mark.parametrize("unit", ["tokens", "money"])
@pytest.mark.parametrize("reserve", ["off", "max_tokens"])
async def test_overshoot(reserve: str, unit: str, tiny: LlamaServer, start_proxy: StartProxy) -> None:
    """Two hundred at once: with a reservation nothing is overspent, without one no more than what was in flight."""
    proxy = start_proxy([{"name": "a", "url": tiny.url}], limits={"reserve": reserve}, prices=PRICES)
    amount = 3000 if unit == "tokens" else 0.006
    key = proxy.create_key("alice", "--budget", f"month:{unit}:{amount}")
    answers = await ask_all([proxy.url], key, 200)
    told = statuses(answers)
    assert told[200] + told.get(429, 0) == 200
    refused = [answer.json()["error"]["code"] for answer in answers if answer.status_code == 429]
    assert set(refused) <= {"insufficient_quota"}
    rows = proxy.wait_rows(200)
    tokens = sum((row["prompt_tokens"] or 0) + (row["completion_tokens"] or 0) for row in rows)
    micros = sum(row["cost_micros"] or 0 for row in rows)
    now = standing(proxy, key)[f"month {unit}"]
    assert now["held"] == 0
    assert now["used"] == pytest.approx(tokens if unit == "tokens" else micros / 1e6)
    if reserve == "max_tokens":
        assert told[429]
        assert now["used"] <= amount


def test_the_cost_is_computed_once(upstream: Upstream, start_proxy: StartProxy) -> None:
    usage = {**USED, "prompt_tokens_details": {"cached_tokens": 20}}
    upstream.always(CHAT, reply({**ANSWER, "usage": usage}))
    proxy = start_proxy(served(upstream), prices=PRICES)
    key = proxy.create_key("alice")
    ask(proxy, key)
    (row,) = proxy.wait_rows(1)
    assert (row["cost_micros"], row["currency"]) == (40 + 2 + 400, "USD")
    proxy.write_config(prices={**PRICES, "models": {}})
    proxy.restart()
    ask(proxy, key)
    assert [(each["cost_micros"], each["currency"]) for each in proxy.wait_rows(2)] == [(442, "USD"), (None, None)]


def test_events_of_a_budget(upstream: Upstream, start_proxy: StartProxy) -> None:
    upstream.always(CHAT, reply(ANSWER))
    proxy = start_proxy(served(upstream))
    key = proxy.create_key("alice", "--budget", "day:tokens:500")
    assert [ask(proxy, key).status_code for _ in range(6)] == [200] * 5 + [429]
    events = proxy.query("select scope, per, unit, share, allowed, used from limit_events order by id")
    whole = {"scope": f"key:{key.id}", "per": "day", "unit": "tokens", "allowed": 500}
    assert events == [{**whole, "share": 0.8, "used": 400}, {**whole, "share": 1.0, "used": 500}]


def test_a_team_shares(upstream: Upstream, start_proxy: StartProxy) -> None:
    upstream.always(CHAT, reply(ANSWER))
    proxy = start_proxy(served(upstream), teams={"research": {"rpm": 3}})
    keys = [proxy.create_key(name, "--team", "research") for name in ("alice", "bob")]
    assert [ask(proxy, keys[number % 2]).status_code for number in range(5)] == [200, 200, 200, 429, 429]
    assert {row["team"] for row in proxy.wait_rows(5)} == {"research"}


SCOPES: dict[str, dict[str, Any]] = {
    "of everybody": {"all": {"rpm": 2}},
    "of the model": {"models": {"ti*": {"rpm": 2}}},
    "of each key": {"key": {"rpm": 1}},
}


@pytest.mark.parametrize("section", SCOPES.values(), ids=SCOPES)
def test_limits_of_the_config(section: dict[str, Any], upstream: Upstream, start_proxy: StartProxy) -> None:
    upstream.always(CHAT, reply(ANSWER))
    proxy = start_proxy(served(upstream), limits=section)
    keys = [proxy.create_key(name) for name in ("alice", "bob")]
    assert [ask(proxy, keys[number % 2]).status_code for number in range(4)] == [200, 200, 429, 429]


def test_a_fallback_is_limited_as_well(upstream: Upstream, start_proxy: StartProxy) -> None:
    upstream.always(CHAT, reply(ANSWER))
    down = {"name": "b", "url": "http://127.0.0.1:9", "models": ["down"]}
    proxy = start_proxy(
        [*served(upstream), down], limits={"models": {"tiny": {"rpm": 2}}}, fallbacks={"down": ["tiny"]}
    )
    key = proxy.create_key("alice")
    assert [ask(proxy, key, model=model).status_code for model in ("down", "tiny", "down", "tiny")] == [
        200,
        200,
        429,
        429,
    ]


def test_answers_without_usage_are_not_free(tiny: LlamaServer, start_proxy: StartProxy) -> None:
    proxy = start_proxy([{"name": "a", "url": tiny.url}])
    key = proxy.create_key("alice", "--budget", "total:tokens:100000")
    with proxy.client(key) as client:
        body = {"prompt": "word " * 400, "n_predict": 8, "response_fields": ["content"]}
        assert client.post("/completion", json=body).status_code == 200
    (row,) = proxy.wait_rows(1)
    assert (row["prompt_tokens"], row["tokens_source"]) == (None, None)
    assert standing(proxy, key)["total tokens"]["used"] > 400


def test_a_bound_is_written_where_none_is_named(upstream: Upstream, start_proxy: StartProxy) -> None:
    upstream.always(CHAT, reply(ANSWER))
    proxy = start_proxy(served(upstream), limits={"reserve": "max_tokens", "default_max_tokens": 77})
    limited, free = proxy.create_key("limited", "--tpm", "100000"), proxy.create_key("free")
    body = json.dumps({"model": "tiny", "messages": []})
    for key in (limited, free):
        with proxy.client(key) as client:
            client.post(CHAT, content=body)
    assert [request.body.decode() for request in upstream.asked] == [body.replace("{", '{"max_tokens":77,', 1), body]


type Tell = Callable[[httpx.Response], str | None]


def test_what_an_answer_says_is_left(upstream: Upstream, start_proxy: StartProxy) -> None:
    upstream.always(CHAT, reply(ANSWER))
    proxy = start_proxy(served(upstream), limits={"all": {"rpm": 100, "tpm": 1000}})
    key = proxy.create_key("alice", "--rpm", "9")
    answer = ask(proxy, key)
    left = {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit")}
    held = int(left.pop("x-ratelimit-remaining-tokens"))
    assert 900 < held < 1000
    assert re.fullmatch(r"1m0s|59(\.\d)?s", left.pop("x-ratelimit-reset-requests"))
    assert left == {
        "x-ratelimit-limit-requests": "9",
        "x-ratelimit-remaining-requests": "8",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-reset-tokens": "0ms",
    }
