"""Pairs of scripted servers behind one proxy. Each pair has a model of its own, so that many tests can share the proxy
and none sees what another did to its servers.

The first server of a pair gets every request as long as the gateway thinks well of it: the strategy is round-robin, and
its weight is a million times the other's.
"""

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dialects import CHAT, PATHS, stream_of
from proxy import Key, Proxy, Row
from rawhttp import Answer, ask, post, request
from upstream import Behaviour, Request, Steps, Upstream, head, reply, stream
from waiting import eventually

FIRST_ALWAYS = 1_000_000
SSE = head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
# llama-server's own, while it loads its model; on every path.
LOADING = reply(
    {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}},
    503,
    headers=["Connection: close"],
)
OVERLOADED = reply({"error": {"message": "no room", "type": "overloaded", "code": 503}}, 503)


def paused_for(retry_after: str, status: int = 503) -> bytes:
    return reply({"error": {"message": "later"}}, status, headers=[f"Retry-After: {retry_after}"])


def good_answer(name: str, path: str, streamed: bool) -> Steps:
    """A whole answer that tells which server it is from."""
    if streamed:
        return stream(*stream_of(path, name), headers=[f"X-From: {name}"])
    return good_reply(name, path)


def good_reply(name: str, path: str = CHAT) -> bytes:
    return reply(good_body(name, path), headers=[f"X-From: {name}"])


def good_body(name: str, path: str = CHAT, streamed: bool = False) -> bytes:
    if streamed:
        return "".join(stream_of(path, name)).encode()
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    return json.dumps({"choices": [{"index": 0, "message": {"content": name}}], "usage": usage}).encode()


@dataclass
class Actor:
    """One scripted server of one pair. `name` as in the config, in rows and in headers."""

    name: str
    upstream: Upstream
    requests: list[Request] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # when each came, of the monotonic clock
    always: Behaviour | None = None  # after the plan; None: a whole answer
    _plan: deque[Behaviour] = field(default_factory=deque)

    def plan(self, *behaviours: Behaviour) -> None:
        """What it does with its next requests, one after the other."""
        self._plan.extend(behaviours)

    def play(self, request: Request) -> Steps:
        self.times.append(time.monotonic())
        self.requests.append(request)
        behaviour = self._plan.popleft() if self._plan else self.always
        if behaviour is None:
            return good_answer(self.name, request.path, bool(request.json().get("stream")))
        return behaviour(request) if callable(behaviour) else behaviour

    def reset(self) -> None:
        self.requests.clear()
        self.times.clear()
        self._plan.clear()
        self.always = None


@dataclass(frozen=True)
class Pair:
    """`first` is the server that requests go to, `second` the one that stands by."""

    proxy: Proxy
    key: Key
    model: str
    first: Actor
    second: Actor

    def body(self, **more: Any) -> bytes:
        return json.dumps({"model": self.model, "messages": [{"role": "user", "content": "go"}], **more}).encode()

    def ask(self, path: str = CHAT, body: bytes | None = None, headers: Iterable[str] = (), **more: Any) -> Answer:
        return post(self.proxy.port, path, self.key, body or self.body(**more), headers)

    def sent(self) -> tuple[int, int]:
        """How many requests came to each."""
        return len(self.first.requests), len(self.second.requests)

    def state(self, actor: Actor) -> str:
        return states(self.proxy)[actor.name]


# Its models and slots are known: it is asked for nothing but its health.
SCRIPTED: dict[str, Any] = {"type": "llama.cpp", "slots": 0}
# Nothing but requests changes what is thought of a server, and no fault is remembered for long.
CALM: dict[str, Any] = {
    "routing": {"strategy": "round-robin", "backoff_s": 0.01, "max_backoff_s": 0.05},
    "health": {"interval_s": 600, "timeout_s": 2, "eject_after": 1000},
}


@contextmanager
def pairs(
    folder: Path, confdir: Path, models: Iterable[str], *, alone: Iterable[str] = (), **config: Any
) -> Iterator[dict[str, Pair]]:
    """A proxy in front of a pair for each model. `alone`: those without a second server. `config`: what CALM is not."""
    with Upstream() as one, Upstream() as other:
        firsts = {model: Actor(f"{model} first", one) for model in models}
        seconds = {model: Actor(f"{model} second", other) for model in models}
        for upstream, actors in ((one, firsts), (other, seconds)):
            let_play(upstream, actors)
        servers = [
            {"name": actor.name, "url": upstream.url, "models": [model], "weight": weight, **SCRIPTED}
            for upstream, actors, weight in ((one, firsts, FIRST_ALWAYS), (other, seconds, 1))
            for model, actor in actors.items()
            if upstream is one or model not in alone
        ]
        with Proxy(folder, servers, confdir=confdir, **{**CALM, **config}) as proxy:
            key = proxy.create_key("alice")
            yield {model: Pair(proxy, key, model, firsts[model], seconds[model]) for model in firsts}
            print(f"--- log of {folder.name}\n{proxy.log()[-6000:]}")
        assert "Traceback" not in proxy.log()


def let_play(upstream: Upstream, actors: Mapping[str, Actor]) -> None:
    """From here on the upstream does what the actor of each request's model does."""

    def play(request: Request) -> Steps:
        return actors[request.json()["model"]].play(request)

    for path in PATHS:
        upstream.always(path, play)


def health(proxy: Proxy) -> Any:
    return ask(proxy.port, request("GET", "/health")).json()


def states(proxy: Proxy) -> dict[str, str]:
    """What the gateway thinks of each server."""
    return dict(health(proxy)["servers"]["states"])


def row_of(proxy: Proxy, answer: Answer) -> Row:
    """The row of the request that got this answer, when it is settled."""
    request_id = answer.value("x-request-id")
    sql = "select * from requests where id = ? and outcome != 'open'"
    (row,) = eventually(lambda: proxy.query(sql, request_id), f"the row of {request_id}")
    return row


def last_row(proxy: Proxy) -> Row:
    """The newest row, when it is settled."""
    return proxy.wait_rows(len(proxy.rows()))[-1]


def events_of(proxy: Proxy, server: str) -> list[Row]:
    """What happened to a server, oldest first."""
    return proxy.query("select * from server_events where server = ? order by id", server)
