"""Servers are asked what they are, all the time, without one holding up another."""

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from conftest import StartLlama
from gateway import asking, discovery
from gateway.asking import Asker, Found, NoAnswer, Probe, Told
from gateway.discovery import Prober, next_in_s
from gateway.health import Health
from gateway.servers import Server
from gateway.settings import Health as HealthConfig
from gateway.settings import Secret
from gateway.settings import Server as ServerConfig
from proxy import ROOT, free_port
from upstream import CLOSE, RESET, STALL, Behaviour, Pause, Steps, Upstream, chunk, head, reply

type StartUpstream = Callable[[], Upstream]

LLAMA = "Server: llama.cpp"
LOADING = reply({"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}, 503)
BROKEN = reply({"error": "broken"}, 500)
PROPS = reply({"total_slots": 3}, headers=[LLAMA])
# Longer than any test: rounds come because they are asked for, or because a server is asked more often.
NEVER_S = 600.0
# A server that hangs is given up after this; one that is well answers within it on the busiest machine.
TIMEOUT_S = 1.0


def asker(url: str, timeout_s: float = TIMEOUT_S, **config: Any) -> Asker:
    return Asker(ServerConfig("a", url, **config), timeout_s)


# -- one question


DRIP: list[Pause | bytes] = [step for _ in range(500) for step in (Pause(0.05), b"x")]
ENDLESS_HEAD: list[Pause | bytes] = [b"HTTP/1.1 200 OK\r\nX: ", *DRIP]
PROBES: dict[str, tuple[Behaviour, bool, Found]] = {
    "200": (reply({"status": "ok"}), False, Found(Probe.OK)),
    "200 of llama.cpp": (reply({}, headers=[LLAMA]), False, Found(Probe.OK, is_llama=True)),
    "its body does not matter": ((head(200, "Content-Length: 9"), STALL), False, Found(Probe.OK)),
    "a redirect": (reply({}, 302, headers=["Location: /x"]), False, Found(Probe.OK)),
    "no key": (reply({}, 401), False, Found(Probe.OK)),
    "no such path": (reply({}, 404), False, Found(Probe.OK)),
    "loading": (LOADING, False, Found(Probe.LOADING, "loads its model")),
    "503 of what is known as llama.cpp": (reply({}, 503), True, Found(Probe.LOADING, "loads its model")),
    "503 of llama.cpp": (reply({}, 503, headers=[LLAMA]), False, Found(Probe.LOADING, "loads its model", False, True)),
    "503": (reply({}, 503), False, Found(Probe.FAILED, "answers /health with HTTP 503")),
    "500": (BROKEN, False, Found(Probe.FAILED, "answers /health with HTTP 500")),
    "500 of llama.cpp": (
        reply({}, 500, headers=[LLAMA]),
        True,
        Found(Probe.FAILED, "answers /health with HTTP 500", is_llama=True),
    ),
    "silence": (STALL, False, Found(Probe.FAILED, "does not answer /health within 1 s")),
    "half of a 503": (
        (head(503, "Content-Length: 9"), b"x", STALL),
        False,
        Found(Probe.FAILED, "does not answer /health within 1 s"),
    ),
    "a 503 without an end": (
        (head(503, "Content-Length: 900"), *DRIP),
        False,
        Found(Probe.FAILED, "does not answer /health within 1 s"),
    ),
    "an end": (
        CLOSE,
        False,
        Found(Probe.FAILED, "does not answer /health: Server disconnected without sending a response."),
    ),
    "a reset": (RESET, False, Found(Probe.FAILED, "can't be reached: Connection reset by peer")),
    "no HTTP": (
        b"220 smtp\r\n\r\n",
        False,
        Found(Probe.FAILED, "does not answer /health: illegal status line: bytearray(b'220 smtp')"),
    ),
}


@pytest.mark.parametrize(("behaviour", "is_llama", "found"), PROBES.values(), ids=PROBES)
def test_a_probe(upstream: Upstream, behaviour: Behaviour, is_llama: bool, found: Found) -> None:
    upstream.always("/health", behaviour)
    assert asker(upstream.url).probe("/health", is_llama=is_llama) == found


def test_nothing_listens() -> None:
    found = asker(f"http://127.0.0.1:{free_port()}").probe("/health", is_llama=True)
    assert found == Found(Probe.FAILED, "refuses connections", refuses=True)


def test_a_name_that_does_not_exist() -> None:
    found = asker("http://no-route.invalid").probe("/health", is_llama=False)
    assert (found.probe, found.refuses) == (Probe.FAILED, False)
    assert found.reason.startswith("has a name that is not found")


ONE = {"id": "a"}
MODEL_LISTS: dict[str, tuple[Steps, Told]] = {
    "a list": (reply({"data": [ONE, {"id": "b"}, ONE]}), Told("openai", ("a", "b"))),
    "an empty list": (reply({"data": []}), Told("openai", ())),
    "llama.cpp": (reply({"data": [ONE]}, headers=[LLAMA]), Told("llama.cpp", ("a",))),
    "llama.cpp behind a proxy": (
        reply({"data": [ONE | {"owned_by": "llamacpp"}]}, headers=["Server: nginx"]),
        Told("llama.cpp", ("a",)),
    ),
    "another owner": (reply({"data": [ONE | {"owned_by": ["x"]}]}), Told("openai", ("a",))),
    "no key": (
        reply({}, 401),
        Told("openai", problem="wants an api_key of the gateway (HTTP 401)", is_refusal=True),
    ),
    "no list": (reply({}, 404), Told("openai", problem="answers /v1/models with HTTP 404")),
    "silence": (STALL, Told(problem="does not answer /v1/models within 1 s")),
    "no end": ((head(200, "Content-Length: 900"), *DRIP), Told(problem="does not answer /v1/models within 1 s")),
}


@pytest.mark.parametrize(("behaviour", "told"), MODEL_LISTS.values(), ids=MODEL_LISTS)
def test_models(upstream: Upstream, behaviour: Steps, told: Told) -> None:
    upstream.always("/v1/models", behaviour)
    assert asker(upstream.url).models() == told


DEEP = b'{"x":' + b"[" * 100_000
NO_UTF8 = b'{"data": [{"id": "\xff"}], "total_slots": "\xff"}'


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused(upstream: Upstream, status: int) -> None:
    upstream.always("/v1/models", reply({}, status))
    told = asker(upstream.url, api_key=Secret("sk-old")).models()
    assert told == Told("openai", problem=f"refuses the gateway's api_key (HTTP {status})", is_refusal=True)


@pytest.mark.parametrize("body", [b"<html>", b'{"data": [{}]}', b'{"data": 1}', b"\xff", b"[]", NO_UTF8, DEEP])
def test_models_that_are_not_understood(upstream: Upstream, body: bytes) -> None:
    upstream.always("/v1/models", reply(body))
    told = asker(upstream.url).models()
    assert (told.type, told.models) == ("openai", None)
    assert str(told.problem).startswith("tells its models in a way that is not understood")


def test_an_endless_list_is_not_kept(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MAX_BYTES", 1000)
    upstream.always("/v1/models", [head(200, "Transfer-Encoding: chunked"), *[chunk("x" * 100)] * 20, STALL])
    assert asker(upstream.url).models() == Told(
        problem="does not answer /v1/models: its answer has more than 1,000 bytes"
    )


SLOTS: dict[str, tuple[Steps, int | None]] = {
    "told": (PROPS, 3),
    "not told": (reply({}), None),
    "not JSON": (reply(b"x"), None),
    "not UTF-8": (reply(NO_UTF8), None),
    "deep": (reply(DEEP), None),
    "forbidden": (reply({"total_slots": 3}, 403), None),
}


@pytest.mark.parametrize(("behaviour", "slots"), SLOTS.values(), ids=SLOTS)
def test_slots(upstream: Upstream, behaviour: Steps, slots: int | None) -> None:
    upstream.always("/props", behaviour)
    assert asker(upstream.url).slots() == slots


def test_slots_of_a_server_that_does_not_answer(upstream: Upstream) -> None:
    upstream.always("/props", STALL)
    with pytest.raises(NoAnswer, match="does not answer /props within 1 s"):
        asker(upstream.url).slots()


def test_cookies_are_not_kept(upstream: Upstream) -> None:
    upstream.always("/health", reply({}, headers=["Set-Cookie: session=1; Path=/"]))
    one = asker(upstream.url)
    one.probe("/health", is_llama=False)
    one.models()
    assert [request.values("cookie") for request in upstream.requests] == [[], []]


def test_questions_carry_the_servers_key_and_keep_its_path(upstream: Upstream) -> None:
    one = asker(f"{upstream.url}/gpu/", api_key=Secret("sk-gpu"))
    one.probe("/ready?x=1", is_llama=False)
    one.models()
    one.slots()
    assert [request.target for request in upstream.requests] == ["/gpu/ready?x=1", "/gpu/v1/models", "/gpu/props"]
    assert {tuple(request.values("authorization")) for request in upstream.requests} == {("Bearer sk-gpu",)}
    assert upstream.connections == 3


def test_without_a_key_none_is_sent(upstream: Upstream) -> None:
    asker(upstream.url).models()
    assert upstream.requests[0].values("authorization") == []


# -- all the time


class Watched:
    """A prober at work. `changes`: of the servers' states, as "NAME BEFORE -> NOW", with what was known then."""

    def __init__(self, *servers: ServerConfig, **health: Any) -> None:
        config = HealthConfig(**{"interval_s": NEVER_S, "timeout_s": TIMEOUT_S, **health})
        self.changes: list[str] = []
        self.reasons: list[str | None] = []
        self.learned = 0
        self.servers = [Server(server, Health(config)) for server in servers]
        for server in self.servers:
            server.health.on_change = self._note(server)
        self.prober = Prober(self.servers, config, self._learn, self._changed)
        self.rounds = 0
        self.fails = 0  # how many more calls of `changed` fail
        self._news = asyncio.Event()

    def _note(self, server: Server) -> Callable[[str, str, str | None], None]:
        def note(before: str, now: str, why: str | None) -> None:
            self.reasons.append(why)
            self.changes.append(f"{server.name} {before} -> {now} {server.models} {server.slots}")

        return note

    def _learn(self) -> None:
        self.learned += 1

    def _changed(self) -> None:
        self.rounds += 1
        self._news.set()
        if self.fails:
            self.fails -= 1
            raise RuntimeError("a fault of the test's")

    async def until(self, look: Callable[[], object], within_s: float = 10) -> None:
        async with asyncio.timeout(within_s):
            while not look():
                self._news.clear()
                await self._news.wait()

    async def another_round(self) -> None:
        """Of a single server."""
        before = self.rounds
        self.prober.ask_soon(self.servers[0])
        await self.until(lambda: self.rounds > before)

    @property
    def states(self) -> list[str]:
        return [server.health.state for server in self.servers]


@asynccontextmanager
async def watching(*servers: ServerConfig, **health: Any) -> AsyncIterator[Watched]:
    watched = Watched(*servers, **health)
    watched.prober.start()
    try:
        yield watched
    finally:
        watched.prober.stop()


def paths(upstream: Upstream) -> list[str]:
    return [request.path for request in upstream.requests]


async def test_a_server_is_up_once_all_is_known_of_it(upstream: Upstream) -> None:
    upstream.always("/health", reply({}, headers=[LLAMA]))
    upstream.always("/v1/models", reply({"data": [{"id": "m"}]}, headers=[LLAMA]))
    upstream.always("/props", PROPS)
    async with watching(ServerConfig("a", upstream.url)) as watched:
        await watched.prober.asked_once()
        assert watched.changes == ["a unknown -> up ('m',) 3"]
        assert (watched.learned, watched.servers[0].type) == (1, "llama.cpp")
        assert paths(upstream) == ["/health", "/v1/models", "/props"]


ASKED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing is left open": (
        {"models": ("m",), "type": "llama.cpp", "slots": 0},
        ["/health", "/v1/models"],
    ),
    "the models are": ({"type": "openai"}, ["/health", "/v1/models"]),
    "the type is": ({"models": ("m",)}, ["/health", "/v1/models"]),
    "the slots are": ({"models": ("m",), "type": "llama.cpp"}, ["/health", "/v1/models", "/props"]),
    "an openai server has no slots to ask for": ({"models": ("m",), "type": "openai"}, ["/health", "/v1/models"]),
}


@pytest.mark.parametrize(("config", "asked"), ASKED.values(), ids=ASKED)
async def test_only_what_the_config_leaves_open_is_asked(
    upstream: Upstream, config: dict[str, Any], asked: list[str]
) -> None:
    """But for the models, which show whether the gateway's key is taken."""
    upstream.always("/props", PROPS)
    async with watching(ServerConfig("a", upstream.url, **config)) as watched:
        await watched.prober.asked_once()
        assert paths(upstream) == asked
        assert watched.states == ["up"]
        assert watched.servers[0].models == config.get("models", ("tiny",))
        assert watched.servers[0].type == config.get("type", "openai")


async def test_what_was_told_is_asked_again_when_it_came_back(upstream: Upstream) -> None:
    upstream.always("/health", reply({}, headers=[LLAMA]))
    upstream.always("/props", PROPS)
    config = ServerConfig("a", upstream.url)
    async with watching(config, interval_s=0.02, down_after=2) as watched:
        await watched.prober.asked_once()
        await watched.until(lambda: watched.rounds >= 4)
        assert (paths(upstream).count("/v1/models"), paths(upstream).count("/props")) == (1, 1)
        upstream.refuse()
        await watched.until(lambda: watched.states == ["down"])
        upstream.always("/v1/models", reply({"data": [{"id": "other"}]}, headers=[LLAMA]))
        upstream.always("/props", reply({"total_slots": 7}))
        upstream.listen()
        await watched.until(lambda: watched.states == ["up"])
        assert watched.changes[-1] == "a down -> up ('other',) 7"
        assert watched.learned == 2


async def test_models_are_asked_again_from_time_to_time(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watching(ServerConfig("a", upstream.url), interval_s=0.02) as watched:
        await watched.prober.asked_once()
        upstream.always("/v1/models", reply({"data": [{"id": "new"}, {"id": "tiny"}]}))
        monkeypatch.setattr(discovery, "REFRESH_S", 0.0)
        await watched.until(lambda: watched.servers[0].models == ("new", "tiny"))
        upstream.always("/v1/models", BROKEN)
        asked = paths(upstream).count("/v1/models")
        await watched.until(lambda: paths(upstream).count("/v1/models") > asked + 2)
        assert watched.servers[0].models == ("new", "tiny")
        assert watched.learned == 2


async def test_models_that_were_not_told_are_asked_for_in_every_round(
    upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.plan(reply({}, 500), reply({}, 500), path="/v1/models")
    async with watching(ServerConfig("a", upstream.url), interval_s=0.02) as watched:
        await watched.until(lambda: watched.servers[0].models)
        assert paths(upstream)[:6] == ["/health", "/v1/models"] * 3
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "server a answers /v1/models with HTTP 500"
    ]


@pytest.mark.parametrize("path", ["/v1/models", "/props"])
async def test_what_was_not_answered_after_it_came_back_is_asked_in_the_next_round(
    upstream: Upstream, path: str
) -> None:
    upstream.always("/health", reply({}, headers=[LLAMA]))
    upstream.always("/props", PROPS)
    async with watching(ServerConfig("a", upstream.url), interval_s=0.02, down_after=1, timeout_s=0.3) as watched:
        await watched.prober.asked_once()
        upstream.refuse()
        await watched.until(lambda: watched.states == ["down"])
        upstream.always("/v1/models", reply({"data": [{"id": "other"}]}, headers=[LLAMA]))
        upstream.always("/props", reply({"total_slots": 7}))
        upstream.plan(STALL, path=path)
        upstream.listen()
        await watched.until(lambda: (watched.servers[0].models, watched.servers[0].slots) == (("other",), 7))


async def test_models_that_cannot_be_read_keep_no_server_from_being_up(
    upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.always("/v1/models", reply(NO_UTF8))
    async with watching(ServerConfig("a", upstream.url)) as watched:
        await watched.prober.asked_once()
        assert watched.states == ["up"]
    assert [record.exc_info for record in caplog.records] == [None]


KEYED: dict[str, dict[str, Any]] = {
    "models from the config": {"models": ("m",)},
    "all from the config": {"models": ("m",), "type": "openai", "slots": 0},
    "llama.cpp": {"models": ("m",), "type": "llama.cpp"},
    "nothing from the config": {},
}


@pytest.mark.parametrize("config", KEYED.values(), ids=KEYED)
async def test_a_server_that_refuses_the_key_is_down_until_it_takes_it(
    upstream: Upstream, config: dict[str, Any]
) -> None:
    upstream.always("/v1/models", reply({}, 401))
    server = ServerConfig("a", upstream.url, api_key=Secret("sk-old"), **config)
    async with watching(server, interval_s=0.02, down_after=2) as watched:
        await watched.prober.asked_once()
        rounds = watched.rounds
        await watched.until(lambda: watched.rounds > rounds + 3)
        assert (watched.states, watched.reasons) == (["down"], ["refuses the gateway's api_key (HTTP 401)"])
        upstream.always("/v1/models", reply({"data": [{"id": "m"}]}))
        await watched.until(lambda: watched.states == ["up"])
        assert watched.servers[0].models == ("m",)


async def test_a_key_that_is_refused_from_now_on_is_noticed(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ServerConfig("a", upstream.url, models=("m",), type="openai", api_key=Secret("sk-old"))
    async with watching(server, interval_s=0.02, down_after=2) as watched:
        await watched.prober.asked_once()
        upstream.always("/v1/models", reply({}, 403))
        monkeypatch.setattr(discovery, "REFRESH_S", 0.0)
        await watched.until(lambda: watched.states == ["down"])
        assert watched.reasons[-1] == "refuses the gateway's api_key (HTTP 403)"


@pytest.mark.parametrize("status", [404, 500])
async def test_a_server_without_a_list_of_models_is_up_with_those_of_the_config(
    upstream: Upstream, status: int
) -> None:
    upstream.always("/v1/models", reply({}, status))
    server = ServerConfig("a", upstream.url, models=("m",), api_key=Secret("sk-gpu"))
    async with watching(server, interval_s=0.02) as watched:
        await watched.until(lambda: watched.rounds >= 4)
        assert (watched.states, paths(upstream).count("/v1/models")) == (["up"], 1)


async def test_changes_are_told_once_and_with_their_reason(upstream: Upstream) -> None:
    upstream.plan(LOADING, LOADING, path="/health")
    async with watching(ServerConfig("a", upstream.url), interval_s=0.02) as watched:
        await watched.until(lambda: watched.states == ["up"])
        upstream.refuse()
        await watched.until(lambda: watched.states == ["down"])
        rounds = watched.rounds
        await watched.until(lambda: watched.rounds > rounds + 2)
        upstream.listen()
        await watched.until(lambda: watched.states == ["up"])
        assert watched.reasons == [
            "loads its model",
            "answers its probe again",
            "refuses connections",
            "answers its probe again",
        ]


async def test_twenty_hanging_servers_hold_up_nobody(upstream: Upstream, start_upstream: StartUpstream) -> None:
    hanging = start_upstream()
    hanging.always("/health", STALL)
    servers = [ServerConfig(f"hanging-{number}", hanging.url) for number in range(20)]
    async with watching(*servers, ServerConfig("well", upstream.url), interval_s=0.02, timeout_s=NEVER_S) as watched:
        await watched.until(lambda: len(upstream.requests) > 10)
        assert watched.states == ["unknown"] * 20 + ["up"]


async def test_asked_once_waits_for_every_server(upstream: Upstream, start_upstream: StartUpstream) -> None:
    slow = start_upstream()
    slow.plan((STALL, reply({})), path="/health")
    everything: dict[str, Any] = {"models": ("m",), "type": "openai", "slots": 0}
    servers = [ServerConfig("well", upstream.url, **everything), ServerConfig("slow", slow.url, **everything)]
    async with watching(*servers, timeout_s=NEVER_S) as watched:
        waits = asyncio.create_task(watched.prober.asked_once())
        await watched.until(lambda: watched.states == ["up", "unknown"])
        await asyncio.to_thread(slow.wait_stalled)
        assert not waits.done()
        slow.release()
        await waits
        assert watched.states == ["up", "up"]


async def test_asked_once_does_not_wait_for_ever(upstream: Upstream) -> None:
    upstream.always("/v1/models", ENDLESS_HEAD)  # each read is in time, so httpx would wait for all of it
    began = time.monotonic()
    async with watching(ServerConfig("a", upstream.url), timeout_s=0.2) as watched:
        await watched.prober.asked_once()
        assert time.monotonic() - began < 5
        assert watched.states == ["up"]


async def test_an_answer_that_never_ends_takes_one_thread(upstream: Upstream) -> None:
    upstream.always("/health", ENDLESS_HEAD)
    async with watching(ServerConfig("a", upstream.url), interval_s=0.01, timeout_s=0.2, down_after=3) as watched:
        await watched.until(lambda: watched.states == ["down"] and watched.rounds >= 5)
        assert upstream.connections == 1


async def test_ask_soon_asks_now(upstream: Upstream) -> None:
    async with watching(ServerConfig("a", upstream.url)) as watched:
        await watched.prober.asked_once()
        upstream.always("/v1/models", reply({"data": [{"id": "other"}]}))
        await watched.another_round()
        assert paths(upstream) == ["/health", "/v1/models"] * 2
        assert watched.servers[0].models == ("other",)


async def test_ask_soon_asks_for_many_requests_once(upstream: Upstream) -> None:
    async with watching(ServerConfig("a", upstream.url, models=("m",), type="openai")) as watched:
        await watched.prober.asked_once()
        upstream.plan((STALL, reply({})), path="/health")
        watched.prober.ask_soon(watched.servers[0])
        await asyncio.to_thread(upstream.wait_stalled)
        for _ in range(100):  # what began before the trouble may say nothing of it
            watched.prober.ask_soon(watched.servers[0])
        upstream.release()
        await watched.until(lambda: watched.rounds >= 3)
        await asyncio.sleep(discovery.MIN_GAP_S * 2)  # that nothing more comes can only be waited for
        assert (watched.rounds, paths(upstream).count("/health")) == (3, 3)


REFUSES, LATE = Found(Probe.FAILED, refuses=True), Found(Probe.FAILED)
NEXT: dict[str, tuple[float, Found, str, float]] = {
    "up": (2, Found(Probe.OK), "up", 2),
    "loading": (2, Found(Probe.LOADING), "loading", 0.5),
    "refuses, and is down": (2, REFUSES, "down", 0.5),
    "refuses, but is not down yet": (2, REFUSES, "up", 2),
    "hangs": (2, LATE, "down", 2),
    "well, but not for long enough": (2, Found(Probe.OK), "down", 2),
    "often anyway": (0.1, REFUSES, "down", 0.1),
}


@pytest.mark.parametrize(("interval_s", "found", "state", "in_s"), NEXT.values(), ids=NEXT)
def test_the_next_round(interval_s: float, found: Found, state: str, in_s: float) -> None:
    assert next_in_s(interval_s, found, state) == in_s


async def test_a_server_that_will_be_back_soon_is_asked_more_often(upstream: Upstream) -> None:
    upstream.plan(LOADING, path="/health")
    async with watching(ServerConfig("a", upstream.url), down_after=1) as watched:
        await watched.until(lambda: watched.states == ["up"])
        upstream.refuse()
        await watched.another_round()
        upstream.listen()
        await watched.until(lambda: watched.states == ["up"])


async def test_a_fault_is_logged_and_the_asking_goes_on(upstream: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(ServerConfig("a", upstream.url), interval_s=0.02)
    watched.fails = 1
    ask = Asker.models

    def broken(self: Asker) -> Told:
        asking.Asker.models = ask  # type: ignore[method-assign]
        raise RuntimeError("a fault of the test's")

    asking.Asker.models = broken  # type: ignore[method-assign]
    watched.prober.start()
    await watched.until(lambda: watched.servers[0].models)
    watched.prober.stop()
    assert watched.changes == ["a unknown -> up () None"]  # what was found before is not lost
    assert [record.getMessage() for record in caplog.records] == [
        "asking server a what it is failed",
        "what comes after asking server a failed",
    ]


HANGS = """
import asyncio, sys, time
sys.path[:0] = ["addon", "tests"]
from gateway.settings import Health as HealthConfig, Server as ServerConfig
from gateway.discovery import Prober
from gateway.health import Health
from gateway.servers import Server
from upstream import STALL, Upstream

async def main() -> None:
    config = HealthConfig(timeout_s=600)
    upstream = Upstream().__enter__()
    upstream.always("/health", STALL)
    prober = Prober([Server(ServerConfig("a", upstream.url), Health(config))], config, print, print)
    prober.start()
    await asyncio.to_thread(upstream.wait_stalled)
    prober.stop()

asyncio.run(main())
print("ends")
"""


def test_the_end_does_not_wait_for_a_server_that_hangs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")


async def test_a_real_llama_server_dies_and_comes_back_with_other_slots(start_llama: StartLlama) -> None:
    first = await asyncio.to_thread(start_llama, None, "--alias", "one", "--parallel", "3")
    async with watching(ServerConfig("a", first.url), interval_s=0.05) as watched:
        await watched.prober.asked_once()
        first.kill()
        await watched.until(lambda: watched.states == ["down"])
        await asyncio.to_thread(start_llama, None, "--alias", "two", "--parallel", "2", port=first.port)
        await watched.until(lambda: watched.states == ["up"])
        assert watched.changes[0] == "a unknown -> up ('one',) 3"
        assert watched.changes[-1].endswith("-> up ('two',) 2")  # it may have been seen while it was loading
        assert watched.servers[0].type == "llama.cpp"
