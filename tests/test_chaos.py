"""Servers are killed, stopped, restarted and answer 503 at random while 24 clients work: nobody notices before their
first event, the books are exact, and nothing is left over.

At least one server is alive, ready and untouched at any time. CHAOS_SECONDS: for how long; `pytest -s` shows counts.
"""

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from conftest import StartLlama, StartProxy
from dialects import CHAT, MESSAGES, NATIVE, error_in, events, has_end_mark
from front import Front
from llama import LlamaServer, Model
from pairs import health
from proxy import Key, Proxy, Row
from rawhttp import Answer, Connection, request
from upstream import reply
from waiting import eventually

SECONDS = float(os.environ.get("CHAOS_SECONDS", "12"))
CLIENTS = 24
SERVERS = ("a", "b", "c")
SEED = 20261121
MAX_ATTEMPTS = 8
FIRST_BYTE_TIMEOUT_S = 4
# A server counts as one to go to only after it has been well for this long: so much may pass until the gateway has seen
# that (a pause of at most 1 s, a probe each 0.25 s).
WELL_AFTER_S = 1.5
CONFIG: dict[str, Any] = {
    "first_byte_timeout_s": FIRST_BYTE_TIMEOUT_S,
    "routing": {"max_attempts": MAX_ATTEMPTS},
    "health": {"interval_s": 0.25, "timeout_s": 0.5, "down_after": 2, "eject_s": 0.25, "max_eject_s": 1},
}
ERROR = {"error": {"message": "out of order", "type": "unavailable_error", "code": 503}}
ANSWERS = {
    "503": reply(ERROR, 503, headers=["Connection: close"]),
    "503, Retry-After": reply(ERROR, 503, headers=["Connection: close", "Retry-After: 1"]),
}


# -- servers and what happens to them ----------------------------------------------------------------------------------


@dataclass
class Victim:
    """A real server behind a front, which counts its requests and is refused while it is dead."""

    name: str
    front: Front
    server: LlamaServer
    is_well_since: float | None = field(default_factory=time.monotonic)  # None: something is being done to it

    def is_refuge(self) -> bool:
        return self.is_well_since is not None and time.monotonic() - self.is_well_since > WELL_AFTER_S


@dataclass
class Chaos:
    """Does things to servers, each in a thread of its own. `outages`: when connections were refused."""

    victims: list[Victim]
    start_llama: StartLlama
    chance: random.Random
    done: Counter[str] = field(default_factory=Counter)
    outages: list[tuple[float, float]] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with ThreadPoolExecutor(len(self.victims)) as pool:
            running = []
            while time.monotonic() < deadline:
                refuges = [victim for victim in self.victims if victim.is_refuge()]
                if len(refuges) > 1:
                    victim = self.chance.choice(refuges)
                    victim.is_well_since = None
                    action = self.chance.choice([self.kill, self.kill, self.stop, self.refuse, self.refuse])
                    running.append(pool.submit(action, victim, self.chance.random()))
                time.sleep(self.chance.uniform(0.05, 0.4))
        for ended in running:
            ended.result()

    def kill(self, victim: Victim, chance: float) -> None:
        self.done["killed"] += 1
        began = time.monotonic()
        victim.front.refuse()
        victim.server.kill()
        time.sleep(chance)
        victim.server = start(self.start_llama)
        victim.front.target = victim.server.port
        victim.front.listen()
        self.outages.append((began, time.monotonic()))
        self._is_well(victim)

    def stop(self, victim: Victim, chance: float) -> None:
        self.done["stopped"] += 1
        os.kill(victim.server.pid, signal.SIGSTOP)
        time.sleep(0.2 + chance * 1.3 * FIRST_BYTE_TIMEOUT_S)
        os.kill(victim.server.pid, signal.SIGCONT)
        self._is_well(victim)

    def refuse(self, victim: Victim, chance: float) -> None:
        kind = "503" if chance < 0.6 else "503, Retry-After"
        self.done[kind] += 1
        victim.front.answer = ANSWERS[kind]
        time.sleep(0.2 + chance)
        victim.front.answer = None
        self._is_well(victim)

    def _is_well(self, victim: Victim) -> None:
        with httpx.Client(base_url=victim.front.url, trust_env=False, timeout=30) as client:
            eventually(lambda: client.get("/health").status_code == 200, f"{victim.name} to be well", 30)
        victim.is_well_since = time.monotonic()


