"""A fault planted in turn into each hook and each part: the request is refused or cut, or passes unmetered when only
the meter failed. Never does a request without a good key reach a server, never does a user's key, never does a client
hang, and none sees the end of an answer whose row is not on disk. Afterwards every row is settled, no server counts as
busy or is shunned, and nothing waits.

`pytest -s` prints what happened as a table.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from gateway.ledger import Ledger
from pairs import OVERLOADED, SCRIPTED, SSE
from proxy import ROOT, Key, Proxy, Row, free_port
from upstream import CLOSE, STALL, Pause, Request, Steps, Upstream, chunk, head, reply, stream
from waiting import eventually

# The entry script with a fault in every named place, dormant until a file beside the script names it.
ENTRY = """
import functools, importlib, json, sys
from pathlib import Path

sys.path.insert(0, {addon!r})
calls = 0
armed = None


def due(place):
    global calls, armed
    try:
        text = Path({armed!r}).read_text()
    except OSError:
        return False
    if text != armed:
        armed, calls = text, 0
    plan = json.loads(text)
    if plan["place"] != place:
        return False
    calls += 1
    return plan["call"] in (None, calls)


def plant(place):
    module, _, path = place.partition(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module("gateway." + module))
    real = vars(owner)[name]
    function = real.fget if isinstance(real, property) else real

    @functools.wraps(function)
    def faulty(*args, **kwargs):
        if due(place):
            raise RuntimeError("planted in " + place)
        return function(*args, **kwargs)

    setattr(owner, name, property(faulty) if isinstance(real, property) else faulty)


for place in {places!r}:
    plant(place)

from gateway.hooks import Gateway

