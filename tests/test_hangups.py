"""500 requests of all kinds at real llama-servers, 16 in flight, 100 of them hung up at random moments: exact books.

What a client "had received" when it left is a moving target: tokens that the proxy has sent may lie in a socket's
buffer. So most clients here leave by closing their sending half, which says "I am gone" as clearly, and then read what
was under way to its end: with those the row agrees to the token. Clients that leave with a reset can't know what they
missed: their rows count at least what they read.
"""

import asyncio
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from llama import LlamaServer
from proxy import Key, Proxy, Row
from rawhttp import request
from recordings import parse
from said import deltas, said

SEED = 20261121
REQUESTS, HANG_UPS, IN_FLIGHT = 500, 100, 16
WITHIN_S = 90
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "tell me about the world"}]}
# Long enough to still run when its client leaves, on any machine.
LONG = 3000


class Leave(Enum):
    BODY = auto()  # within the request's body
    AT_ONCE = auto()  # after the request, before any answer
    LATER = auto()  # after some deltas, by closing the sending half
    RESET = auto()  # after some deltas, with an RST


@dataclass(frozen=True)
class Plan:
    path: str
    body: dict[str, Any]
    leave: Leave | None = None
    after: int = 0  # deltas; for LATER and RESET


@dataclass
class Seen:
    plan: Plan
    answer: bytes = b""


# path -> body; every one for `tokens` tokens where it generates, all but the last two streamed or not
ASK: list[Callable[[int], tuple[str, dict[str, Any]]]] = [
    lambda tokens: ("/v1/chat/completions", CHAT | {"model": "endless", "max_tokens": tokens}),
    lambda tokens: ("/v1/completions", {"model": "endless", "prompt": "the world", "max_tokens": tokens}),
    lambda tokens: ("/completion", {"model": "endless", "prompt": "a house", "n_predict": tokens}),
    lambda tokens: ("/v1/messages", CHAT | {"model": "endless", "max_tokens": tokens}),
    lambda tokens: ("/v1/responses", {"model": "endless", "input": "hello", "max_output_tokens": tokens}),
    lambda tokens: (
        "/v1/chat/completions",
        CHAT | {"model": "think", "max_tokens": tokens, "ignore_eos": True, "stream_options": {"include_usage": True}},
    ),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"model": "embeddings", "input": ["the world", "a house"]}),
    ("/v1/rerank", {"model": "rerank", "query": "world", "documents": ["the world", "a house"]}),
]


def plans(chance: random.Random) -> list[Plan]:
    found = [_leaving(chance, list(Leave)[number % len(Leave)]) for number in range(HANG_UPS)]
    while len(found) < REQUESTS:
        if chance.random() < 0.2:
            found.append(Plan(*chance.choice(OTHERS)))
        else:
            path, body = chance.choice(ASK)(chance.randint(1, 40))
            found.append(Plan(path, body | {"stream": chance.random() < 0.6}))
    chance.shuffle(found)
    return found


def _leaving(chance: random.Random, leave: Leave) -> Plan:
    streamed = leave in (Leave.LATER, Leave.RESET) or chance.random() < 0.5
    # A whole answer's server does not notice that its client is gone: don't have it work for long.
    path, body = chance.choice(ASK)(LONG if streamed else 300)
    return Plan(path, body | {"stream": streamed}, leave, chance.randint(0, 60))


@pytest.fixture(scope="module")
def proxy(
    tmp_path_factory: pytest.TempPathFactory, confdir: Path, llama: Callable[[str], LlamaServer]
) -> Iterator[Proxy]:
    servers = [{"name": name, "url": llama(name).url} for name in ("endless", "think", "embeddings", "rerank")]
    with Proxy(tmp_path_factory.mktemp("hangups"), servers, confdir=confdir) as proxy:
        yield proxy
    assert "Traceback" not in proxy.log()


async def play(port: int, key: Key, plan: Plan, number: int) -> Seen:
    body = json.dumps(plan.body).encode()
    data = request("POST", plan.path, key, body, f"X-Request-ID: {number}", "Connection: close")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seen = Seen(plan)
    try:
        writer.write(data[:-10] if plan.leave is Leave.BODY else data)
        await writer.drain()
        if plan.leave in (Leave.LATER, Leave.RESET):
            while deltas(_body(seen.answer)) < max(plan.after, 1):
                seen.answer += await reader.read(4096)
        if plan.leave is Leave.RESET:
            linger_on_for_0_s = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_on_for_0_s)
            writer.transport.abort()
            return seen
        if plan.leave:
            writer.write_eof()
        while piece := await reader.read(1 << 16):
            seen.answer += piece
    finally:
        writer.close()
    return seen


