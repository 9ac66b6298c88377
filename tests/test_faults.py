"""A fault planted in turn into each hook and each part: the request is refused or cut, or passes unmetered when only the
meter failed. Never does a request without a good key reach a server, never does a user's key, never does a client hang,
and none sees the end of an answer whose row is not on disk.

`pytest -s` prints what happened as a table.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from proxy import ROOT, Key, Proxy
from upstream import CLOSE, OK, STALL, Request, Steps, Upstream, stream
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

HANG_S = 8
EVENTS = [
    *(f'data: {{"choices":[{{"index":0,"delta":{{"content":"{word}"}},"finish_reason":null}}]}}\n\n' for word in "abcd"),
    'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],'
    '"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}\n\n',
    "data: [DONE]\n\n",
]
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Case:
    """`plain`, `streamed`: what the client sees. `call`: only this one fails; None: every one."""

    place: str
    plain: str
    streamed: str
    call: int | None = None
    how: str = ""  # what the server or the client does besides: "close" before the first byte, "hang up"

    def __str__(self) -> str:
        return " ".join([self.place, *([f"call {self.call}"] if self.call else []), *([self.how] if self.how else [])])


REFUSED = "500 internal_error"
CASES = [
    # the hooks themselves: what is raised here, no gate catches
    Case("hooks:Gateway.next_layer", REFUSED, REFUSED),
    Case("hooks:Gateway.client_connected", "200", "200"),
    Case("hooks:Gateway.client_disconnected", "200", "200"),
    Case("hooks:Gateway.server_connect", "200", "200"),
    Case("hooks:Gateway.server_disconnected", "200", "200"),
    Case("hooks:Gateway.requestheaders", REFUSED, REFUSED),
    Case("hooks:Gateway.request", REFUSED, REFUSED),
    Case("hooks:Gateway._route", REFUSED, REFUSED),
    Case("hooks:Gateway._dispatch", REFUSED, REFUSED),
    Case("hooks:Gateway.upstream_failed", "502 upstream_unreachable", "502 upstream_unreachable", how="close"),
    Case("hooks:Gateway.responseheaders", "200 unmetered", "200 unmetered"),
    Case("hooks:Gateway._begin_answer", "200 unmetered", "200 unmetered"),
    Case("hooks:Gateway._relay", "200 unmetered", "200 unmetered"),
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
    Case("auth:_key_of", REFUSED, REFUSED),
    Case("auth:_caller", REFUSED, REFUSED),
    Case("auth:Caller.may_use", REFUSED, REFUSED),
    Case("keystore:KeyReader.find", REFUSED, REFUSED),
    Case("keystore:KeyReader._refresh", REFUSED, REFUSED),
    Case("keystore:Key.state", REFUSED, REFUSED),
    Case("keystore:hash_key", REFUSED, REFUSED),
    # what is wanted, and where it goes
    Case("discovery:Discovery.asked_once", REFUSED, REFUSED),
    Case("service:Service.answer_public", REFUSED, REFUSED),
    Case("service:Service.read", REFUSED, REFUSED),
    Case("service:Service.answer", REFUSED, REFUSED),
    Case("service:Service.choose", REFUSED, REFUSED),
    Case("service:Service.is_server", "200", "200"),
    Case("service:Service.count", "cut", "cut"),
    Case("service:Service.pick_again", REFUSED, REFUSED, how="close"),
    Case("wire:read_json", REFUSED, REFUSED),
    Case("wire:with_model", REFUSED, REFUSED),
    Case("routing:Router.resolve", REFUSED, REFUSED),
    Case("routing:Router.pick", REFUSED, REFUSED),
    Case("routing:Router.pick", REFUSED, REFUSED, call=2, how="close"),
    Case("routing:Claim.release", "cut", "cut"),
    Case("endpoints:is_private", REFUSED, REFUSED),
    Case("exchange:Exchange.body_for", REFUSED, REFUSED),
    Case("exchange:Exchange.body_for", REFUSED, REFUSED, call=2, how="close"),
    Case("exchange:Exchange.row", REFUSED, REFUSED, call=1),
    Case("exchange:Exchange.row", "cut", "cut", call=2),
    Case("exchange:Exchange.final_outcome", "cut", "cut"),
    Case("exchange:Exchange.cut_outcome", "hung up", "hung up", how="hang up"),
    Case("headers:to_server", REFUSED, REFUSED),
    Case("headers:to_client", "200 unmetered", "200 unmetered"),
    # layers
    Case("layers:open_exchange", REFUSED, REFUSED),
    Case("layers:set_response", "200", "200"),
    Case("replies:refuse", "200", "200"),
    # the meter: the answer goes on
    Case("hooks:format_of", "200 unmetered", "200 unmetered"),
    Case("relay:StreamMeter.feed", "200", "200 unmetered"),
    Case("relay:StreamMeter.feed", "200", "200 partly", call=2),
    Case("relay:StreamMeter.end", "200", "200"),
    Case("relay:BodyMeter.feed", "200 unmetered", "200"),
    Case("relay:BodyMeter.end", "200 unmetered", "200"),
    Case("sse:EventReader.feed", "200", "200 unmetered"),
    Case("sse:EventReader.end", "200", "200"),
    Case("sse:starts_event", "200 unmetered", "200 unmetered"),
    Case("usage:_read_choices", "200 unmetered", "200 unmetered"),
    Case("tally:Tally.report", "200 unmetered", "200 unmetered"),
    Case("tally:Tally.tokens", "cut", "cut"),
    Case("relay:Relay.feed", "cut", "cut"),
    Case("relay:Relay.feed", "200", "cut", call=3),
    Case("relay:Relay.close", "cut", "cut"),
    Case("relay:Relay.finish", "cut", "cut"),
    Case("relay:Relay.ended", "cut", "cut"),
    Case("relay:Relay.lacks_end_mark", "cut", "cut"),
    # the ledger
    Case("ledger:Ledger.open", REFUSED, REFUSED),
    Case("ledger:Ledger.settle", "cut", "cut"),
    Case("ledger:Ledger._commit", "cut", "cut"),
    Case("ledger:Ledger._settle", "cut", "cut"),
    Case("ledger:Ledger._write", "cut", "cut"),
]


@dataclass
class Bench:
    """One proxy with dormant faults, and its scripted server."""

    proxy: Proxy
    upstream: Upstream
    key: Key
    armed: Path
    ids: Iterator[int] = field(default_factory=count)

    def arm(self, case: Case) -> None:
        plan = {"place": case.place, "call": case.call, "id": next(self.ids)}
        part = self.armed.with_suffix(".part")
        part.write_text(json.dumps(plan))
        part.replace(self.armed)

    def disarm(self) -> None:
        self.armed.unlink(missing_ok=True)

    def ask(self, name: str, key: str | None, streamed: bool, how: str = "") -> "Seen":
        body = json.dumps({"model": "fast", "stream": streamed, "messages": []})
        headers = {"x-request-id": name, "content-type": "application/json", "x-how": how}
        if key:
            headers["authorization"] = f"Bearer {key}"
        with closing(HTTPConnection("127.0.0.1", self.proxy.port, timeout=HANG_S)) as connection:
            seen = Seen()
            try:
                connection.request("POST", CHAT, body, headers)
                if how == "hang up":
                    self.upstream_has(name)
                    return Seen("hung up")
                response = connection.getresponse()
                seen.status = str(response.status)
                while data := response.read1(1 << 16) if streamed else response.read():
                    seen.data += data
                seen.complete = True
                if response.status != 200:
                    seen.status += f" {json.loads(seen.data)['error']['code']}"
            except TimeoutError:
                seen.status = "HANGS"
            except (OSError, HTTPException):
                seen.status = "cut"
            return seen

    def upstream_has(self, name: str) -> None:
        eventually(lambda: any(name in r.values("x-request-id") for r in self.upstream.requests), f"{name} upstream")

    def row(self, name: str) -> dict[str, Any] | None:
        found = self.proxy.query("select * from requests where client_request_id = ?", name)
        assert len(found) <= 1
        return found[0] if found else None


@dataclass
class Seen:
    status: str = ""
    data: bytes = b""
    complete: bool = False

    @property
    def ended(self) -> bool:
        """The client takes this for a whole answer of a server."""
        return self.status == "200" and self.complete or b"[DONE]" in self.data


def answer_of(request: Request, closed: set[str]) -> Steps:
    (name,) = request.values("x-request-id")
    match request.values("x-how"):
        case ["close"] if name not in closed:
            closed.add(name)
            return CLOSE
        case ["hang up"]:
            return STALL
    return stream(*EVENTS) if request.json().get("stream") else OK


def write_entry(folder: Path, places: list[str]) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    entry, armed = folder / "entry.py", folder / "armed.json"
    entry.write_text(ENTRY.format(addon=str(ROOT / "addon"), armed=str(armed), places=places))
    return entry, armed


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("faults")
    closed: set[str] = set()
    with Upstream() as upstream:
        upstream.always(CHAT, lambda request: answer_of(request, closed))
        server = {"name": "a", "url": upstream.url, "models": ["tiny"]}
        proxy = Proxy(folder / "proxy", [server], aliases={"fast": "tiny"}, confdir=confdir)
        proxy.addon, armed = write_entry(folder, sorted({case.place for case in CASES}))
        with proxy:
            yield Bench(proxy, upstream, proxy.create_key("alice"), armed)
        print(proxy.log()[-3000:])


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    print("\n\n| fault in | not streamed | streamed | rows |\n|---|---|---|---|")
    print("\n".join(lines))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fault_refuses_or_cuts(bench: Bench, table: list[str], case: Case) -> None:
    seen: dict[bool, Seen] = {}
    outcomes: list[str] = []
    problems: list[str] = []
    for streamed in (False, True):
        name = f"{case}-{'streamed' if streamed else 'plain'}".replace(" ", "-")
        bench.arm(case)
        for intruder, key in ((f"intruder-{name}", None), (f"intruder2-{name}", "sk-wrong")):
            if case.call is None and bench.ask(intruder, key, streamed).status in ("200", "HANGS"):
                problems.append(f"{intruder} was served or hangs")
            if case.call is not None:
                bench.arm(case)
        answer = seen[streamed] = bench.ask(name, bench.key.key, streamed, case.how)
        row = bench.row(name)
        if answer.ended and (row is None or row["outcome"] == "open"):
            problems.append(f"{name}: the client has the end, the row is {row and row['outcome']}")
        bench.disarm()
        eventually(lambda name=name: is_booked(bench, name), within_s=2) if answer.ended else None  # type: ignore[misc]
        row = bench.row(name)
        outcomes.append(row["outcome"] if row else "no row")
        if answer.status == "200" and row:
            full = {3: 1, 4: 4}
            answer.status += "" if row["completion_tokens"] in (1, 4) and row["tokens_source"] == "usage" else (
                " unmetered" if row["completion_tokens"] is None else " partly"
            )
            del full
    table.append(f"| {case} | {seen[False].status} | {seen[True].status} | {', '.join(outcomes)} |")
    # The fault is gone: the proxy is as before.
    after = bench.ask(f"after-{case}".replace(" ", "-"), bench.key.key, streamed=True)
    if not (after.ended and after.complete):
        problems.append(f"afterwards: {after}")
    for request in bench.upstream.requests:
        if any("intruder" in value for value in request.values("x-request-id")):
            problems.append("an intruder's request reached the server")
        if bench.key.key.encode() in request.head + request.raw_body:
            problems.append("the user's key reached the server")
    assert not problems
    assert (seen[False].status, seen[True].status) == (case.plain, case.streamed)


def is_booked(bench: Bench, name: str) -> bool:
    row = bench.row(name)
    return row is not None and row["outcome"] != "open"