def start(start_llama: StartLlama) -> LlamaServer:
    return start_llama(Model(mean_len=0), "--alias", "endless", "--ctx", "2048")


@contextmanager
def fronts(start_llama: StartLlama) -> Iterator[list[Victim]]:
    with ExitStack() as stack:
        victims = []
        for name in SERVERS:
            server = start(start_llama)
            victims.append(Victim(name, stack.enter_context(Front(server.port)), server))
        yield victims


# -- clients -----------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One request, and what came of it. `problem`: what must not be."""

    id: str
    path: str
    streamed: bool
    sent: float
    ended: float = 0.0
    status: int = 0
    outcome: str = ""  # whole, cut
    problem: str = ""
    answer: bytes = b""


def ask(connection: Connection, key: Key, request_id: str, chance: random.Random) -> Seen:
    path = chance.choice([CHAT, MESSAGES, NATIVE])
    tokens, streamed = chance.choice([4, 30, 200]), chance.random() < 0.6
    words = " ".join(chance.choices(["the", "world", "a", "house"], k=chance.choice([5, 60])))
    body: dict[str, Any] = {"model": "endless", "stream": streamed}
    if path == NATIVE:
        body |= {"prompt": words, "n_predict": tokens}
    else:
        body |= {"messages": [{"role": "user", "content": words}], "max_tokens": tokens}
    seen = Seen(request_id, path, streamed, time.monotonic())
    data = request("POST", path, key, json.dumps(body).encode(), f"X-Request-ID: {request_id}")
    try:
        judge(seen, connection.ask(data))
    except (AssertionError, OSError, ValueError) as error:
        seen.problem = f"no answer: {error!r}"
    seen.ended = time.monotonic()
    return seen


def judge(seen: Seen, answer: Answer) -> None:
    """Whole, or cut after its first event and told so: everything else is a problem."""
    seen.status, seen.answer = answer.status, answer.body
    if answer.status != 200:
        seen.problem = "failed before its first event: not 200"
        return
    if not seen.streamed:
        seen.outcome = "whole" if answer.complete else "cut"
        seen.problem = "" if answer.complete and answer.json() else "failed before its whole body"
        return
    told, ended = error_in(seen.path, answer.body) is not None, has_end_mark(seen.path, answer.body)
    seen.outcome = "whole" if answer.complete and ended and not told else "cut"
    if seen.outcome == "cut":
        if len(events(answer.body)) - told < 1:
            seen.problem = "failed before its first event"
        elif answer.complete or ended or not told:
            seen.problem = f"cut, but {answer.complete=} {ended=} {told=}"


def work(proxy: Proxy, key: Key, number: int, until: threading.Event) -> list[Seen]:
    """One client: request after request over one connection, for as long as that lasts."""
    chance = random.Random(SEED + number)
    found: list[Seen] = []
    connection = Connection(proxy.port, timeout_s=60)
    while not until.is_set():
        found.append(ask(connection, key, f"{number}-{len(found)}", chance))
        if found[-1].outcome != "whole":
            connection.sock.close()
            connection = Connection(proxy.port, timeout_s=60)
    connection.sock.close()
    return found


# -- the check ---------------------------------------------------------------------------------------------------------