def _body(answer: bytes) -> bytes:
    """What of a chunked answer has come, without its framing: chunks of events hold no line that is a number."""
    _, _, rest = answer.partition(b"\r\n\r\n")
    parts = []
    while (end := rest.find(b"\r\n")) > 0:
        size = int(rest[:end], 16)
        parts.append(rest[end + 2 : end + 2 + size])
        rest = rest[end + 2 + size + 2 :]
    return b"".join(parts)


async def play_all(port: int, key: Key, all_plans: list[Plan]) -> list[Seen]:
    places, numbers = asyncio.Semaphore(IN_FLIGHT), count()

    async def one(plan: Plan) -> Seen:
        async with places:
            return await play(port, key, plan, next(numbers_of[id(plan)]))

    numbers_of = {id(plan): iter([number]) for number, plan in zip(numbers, all_plans, strict=False)}
    async with asyncio.timeout(WITHIN_S):
        return await asyncio.gather(*map(one, all_plans))


def test_hang_ups(proxy: Proxy) -> None:
    chance = random.Random(SEED)
    key = proxy.create_key("alice")
    seen = asyncio.run(play_all(proxy.port, key, plans(chance)))
    rows = proxy.wait_rows(REQUESTS, within_s=30)
    by_request = {int(row["client_request_id"]): row for row in rows}
    assert sorted(by_request) == list(range(REQUESTS))
    wrong = {
        number: (problem, one.plan, by_request[number])
        for number, one in enumerate(seen)
        if (problem := _problem(one, by_request[number]))
    }
    kinds = Counter((problem, plan.leave, row["outcome"]) for problem, plan, row in wrong.values())
    assert not wrong, f"{kinds}, first: {next(iter(wrong.values()))}"
    outcomes = Counter(row["outcome"] for row in rows)
    assert outcomes["client_closed"] + outcomes["ok"] == REQUESTS
    # Only whole answers may have been quicker than their client's leaving.
    quick = sum(one.plan.leave is Leave.AT_ONCE and not one.plan.body["stream"] for one in seen)
    assert HANG_UPS - quick <= outcomes["client_closed"] <= HANG_UPS
    (sums,) = proxy.query("select sum(requests) as requests, sum(completion_tokens) as tokens from usage_hourly")
    assert sums == {"requests": REQUESTS, "tokens": sum(row["completion_tokens"] or 0 for row in rows)}
    metrics = proxy.client().get("/metrics").text
    running = [line for line in metrics.splitlines() if line.startswith("llmproxy_running{")]
    assert [line.rpartition(" ")[2] for line in running] == ["0"] * 4  # every claim was given back


def _problem(seen: Seen, row: Row) -> str | None:
    plan, booked = seen.plan, row["completion_tokens"]
    if plan.leave is None:
        told = said(plan.path, parse(seen.answer).body)
        if row["outcome"] != "ok" or (row["prompt_tokens"], row["cached_tokens"], booked) != (
            told.prompt,
            told.cached,
            told.completion,
        ):
            return f"finished: the server said {told}"
        return None
    if plan.leave is Leave.AT_ONCE and not plan.body["stream"] and row["outcome"] == "ok":
        return None if booked == 300 else "a whole answer"
    if row["outcome"] != "client_closed":
        return "left, but not booked so"
    had = deltas(_body(seen.answer))
    if plan.leave is Leave.RESET:
        return None if (booked or 0) >= had else f"had received {had}"
    return None if abs((booked or 0) - had) <= 1 else f"had received {had}"


def test_the_plans_are_mixed() -> None:
    made = plans(random.Random(SEED))
    assert len(made) == REQUESTS
    assert Counter(plan.leave for plan in made if plan.leave) == dict.fromkeys(Leave, HANG_UPS // len(Leave))
    assert len({(plan.path, plan.body.get("stream")) for plan in made}) == 2 * 5 + 2
