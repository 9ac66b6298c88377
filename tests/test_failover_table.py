"""What a fault of a server comes to, by the moment in which it happens: what the client sees, what the row says, what
the gateway then thinks of the server. Over HTTP/1.1 and HTTP/2.

`pytest -s` prints it as a table. Each case has a model of its own with two servers: `bad`
gets the request and plays the fault, `good` stands by. One failure is enough here for a server to be left alone.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from dialects import CHAT, error_in, events, has_end_mark, stream_of
from front import Front
from h2client import Http2
from llama import LlamaServer, Model, start_server
from pairs import FIRST_ALWAYS, OVERLOADED, SCRIPTED, SSE, Actor, good_body, last_row, let_play, states
from proxy import Key, Proxy
from rawhttp import Answer, Connection, request
from upstream import CLOSE, RESET, STALL, Pause, Step, Upstream, chunk
from waiting import eventually

FIRST_BYTE_TIMEOUT_S = 0.5
SILENT_FOR_S = 2 * FIRST_BYTE_TIMEOUT_S  # a client has waited for long enough to call it silence
CONFIG: dict[str, Any] = {
    "routing": {"strategy": "round-robin", "backoff_s": 0.01},
    "health": {"interval_s": 600, "eject_after": 1, "eject_s": 600},
}
GARBAGE = b"\x00\xff no HTTP \r\n\r\n"
FIRST_EVENT = stream_of(CHAT, "bad")[0].encode()


@dataclass(frozen=True)
class Found:
    """`status`, `outcome`, `attempts` and `server` are the row's; `state` is the bad server's afterwards."""

    client: str
    status: int
    outcome: str
    attempts: int
    server: str
    state: str


MOVED = Found("the good server's answer", 200, "ok", 2, "good", "ejected")
MOVED_DOWN = Found("the good server's answer", 200, "ok", 2, "good", "down")
TOLD = Found("an event, an error event, a cut", 200, "upstream_cut", 1, "bad", "ejected")
SILENCE = Found("an event, then silence; it leaves", 200, "client_closed", 1, "bad", "up")

BEFORE, HEAD, EVENT = "before headers", "after headers", "after first event"
TABLE: dict[tuple[str, str], Found] = {
    ("refused", BEFORE): MOVED_DOWN,
    ("FIN", BEFORE): MOVED,
    ("FIN", HEAD): MOVED,
    ("FIN", EVENT): TOLD,
    ("RST", BEFORE): MOVED,
    ("RST", HEAD): MOVED,
    ("RST", EVENT): TOLD,
    ("stall", BEFORE): MOVED,
    ("stall", HEAD): MOVED,
    ("stall", EVENT): SILENCE,
    ("garbage", BEFORE): MOVED,
    ("garbage", HEAD): MOVED,
    ("garbage", EVENT): TOLD,
    ("503", BEFORE): MOVED,
    ("SIGKILL", BEFORE): MOVED,
    ("SIGKILL", HEAD): MOVED,
    ("SIGKILL", EVENT): TOLD,
}
# What a scripted server does once it has come to the moment. Behind an event, an RST must not overtake it.
SCRIPTS: dict[str, list[Step]] = {
    "FIN": [CLOSE],
    "RST": [Pause(0.05), RESET],
    "stall": [STALL],
    "garbage": [GARBAGE, CLOSE],
    "503": [OVERLOADED, CLOSE],
}
MOMENTS: dict[str, list[Step]] = {BEFORE: [], HEAD: [SSE], EVENT: [SSE, chunk(FIRST_EVENT)]}


# -- clients -----------------------------------------------------------------------------------------------------------


class Client(Protocol):
    """One request over a connection of its own."""

    def send(self, key: Key, body: bytes) -> None: ...
    def wait_for(self, what: bytes) -> None: ...
    def answer(self) -> Answer: ...
    def is_silent(self, for_s: float) -> bool: ...
    def leave(self) -> None: ...
    def close(self) -> None: ...


class Http11(Connection):
    def send(self, key: Key, body: bytes) -> None:
        self.sock.sendall(request("POST", CHAT, key, body))

    def wait_for(self, what: bytes) -> None:
        assert self._find(what), f"{what!r} did not come: {self.received!r}"

    def is_silent(self, for_s: float) -> bool:
        self.sock.settimeout(for_s)
        try:
            self._more()
        except TimeoutError:
            return True
        return False

    def leave(self) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()


class Http20:
    def __init__(self, port: int) -> None:
        self._connection = Http2(port)
        self._stream = 0

    def send(self, key: Key, body: bytes) -> None:
        self._stream = self._connection.post(CHAT, key, body)

    def wait_for(self, what: bytes) -> None:
        self._connection.wait_for(self._stream, what)

    def answer(self) -> Answer:
        return self._connection.answer(self._stream)

    def is_silent(self, for_s: float) -> bool:
        return self._connection.is_silent(for_s)

    def leave(self) -> None:
        """This request only: the connection stays, as those of HTTP/2 do."""
        self._connection.reset(self._stream)

    def close(self) -> None:
        self._connection.sock.close()


CLIENTS: dict[str, Callable[[int], Client]] = {"HTTP/1.1": Http11, "HTTP/2": Http20}
CASES = [(fault, moment, http) for fault, moment in TABLE for http in CLIENTS]


def model_of(fault: str, moment: str, http: str) -> str:
    return f"{fault} {moment} {http}".replace(" ", "-").replace("/", "-")


# -- a real server to kill ---------------------------------------------------------------------------------------------


@dataclass
class Victim:
    """A llama-server with one slot and slow prompts, behind a front that sees what has come of an answer."""

    cache: Path
    sent_back: bytearray = field(default_factory=bytearray)
    server: LlamaServer | None = None

    def __post_init__(self) -> None:
        self.front = Front(0, self.sent_back.extend)

    def start(self) -> None:
        model = Model(mean_len=0, layers=4, embd=256)
        self.server = start_server(self.cache, model, "--alias", "slow", "--parallel", "1", "--ctx", "16384")
        self.front.target = self.server.port

    def kill(self) -> None:
        assert self.server
        self.server.kill()

    def occupy(self, stack: ExitStack) -> None:
        """Take its slot, not by way of the gateway: from here on it answers nothing, not even a head."""
        assert self.server
        client = stack.enter_context(httpx.Client(base_url=self.server.url, trust_env=False, timeout=20))
        body = {"prompt": "the world", "n_predict": -1, "stream": True}
        stream = stack.enter_context(client.stream("POST", "/completion", json=body))
        next(stream.iter_bytes())

    def play(self, moment: str, stack: ExitStack, client: Client, send: Callable[[], None]) -> None:
        """Let it come to the moment, then kill it."""
        before = len(self.front.posts)
        self.sent_back.clear()
        if moment == BEFORE:
            self.occupy(stack)
        send()
        eventually(lambda: len(self.front.posts) > before, "the request at the server")
        if moment == HEAD:
            eventually(lambda: b"\r\n\r\n" in self.sent_back, "the head of its answer")
        if moment == EVENT:
            client.wait_for(b'"content":"')
        had_event = b"data:" in self.sent_back
        self.kill()
        assert had_event == (moment == EVENT), f"came too late for {moment}: {bytes(self.sent_back[:500])!r}"


def body_of(model: str, fault: str, moment: str) -> bytes:
    # Long enough for its server to read for seconds: the head goes out before that, the first event after.
    words = 6000 if (fault, moment) == ("SIGKILL", HEAD) else 3
    messages = [{"role": "user", "content": "the world " * words}]
    return json.dumps({"model": model, "stream": True, "messages": messages}).encode()


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    proxy: Proxy
    key: Key
    bad: dict[str, Actor]
    absent: Upstream
    victim: Victim
    found: dict[tuple[str, str, str], Found] = field(default_factory=dict)

    def find(self, fault: str, moment: str, http: str) -> Found:
        model = model_of(fault, moment, http)
        with ExitStack() as stack:
            client = CLIENTS[http](self.proxy.port)
            stack.callback(client.close)
            seen = self._play(stack, client, fault, moment, model)
            row = last_row(self.proxy)
        assert row["model"] == model
        server = str(row["server"]).removeprefix(f"{model} ")
        state = states(self.proxy)[f"{model} bad"]
        return Found(seen, row["status"], row["outcome"], row["attempts"], server, state)

    def _play(self, stack: ExitStack, client: Client, fault: str, moment: str, model: str) -> str:
        def send() -> None:
            client.send(self.key, body_of(model, fault, moment))

        if fault == "SIGKILL":
            self.victim.start()
            self.victim.play(moment, stack, client, send)
            return what_of(client.answer(), model)
        if fault != "refused":
            self.bad[model].plan([*MOMENTS[moment], *SCRIPTS[fault]])
        send()
        if (fault, moment) == ("stall", EVENT):
            client.wait_for(FIRST_EVENT)
            silent = client.is_silent(SILENT_FOR_S)
            client.leave()
            return SILENCE.client if silent else "an event, then something else"
        return what_of(client.answer(), model)


def what_of(answer: Answer, model: str) -> str:
    """An answer in words."""
    if answer.status != 200:
        return f"HTTP {answer.status}: {answer.body!r}"
    if answer.body == good_body(f"{model} good", CHAT, streamed=True) and answer.complete:
        return MOVED.client
    had = len(events(answer.body))
    told = error_in(CHAT, answer.body) is not None
    parts = ["an event" if had > told else "no event", *(["an error event"] if told else [])]
    parts += ["a made-up end"] if has_end_mark(CHAT, answer.body) else []
    return ", ".join([*parts, "a clean end" if answer.complete else "a cut"])


def servers_of(model: str, fault: str, bad: str, good: str) -> list[dict[str, Any]]:
    return [
        {"name": f"{model} {name}", "url": url, "models": [model], "weight": weight, **SCRIPTED}
        for name, url, weight in (("bad", bad, FIRST_ALWAYS), ("good", good, 1))
    ]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, confdir: Path, model_cache: Path) -> Iterator[Stage]:
    victim = Victim(model_cache)
    with Upstream() as one, Upstream() as other, Upstream() as absent, victim.front, ExitStack() as stack:
        urls = {"refused": absent.url, "SIGKILL": victim.front.url}
        models = {model_of(*case): case[0] for case in CASES}
        bad = {model: Actor(f"{model} bad", one) for model in models}
        let_play(one, bad)
        let_play(other, {model: Actor(f"{model} good", other) for model in models})
        servers = [
            server
            for model, fault in models.items()
            for server in servers_of(model, fault, urls.get(fault, one.url), other.url)
        ]
        victim.start()  # for the first probe
        folder = tmp_path_factory.mktemp("table")
        config = {**CONFIG, "first_byte_timeout_s": FIRST_BYTE_TIMEOUT_S}
        proxy = stack.enter_context(Proxy(folder, servers, confdir=confdir, **config))
        eventually(lambda: set(states(proxy).values()) == {"up"}, "the first probes")
        absent.refuse()
        victim.kill()
        stage = Stage(proxy, proxy.create_key("alice"), bad, absent, victim)
        yield stage
        print(f"--- log of {folder.name}\n{proxy.log()[-6000:]}\n\n{as_markdown(stage.found)}")
    assert "Traceback" not in proxy.log()


def as_markdown(found: dict[tuple[str, str, str], Found]) -> str:
    """Both protocols in one line where they agree."""
    lines = ["| fault | when | over | the client sees | row | attempts | server | its state then |", "|---" * 8 + "|"]
    for fault, moment in TABLE:
        of = {http: found[fault, moment, http] for http in CLIENTS if (fault, moment, http) in found}
        merged = {" and ".join(of): next(iter(of.values()))} if len(set(of.values())) == 1 else of
        for http, one in merged.items():
            row = f"{one.outcome}, {one.status}"
            cells = [fault, moment, http, one.client, row, str(one.attempts), one.server, one.state]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize(("fault", "moment", "http"), CASES, ids=[model_of(*case) for case in CASES])
def test_fault(stage: Stage, fault: str, moment: str, http: str) -> None:
    found = stage.found[fault, moment, http] = stage.find(fault, moment, http)
    assert found == TABLE[fault, moment]


def test_nothing_is_left(stage: Stage) -> None:
    with stage.proxy.client() as client:
        health = client.get("/health").json()
    assert (health["running"], health["waiting"]) == (0, 0)