def upstream_connections(pid: int, ports: set[int]) -> list[str]:
    """The open or half-open connections of a process to these ports, as in /proc/net/tcp."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(entry.readlink().name.removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:  # closed meanwhile
            continue
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    established_or_half_closed = ("01", "04", "05", "08")
    return [
        " ".join(line)
        for line in lines
        if line[9] in inodes and line[3] in established_or_half_closed and int(line[2].partition(":")[2], 16) in ports
    ]


def problems_of_rows(seen: list[Seen], rows: list[Row], chaos: Chaos) -> list[str]:
    arrived = Counter(post.request_id for victim in chaos.victims for post in victim.front.posts)
    by_id = {row["client_request_id"]: row for row in rows}
    found = []
    for one in seen:
        row = by_id.get(one.id)
        if row is None:
            found.append(f"{one.id} has no row")
            continue
        outcome = {"whole": "ok", "cut": "upstream_cut"}.get(one.outcome, "")
        if one.problem:
            found.append(f"{one.id}: {one.problem}; {one.answer[-300:]!r}; {row}")
        elif (row["outcome"], row["status"]) != (outcome, one.status) or row["server"] not in SERVERS:
            found.append(f"{one.id} was {one.outcome}: {row}")
        elif not max(arrived[one.id], 1) <= row["attempts"] <= MAX_ATTEMPTS:
            found.append(f"{one.id} came to servers {arrived[one.id]} times: {row}")
        elif row["attempts"] != arrived[one.id] and not any(
            began < one.ended and one.sent < ended for began, ended in chaos.outages
        ):
            found.append(f"{one.id} came to servers {arrived[one.id]} times, none refused it: {row}")
    return found


def summary(seen: list[Seen], rows: list[Row], chaos: Chaos) -> str:
    arrived = sum(len(victim.front.posts) for victim in chaos.victims)
    attempts = sum(row["attempts"] for row in rows)
    lines = [f"| {SECONDS:g} s, {CLIENTS} clients, {len(SERVERS)} servers | |", "|---|---|"]
    counts = {
        **{f"servers {name}": count for name, count in sorted(chaos.done.items())},
        "requests": len(seen),
        "of them streamed": sum(one.streamed for one in seen),
        "failed before their first event": sum(bool(one.problem) for one in seen),
        "streams cut after it, and told so": sum(one.outcome == "cut" and not one.problem for one in seen),
        "rows": len(rows),
        "attempts": attempts,
        "came to a server": arrived,
        "refused": attempts - arrived,
        "rows by attempts": ", ".join(
            f"{count} with {number}" for number, count in sorted(Counter(row["attempts"] for row in rows).items())
        ),
        "slowest": f"{max(one.ended - one.sent for one in seen):.1f} s",
    }
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in counts.items())])


def test_chaos(start_proxy: StartProxy, start_llama: StartLlama) -> None:
    with fronts(start_llama) as victims:
        servers = [{"name": victim.name, "url": victim.front.url} for victim in victims]
        proxy = start_proxy(servers, **CONFIG)
        key = proxy.create_key("alice")
        eventually(lambda: health(proxy)["servers"]["up"] == len(SERVERS), "all servers")
        ports = {victim.front.port for victim in victims}
        probing = len(upstream_connections(proxy.pid, ports))
        chaos = Chaos(victims, start_llama, random.Random(SEED))
        over = threading.Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            working = [pool.submit(work, proxy, key, number, over) for number in range(CLIENTS)]
            try:
                chaos.run(SECONDS)
            finally:
                over.set()
            seen = [one for client in working for one in client.result()]
        rows = proxy.wait_rows(len(seen))
        print(f"\n{summary(seen, rows, chaos)}")
        assert len({row["client_request_id"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
        assert not (problems := problems_of_rows(seen, rows, chaos)), "\n".join([str(len(problems)), *problems[:20]])
        nothing_is_left(proxy, chaos, ports, probing)
        assert chaos.done["killed"] and chaos.done["stopped"], "nothing happened: this test has shown nothing"


def nothing_is_left(proxy: Proxy, chaos: Chaos, ports: set[int], probing: int) -> None:
    """No claim, no connection but those of the probes, no busy slot."""
    assert (health(proxy)["running"], health(proxy)["waiting"]) == (0, 0)
    metrics = proxy.client().get("/metrics").text.splitlines()
    assert sorted(line for line in metrics if line.startswith("llmproxy_running{")) == [
        f'llmproxy_running{{server="{name}"}} 0' for name in SERVERS
    ]
    eventually(
        lambda: len(upstream_connections(proxy.pid, ports)) <= probing,
        f"only {probing} upstream connections (now {upstream_connections(proxy.pid, ports)})",
        within_s=15,
    )
    for victim in chaos.victims:
        with httpx.Client(base_url=victim.server.url, trust_env=False) as client:
            eventually(
                lambda client=client: not any(slot["is_processing"] for slot in client.get("/slots").json()),  # type: ignore[misc]
                f"no busy slot on {victim.name}",
            )