addons = [Gateway()]
"""

LONGER_THAN_A_SWEEP_S = 1.5
HANG_S = 5  # a client that waits for longer on a scripted server hangs
EVENTS = [
    *(
        f'data: {{"choices":[{{"index":0,"delta":{{"content":"{word}"}},"finish_reason":null}}]}}\n\n'
        for word in "abcd"
    ),
    'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],'
    '"usage":{"prompt_tokens":3,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":0}}}\n\n',
    "data: [DONE]\n\n",
]
CHAT = "/v1/chat/completions"
USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}}
OK = reply({"choices": [{"index": 0, "message": {"content": "a"}}], "usage": USAGE})
# Long enough for it to matter which server has it in its cache.
PROMPT = [{"role": "user", "content": "the world " * 500}]
PLENTY = 1_000_000_000
# One failure ejects a server, for a moment.
HASTY: dict[str, Any] = {
    "routing": {"backoff_s": 0.01},
    "health": {"eject_after": 1, "eject_s": 0.05, "max_eject_s": 0.05},
    # Every kind of limit, none of which is reached.
    "limits": {
        "key": dict.fromkeys(("rpm", "rps", "burst", "tpm", "concurrency"), PLENTY)
        | {"budgets": [{"per": "day", "tokens": PLENTY}, {"per": "month", "money": PLENTY / 1e6}]}
    },
    "prices": {"models": {"*": {"prompt": 0.1, "completion": 1}}},
}


@dataclass(frozen=True)
class Case:
    """`plain`, `streamed`: what the client sees. `call`: only this one fails; None: every one.

    `how`: what the server or the client does besides (HOWS). `is_lost`: no row can be written; the log says so.
    """

    place: str
    plain: str
    streamed: str
    call: int | None = None
    how: str = ""
    is_lost: bool = False

    def __str__(self) -> str:
        return " ".join([self.place, *([f"call {self.call}"] if self.call else []), *([self.how] if self.how else [])])


# "hang up": the client does, before the answer. "wait": the only server of the model is busy when it comes. The others
# are what the first server does, before another one answers well; that one has no part in "break" and "slow".
HOWS = ("close", "503", "comment", "break", "slow", "hang up", "wait")
REFUSED = "500 internal_error"
UNDECIDED = "503 limits_unavailable"
CASES = [
    # the hooks themselves: what is raised here, no gate catches
    Case("hooks:Gateway.next_layer", REFUSED, REFUSED),
    Case("hooks:Gateway.client_connected", "200", "200"),
    Case("hooks:Gateway.client_disconnected", "200", "200"),
    Case("hooks:Gateway.server_connect", "200", "200"),
    Case("hooks:Gateway.server_disconnected", "200", "200", how="close"),
    Case("hooks:Gateway.requestheaders", REFUSED, REFUSED),
    Case("hooks:Gateway.request", REFUSED, REFUSED),
    Case("hooks:Gateway._dispatch", REFUSED, REFUSED),
    Case("hooks:Gateway._dispatch", REFUSED, REFUSED, call=2, how="close"),
    Case("hooks:Gateway.upstream_failed", "502 upstream_unreachable", "502 upstream_unreachable", how="close"),
    Case("hooks:Gateway.responseheaders", "200 unmetered", "200 unmetered"),
    Case("hooks:Gateway._begin_answer", "200 unmetered", "200 unmetered"),
    Case("hooks:relay_for", "200 unmetered", "200 unmetered"),
    Case("hooks:Gateway._label", "200 unmetered", "200 unmetered"),
    Case("hooks:Gateway.answer_continues", "200", "200", how="comment"),
    Case("hooks:relay_for", "200", "200", call=2, how="comment"),
    Case("hooks:Gateway.answer_ends", "cut", "cut"),
    Case("hooks:Gateway.response", "200", "200"),
    Case("hooks:Gateway.error", "hung up", "hung up", how="hang up"),
    Case("hooks:Gateway._settle", "cut", "cut"),
    Case("hooks:Gateway._settle", "cut", "cut", call=1),
    Case("hooks:Gateway._ready_service", REFUSED, REFUSED),
    Case("hooks:Gateway._ready_service", REFUSED, REFUSED, call=1),
    Case("hooks:uuid7", REFUSED, REFUSED),
    # connections
    Case("connections:Connections.connected", "200", "200"),
    Case("connections:Connections.disconnected", "200", "200"),
    Case("connections:Connections.request_begins", REFUSED, REFUSED),
    Case("connections:Connections.request_ends", REFUSED, REFUSED),
    Case("connections:Connections.flow_ends", "200", "200"),
    # authentication
    Case("auth:Authenticator.authenticate", REFUSED, REFUSED),
    Case("auth:Authenticator._check", REFUSED, REFUSED),
    Case("networks:client_address", REFUSED, REFUSED),
    Case("sources.chain:Chain.find", REFUSED, REFUSED),
    Case("sources.local:LocalKeys.find", REFUSED, REFUSED),
    Case("auth:_key_of", REFUSED, REFUSED),
    Case("auth:_caller", REFUSED, REFUSED),
    Case("auth:Caller.may_use", REFUSED, REFUSED),
    Case("keyreader:KeyReader.find", REFUSED, REFUSED),
    Case("keyreader:KeyReader._refresh", REFUSED, REFUSED),
    Case("keys:Key.state", REFUSED, REFUSED),
    Case("keyreader:hash_key", REFUSED, REFUSED),
    # what is wanted, and where it goes
    Case("discovery:Prober.asked_once", REFUSED, REFUSED),
    Case("service:Service.answer_public", REFUSED, REFUSED),
    Case("service:Service.read", REFUSED, REFUSED),
    Case("service:Service.answer", REFUSED, REFUSED),
    Case("service:Service.allow", REFUSED, REFUSED),
    Case("service:Service.is_server", "200", "200"),
    Case("vitals:Vitals.count", "200", "200"),
    Case("service:Service._server_changed", REFUSED, REFUSED, how="close"),
    Case("wire:read_json", REFUSED, REFUSED),
    Case("wire:with_model", REFUSED, REFUSED),
    Case("routing:Router.resolve", REFUSED, REFUSED),
    # finding a server, and another one
    Case("attempts:Attempts.begin", REFUSED, REFUSED),
    Case("attempts:read_prompt", REFUSED, REFUSED),
    Case("attempts:Attempts.find", REFUSED, REFUSED),
    Case("attempts:Attempts.find", REFUSED, REFUSED, call=2, how="close"),
    Case("attempts:Attempts.find_again", REFUSED, REFUSED, how="close"),
    Case("attempts:Attempts.find_again", REFUSED, REFUSED, how="503"),
    Case("attempts:Attempts.find_again", REFUSED, "cut", how="comment"),
    Case("attempts:Attempts._back_off", REFUSED, REFUSED, how="close"),
    Case("attempts:Attempts.began", "200 unmetered", "200 unmetered"),
    Case("attempts:Attempts.learn", "200", "200"),
    Case("attempts:Attempts.broke_off", "cut", "cut", how="break"),
    Case("attempts:Attempts.is_overdue", "200", "200", how="slow"),
    Case("balancer:Balancer.take", REFUSED, REFUSED),
    Case("balancer:Balancer.take", REFUSED, REFUSED, call=2, how="close"),
    Case("balancer:Balancer._claim", REFUSED, REFUSED),
    Case("balancer:Balancer._claim", REFUSED, REFUSED, how="wait"),
    Case("balancer:Balancer._candidates", REFUSED, REFUSED),
    Case("balancer:Balancer._candidates", REFUSED, REFUSED, call=2, how="close"),
    Case("balancer:Balancer._strategy", REFUSED, REFUSED),
    Case("balancer:Balancer.pause", REFUSED, REFUSED, how="close"),
    Case("balancer:Balancer.wait", REFUSED, REFUSED, how="wait"),
    Case("balancer:Balancer.changed", REFUSED, REFUSED, how="wait"),
    Case("balancer:Balancer.changed", "200", "200"),
    Case("balancer:Balancer._serve", REFUSED, REFUSED, how="wait"),
    Case("balancer:Balancer._leave_queue", "200", "200", call=1, how="wait"),
    Case("balancer:Balancer._prefer", REFUSED, REFUSED, call=1, how="wait"),
    Case("balancer:Balancer._released", "200", "200"),
    Case("balancer:Balancer.answered", "200", "200"),
    Case("fair_queue:FairQueue.begins", REFUSED, REFUSED),
    Case("fair_queue:FairQueue.ends", "200", "200"),
    Case("fair_queue:FairQueue.add", REFUSED, REFUSED, how="wait"),
    Case("fair_queue:FairQueue.remove", "200", "200", call=1, how="wait"),
    Case("fair_queue:FairQueue.in_turn", REFUSED, REFUSED, how="wait"),
    Case("fair_queue:FairQueue._key", REFUSED, REFUSED),
    Case("strategies:Prefix.choose", REFUSED, REFUSED),
    Case("strategies:Prefix._wait_s", REFUSED, REFUSED),
    Case("strategies:Prefix.sent", REFUSED, REFUSED),
    Case("strategies:Prefix.sent", REFUSED, REFUSED, call=2, how="close"),
    Case("strategies:Prefix.answered", "200", "200"),
    Case("prefix:PrefixIndex.find", REFUSED, REFUSED),
    Case("prefix:PrefixIndex.remember", REFUSED, REFUSED),
    Case("prefix:PrefixIndex.correct", "200", "200"),
    Case("servers:Claim.__init__", REFUSED, REFUSED),
    Case("servers:Claim.release", "200", "200", call=1),
    Case("servers:Claim.release", REFUSED, REFUSED, call=1, how="close"),
    Case("health:Health.may_take", REFUSED, REFUSED),
    Case("health:Health.begin_trial", REFUSED, REFUSED),
    Case("health:Health.succeeded", "200 unmetered", "200 unmetered"),
    Case("health:Health.failed", REFUSED, REFUSED, how="close"),
    Case("health:Health._tell", REFUSED, REFUSED, how="close"),
    Case("failover:tell", REFUSED, REFUSED, how="close"),
    Case("failover:answered", "cut", "cut", how="503"),
    Case("failover:pause_s", REFUSED, REFUSED, how="503"),
    Case("endpoints:is_private", REFUSED, REFUSED),
    Case("exchange:Exchange.body_for", REFUSED, REFUSED),
    Case("exchange:Exchange.body_for", REFUSED, REFUSED, call=2, how="close"),
    Case("exchange:Exchange.row", REFUSED, REFUSED, call=1),
    Case("exchange:Exchange.row", "200 unmetered", "200 unmetered", call=2),
    Case("exchange:Exchange.final_outcome", "cut", "cut"),
    Case("exchange:Exchange.cut_outcome", "hung up", "hung up", how="hang up"),
    Case("headers:to_server", REFUSED, REFUSED),
    Case("headers:to_client", "200 unmetered", "200 unmetered"),
    # layers
    Case("stream:open_exchange", REFUSED, REFUSED),
    Case("stream:set_response", "200", "200"),
    Case("stream:GatewayStream._has_begun", "cut", "cut", how="close"),
    Case("stream:GatewayStream._ask_after", "cut", "cut", how="close"),
    Case("stream:GatewayStream._wants_another_try", "cut", "cut", how="close"),
    Case("stream:GatewayStream._leave_server", "cut", "cut", how="close"),
    Case("stream:GatewayStream._send_again", "cut", "cut", how="close"),
    Case("held:HeldAnswer.add", "cut", "cut"),
    Case("stream:GatewayStream._pass_on", "cut", "cut"),
    Case("stream:GatewayStream._continue", "200", "cut", how="comment"),
    Case("stream:GatewayStream._break_off", "cut", "cut", how="break"),
    Case("stream:stream_error", "cut", "cut", how="break"),
    Case("stream:GatewayStream._settle", "cut", "cut"),
    Case("exchange:Exchange.begin_attempt", REFUSED, REFUSED),
    Case("exchange:Exchange.head_came", "cut", "cut"),
    Case("exchange:Exchange.can_continue_with", "200", "cut", how="comment"),
    Case("stream:refuse", "200", "200"),
    # the meter: the answer goes on
    Case("answers:format_of", "200 unmetered", "200 unmetered"),
    Case("relay:StreamMeter.feed", "200", "200 unmetered"),
    Case("relay:StreamMeter.feed", "200", "200 counted", call=2),
    Case("relay:StreamMeter.end", "200", "200"),
    Case("relay:BodyMeter.feed", "200 unmetered", "200"),
    Case("relay:BodyMeter.end", "200 unmetered", "200"),
    Case("sse:EventReader.feed", "200", "200 unmetered"),
    Case("sse:EventReader.end", "200", "200"),
    Case("usage:_read_choices", "200 unmetered", "200 unmetered"),
    Case("tally:Tally.report", "200 unmetered", "200 counted"),
    Case("tally:Tally.tokens", "200 unmetered", "200 unmetered"),
    Case("relay:Relay.feed", "cut", "cut"),
    Case("relay:Relay.feed", "200", "cut", call=3),
    Case("relay:Relay.close", "cut", "cut"),
    Case("relay:Relay.finish", "cut", "cut"),
    Case("relay:Relay.ended", "cut", "cut"),
    Case("relay:Relay.lacks_end_mark", "cut", "cut"),
    # limits, and the end
    Case("limiter:Limiter.rules_of", REFUSED, REFUSED),
    Case("limiter:Limiter.admit", REFUSED, REFUSED),
    Case("limiter:Limiter._ask", REFUSED, REFUSED),
    Case("limiter:Limiter.admit_fallback", REFUSED, REFUSED),
    Case("limiter:Limiter.admit_fallback", REFUSED, REFUSED, call=2, how="close"),
    Case("bounds:estimate", REFUSED, REFUSED),
    Case("limiter:headers_of", REFUSED, REFUSED),
    Case("ledger:Ledger.admit", REFUSED, REFUSED),
    Case("accounts:SqliteAccounts.admit", UNDECIDED, UNDECIDED),
    Case("accounts:SqliteAccounts._take", UNDECIDED, UNDECIDED),
    Case("settling:Settler.settle", "cut", "cut"),
    Case("settling:Settler.settle", "cut", "cut", call=1),
    Case("settling:Settler._free_server", "cut", "cut"),
    Case("settling:Settler._free_server", "cut", "cut", call=1),
    Case("limiter:Limiter.add_cost", "200", "200"),
    Case("limiter:Limiter.settlements", "200", "200"),
    Case("limiter:cost_micros", REFUSED, REFUSED),
    Case("limiter:cost_micros", "200", "200", call=2),
    Case("charges:charged", "200", "200"),
    Case("charges:told", "200", "200"),
    Case("accounts:SqliteAccounts.settle", "200", "200"),
    Case("accounts:SqliteAccounts._book", "200", "200"),
    # the ledger
    Case("ledger:Ledger.open", REFUSED, REFUSED),
    Case("ledger:Ledger.settle", "cut", "cut"),
    Case("ledger:Ledger.settle", "cut", "cut", call=1),
    Case("ledger:Ledger._commit", UNDECIDED, UNDECIDED),
    Case("bookkeeper:Bookkeeper.settle", "cut", "cut", is_lost=True),
    Case("bookkeeper:Bookkeeper.transaction", UNDECIDED, UNDECIDED),
    Case("ledger:Ledger._write", UNDECIDED, UNDECIDED, call=1),
    Case("ledger:Ledger._write", "200", "200", call=2),
    Case("ledger:Ledger.note", REFUSED, REFUSED, how="close"),
]


@dataclass
class Seen:
    status: str = ""
    data: bytes = b""
    complete: bool = False

    @property
    def ended(self) -> bool:
        """The client takes this for a whole answer of a server."""
        return (self.status == "200" and self.complete) or b"[DONE]" in self.data


@dataclass
class Bench:
    """One proxy with dormant faults, and its scripted servers."""

    proxy: Proxy
    upstreams: list[Upstream]
    narrow: Upstream
    key: Key
    armed: Path
    ids: Iterator[int] = field(default_factory=count)

    def arm(self, case: Case) -> None:
        """From here on `case` fails; its calls are counted anew."""
        part = self.armed.with_suffix(".part")
        part.write_text(json.dumps({"place": case.place, "call": case.call, "id": next(self.ids)}))
        part.replace(self.armed)

    def faults(self, case: Case) -> int:
        """How often it has failed so far, as the log says."""
        return self.proxy.log().count(f"planted in {case.place}")

    def wait_for_fault(self, case: Case, before: int) -> None:
        eventually(lambda: self.faults(case) > before, "the fault")

    def disarm(self) -> None:
        self.armed.unlink(missing_ok=True)

    @property
    def requests(self) -> list[Request]:
        return [request for upstream in self.upstreams for request in upstream.requests]

    def ask(self, name: str, key: str | None, streamed: bool, how: str = "", prompt: object = PROMPT) -> Seen:
        seen = Seen()
        body = json.dumps(
            {"model": "narrow" if how in ("wait", "stall") else "fast", "stream": streamed, "messages": prompt}
        )
        headers = {"x-request-id": name, "content-type": "application/json", "x-how": how}
        if key:
            headers["authorization"] = f"Bearer {key}"
        with closing(HTTPConnection("127.0.0.1", self.proxy.port, timeout=HANG_S)) as connection:
            try:
                connection.request("POST", CHAT, body, headers)
                if how == "hang up":
                    eventually(lambda: self.reached(name), f"{name} at a server")
                    return Seen("hung up")
                response = connection.getresponse()
                seen.status = str(response.status)
                while data := response.read1(1 << 16):
                    seen.data += data
                seen.complete = response.isclosed() and not response.length
                if not seen.complete:
                    seen.status = "cut"
                elif response.status != 200:
                    seen.status += f" {json.loads(seen.data)['error']['code']}"
            except TimeoutError:
                seen.status = "HANGS"
            except (OSError, HTTPException):
                seen.status = "cut"
        return seen

    def reached(self, name: str) -> bool:
        return any(name in request.values("x-request-id") for request in self.requests)

    def row(self, name: str) -> Row:
        found = self.proxy.query("select * from requests where client_request_id = ?", name)
        assert len(found) <= 1, f"{len(found)} rows of {name}"
        return found[0] if found else {"outcome": "no row"}

    def is_booked(self, name: str) -> bool:
        return self.row(name)["outcome"] not in ("no row", "open")

    @contextmanager
    def occupied(self, name: str) -> Iterator[None]:
        """The server with one slot is busy until the request is waiting, or has got its answer."""
        with ThreadPoolExecutor() as pool:
            filler = pool.submit(self.ask, f"filler-{name}", self.key.key, True, "stall")
            eventually(lambda: self.reached(f"filler-{name}"), "the request that takes the slot")
            pool.submit(self.release, name)
            yield
            assert filler.result().status in ("200", "cut")

    def release(self, name: str) -> None:
        with suppress(AssertionError):
            eventually(lambda: self.health()["waiting"] or self.row(name)["outcome"] != "no row", "the one that waits")
        self.narrow.release()

    def health(self) -> Any:
        with self.proxy.client() as client:
            return client.get("/health").json()

    def calm(self, name: str) -> None:
        """Nothing runs, nothing waits, and every server gets requests again: those that were ejected have a trial."""

        def looks() -> bool:
            if set(self.health()["servers"]["states"].values()) != {"up"}:
                number = next(self.ids)
                other = [{"role": "user", "content": f"{number} " * 500}]  # it has a home of its own
                trial = self.ask(f"trial-{number}-{name}", self.key.key, streamed=False, prompt=other)
                assert trial.status == "200"
            health = self.health()
            states = set(health["servers"]["states"].values())
            return (health["running"], health["waiting"], states) == (0, 0, {"up"})

        try:
            eventually(looks, f"calm after {name}", within_s=5)
        except AssertionError as error:
            raise AssertionError(f"{error} {self.health()}") from None

    def check_servers(self, key: Key) -> list[str]:
        problems = []
        for request in self.requests:
            if any("intruder" in value for value in request.values("x-request-id")):
                problems.append("a request without a good key reached a server")
            if key.key.encode() in request.head + request.raw_body:
                problems.append("a user's key reached a server")
        return problems


def answers(failed: set[str]) -> Callable[[Request], Steps]:
    """`failed`: the names of requests whose first attempt has failed."""

    def answer(request: Request) -> Steps:
        (name,), hows = request.values("x-request-id"), request.values("x-how")
        streamed = bool(request.json().get("stream"))
        if hows == ["hang up"]:
            return STALL
        if hows == ["stall"]:
            return [STALL, *stream(*EVENTS)]
        if hows == ["slow"]:
            return [Pause(LONGER_THAN_A_SWEEP_S), *stream(*EVENTS)] if streamed else [Pause(LONGER_THAN_A_SWEEP_S), OK]
        if hows and hows[0] in FAILS and name not in failed:
            failed.add(name)
            return FAILS[hows[0]][streamed]
        return stream(*EVENTS) if streamed else OK

    return answer


# What the first attempt gets, of a whole answer and of a stream.
FAILS: dict[str, tuple[Steps, Steps]] = {
    "close": (CLOSE, CLOSE),
    "503": (OVERLOADED, OVERLOADED),
    "comment": (CLOSE, (SSE, chunk(":\n\n"), CLOSE)),
    "break": ((head(200, "Content-Length: 10"), b"12345", CLOSE), (SSE, chunk(EVENTS[0]), CLOSE)),
}


def write_entry(folder: Path, places: Sequence[str]) -> tuple[Path, Path]:
    """The entry script, and the file that arms it."""
    folder.mkdir(parents=True, exist_ok=True)
    entry, armed = folder / "entry.py", folder / "armed.json"
    entry.write_text(ENTRY.format(addon=str(ROOT / "addon"), armed=str(armed), places=sorted(set(places))))
    return entry, armed


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("faults")
    failed: set[str] = set()
    with Upstream() as first, Upstream() as second, Upstream() as narrow:
        for upstream in (first, second, narrow):
            upstream.always(CHAT, answers(failed))
        servers: list[dict[str, Any]] = [
            {"name": "a", "url": first.url, "models": ["tiny"], **SCRIPTED},
            {"name": "b", "url": second.url, "models": ["tiny"], **SCRIPTED},
            {"name": "c", "url": narrow.url, "models": ["narrow"], **SCRIPTED, "slots": 1},
        ]
        proxy = Proxy(folder / "proxy", servers, aliases={"fast": "tiny"}, confdir=confdir, **HASTY)
        proxy.addon, armed = write_entry(folder, [case.place for case in CASES])
        proxy.start()
        try:
            yield Bench(proxy, [first, second, narrow], narrow, proxy.create_key("alice"), armed)
        finally:
            proxy.kill()
            print(proxy.log()[-3000:])


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    print("\n\n| fault in | not streamed | streamed | rows | left behind |\n|---|---|---|---|---|")
    print("\n".join(lines))


def name_of(case: Case, streamed: bool) -> str:
    return f"{case}-{'streamed' if streamed else 'plain'}".replace(" ", "-")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fault_refuses_or_cuts(bench: Bench, table: list[str], case: Case) -> None:
    seen: list[str] = []
    outcomes: list[str] = []
    problems: list[str] = []
    faults = bench.faults(case)
    for streamed in (False, True):
        name = name_of(case, streamed)
        for intruder, key in ((f"intruder-{name}", None), (f"intruder2-{name}", "sk-wrong")):
            bench.arm(case)
            if (status := bench.ask(intruder, key, streamed).status) in ("200", "HANGS"):
                problems.append(f"{intruder}: {status}")
        bench.disarm()
        with bench.occupied(name) if case.how == "wait" else nullcontext():
            bench.arm(case)
            answer = bench.ask(name, bench.key.key, streamed, case.how)
            if case.how == "hang up":
                bench.wait_for_fault(case, faults)
        if answer.ended and not bench.is_booked(name):
            problems.append(f"{name}: the client has the end, the row is: {bench.row(name)['outcome']}")
        bench.disarm()
        problems += left_behind(bench, case, name)
        row = bench.row(name)
        outcomes.append(row["outcome"])
        seen.append(answer.status + (metered(row) if answer.status == "200" else ""))
    table.append(f"| {case} | {' | '.join(seen)} | {', '.join(outcomes)} | {'; '.join(problems) or 'nothing'} |")
    bench.wait_for_fault(case, faults)
    assert not problems + bench.check_servers(bench.key)
    assert seen == [case.plain, case.streamed]


def left_behind(bench: Bench, case: Case, name: str) -> list[str]:
    """What a fault leaves: nothing, and the next request is served as ever. Else the next case starts anew."""
    try:
        if case.is_lost:
            assert "LOST" in bench.proxy.log()
        else:
            eventually(lambda: bench.row(name)["outcome"] != "open", f"the row of {name}", within_s=5)
            assert bench.row(name)["outcome"] != "no row" or not bench.reached(name)
        after = bench.ask(f"after-{name}", bench.key.key, streamed=True)
        assert (after.status, after.ended, bench.is_booked(f"after-{name}")) == ("200", True, True)
        bench.calm(name)
    except AssertionError as error:
        bench.proxy.kill()
        bench.proxy.start()
        return [str(error)]
    return []


def metered(row: Row) -> str:
    return {"usage": "", "counted": " counted"}.get(row.get("tokens_source") or "", " unmetered")


ENDS = [
    "(none)",
    "hooks:Gateway.next_layer",
    "hooks:Gateway.responseheaders",
    "hooks:Gateway._begin_answer",
    "hooks:Gateway.response",
    "headers:to_client",
    "answers:format_of",
    "relay:StreamMeter.feed",
    "relay:BodyMeter.feed",
    "vitals:Vitals.count",
]


@pytest.mark.parametrize("place", ENDS)
def test_no_end_before_the_row(bench: Bench, place: str) -> None:
    """While rows can't be written, no client gets its answer's end, whatever else is broken."""
    bench.arm(case := Case(place, "", ""))
    names = [f"locked-{name_of(case, streamed)}" for streamed in (False, True)]
    with ThreadPoolExecutor() as pool, closing(sqlite3.connect(bench.proxy.usage_db, isolation_level=None)) as lock:
        lock.execute("begin immediate")
        asking = [pool.submit(bench.ask, name, bench.key.key, "streamed" in name) for name in names]
        eventually(lambda: not bench.proxy.healthy(), "the ledger's trouble")
        ended = [name for name, asked in zip(names, asking, strict=True) if asked.done()]
        early = [name for name in ended if asking[names.index(name)].result().status == "200"]
        lock.execute("rollback")
        statuses = [asked.result().status for asked in asking]
    bench.disarm()
    eventually(bench.proxy.healthy, "the ledger's recovery")
    assert not early
    assert "HANGS" not in statuses


# Places that are come by only when the proxy starts.
STARTS = [
    "hooks:Gateway.__init__",
    "hooks:Gateway.load",
    "hooks:Gateway.configure",
    "hooks:Gateway.running",
    "startup:_listen",
    "config:load",
    "worker_lock:WorkerLock.__init__",
    "discovery:Prober.start",
    "balancer:Balancer.__init__",
    "upstream_tls:check",
    "connections:Connections.start",
]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, confdir: Path, bench: Bench) -> Iterator[dict[str, Proxy]]:
    """All at once, since each takes a second."""
    folder = tmp_path_factory.mktemp("starts")
    proxies: dict[str, Proxy] = {}
    for number, place in enumerate(STARTS):
        # What mitmproxy listens on before the addon is loaded, and where it would be an open proxy.
        default = free_port()
        arguments = ["--set", "listen_host=127.0.0.1", "--set", f"listen_port={default}"]
        proxy = Proxy(folder / str(number), list(bench.proxy.config["servers"]), confdir=confdir, arguments=arguments)
        proxy.create_key("alice")
        proxy.addon, armed = write_entry(proxy.folder, [place])
        armed.write_text(json.dumps({"place": place, "call": None, "id": 0}))
        proxy.config["default"] = default
        proxies[place] = proxy
        proxy.launch()
    yield proxies
    for proxy in proxies.values():
        if proxy.running:
            proxy.kill()


@pytest.mark.parametrize("place", STARTS)
def test_a_fault_at_the_start(starts: dict[str, Proxy], bench: Bench, table: list[str], place: str) -> None:
    proxy = starts[place]
    server = bench.upstreams[0].url
    seen = {"ours": "closed", "mitmproxy's": "closed"}
    eventually(lambda: "planted in" in proxy.log() or not proxy.running, "the fault", 30)

    def probes() -> bool:
        for name, port, target in (
            ("ours", proxy.port, CHAT),
            ("mitmproxy's", proxy.config["default"], server + CHAT),
        ):
            status = probe(port, target, f"intruder-start-{place}")
            seen[name] = status or seen[name]
        return not proxy.running or seen["ours"] != "closed"

    eventually(probes, "the end, or a refusal", 15)
    table.append(f"| start: {place} | {'runs' if proxy.running else 'has ended'} | {seen} | | |")
    assert "200" not in seen.values()
    assert not bench.check_servers(bench.key)


def probe(port: int, target: str, name: str) -> str:
    """The status that a request without a key gets; empty: none, since nobody listens or the connection is cut."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=HANG_S)) as connection:
        try:
            connection.request("POST", target, b"{}", {"x-request-id": name})
            return str(connection.getresponse().status)
        except TimeoutError:
            return "HANGS"
        except (OSError, HTTPException):
            return ""


def test_a_fault_at_the_end(bench: Bench, tmp_path: Path, confdir: Path) -> None:
    """`done` fails: streams are cut without a drain, and the proxy ends. What was not booked any more, the next start
    marks.
    """
    proxy = Proxy(tmp_path, list(bench.proxy.config["servers"]), confdir=confdir)
    proxy.addon, armed = write_entry(tmp_path, ["hooks:Gateway.done"])
    armed.write_text(json.dumps({"place": "hooks:Gateway.done", "call": None, "id": 0}))
    proxy.start()
    key = proxy.create_key("alice")
    with closing(HTTPConnection("127.0.0.1", proxy.port, timeout=HANG_S)) as connection:
        headers = {**key.headers, "x-request-id": "at-the-end", "x-how": "hang up"}
        connection.request("POST", CHAT, json.dumps({"model": "tiny"}), headers)
        eventually(lambda: bench.reached("at-the-end"), "the request at a server")
        assert proxy.stop() == 0
        with pytest.raises((OSError, HTTPException)):
            connection.getresponse()
    assert "planted in hooks:Gateway.done" in proxy.log()
    assert [row["outcome"] for row in proxy.rows()] in (["interrupted"], ["client_closed"], ["open"])
    Ledger(proxy.usage_db).close()
    assert [row["outcome"] for row in proxy.rows()] in (["interrupted"], ["client_closed"])
