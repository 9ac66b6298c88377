"""scripts/bench conversations: what a strategy makes of the servers' prompt caches.

Three real llama-servers, conversations like a coding agent's, one arrangement after the other: each with fresh servers,
fresh gateways and the same texts.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmark import accounting, report, work
from benchmark.chat import Endpoint
from benchmark.gateways import Place, start_proxy
from benchmark.players import AtRandom, InTurn, LeastBusy, Outcome, Picker, Pinned, Play
from benchmark.processes import Processes
from benchmark.talk import ANSWER_TOKENS, MODEL, WORKLOADS, conversations
from benchmark.talk_report import ONE, ORACLE, ROUND_ROBIN, notes, table
from llama import LlamaServer, Model, ServerFailedError, start_server
from supervisor import StartFailedError

_SERVERS = 3
_SLOTS = 2
# 6 MB: reading a prompt of 2,000 tokens takes half a second, so that a prompt cache shows.
_MODEL = Model("bench-agent", layers=4, embd=256)
_CONTEXT_PER_SLOT = 8192  # tokens; the longest conversation has 3,600
_RESTARTED = 1  # which server is killed
_STARTS = 20  # tries to take the port again

# Without a gateway. `one server`: what a cache can give at all. `oracle`: who knows the conversation of each request.
_DIRECT: dict[str, Callable[[Sequence[Endpoint]], Picker]] = {
    ONE: lambda endpoints: Pinned(endpoints[:1]),
    ORACLE: Pinned,
    "direct least-busy": LeastBusy,
    f"direct {ROUND_ROBIN}": InTurn,
}
_KEY = "agents"
_AS_CONFIGURED = "default"  # a gateway with no word about strategies in its config
_STRATEGIES = ("prefix", "least-busy", ROUND_ROBIN, "latency")
_USUAL = (ONE, ORACLE, "prefix", "least-busy", ROUND_ROBIN)


@dataclass(frozen=True)
class Plan:
    workload: str
    arrangements: Sequence[str]
    conversations: int
    turns: int
    rounds: int
    seed: int
    gateways: int
    restart: bool
    mixed: bool
    config: dict[str, Any]  # of the gateways, beside their servers and strategy
    json_path: Path | None


def main(arguments: Sequence[str]) -> None:
    plan = parse(arguments)
    machine = report.machine()
    began = accounting.moment()
    outcomes: dict[str, list[Outcome]] = {name: [] for name in plan.arrangements}
    failure = ""
    try:
        for number in range(plan.rounds):
            for name in plan.arrangements:
                print(f"round {number + 1} of {plan.rounds}: {name}", file=sys.stderr, flush=True)
                outcomes[name].append(run(plan, name, plan.seed + number))
    except (StartFailedError, ServerFailedError) as error:
        failure = f"bench: {error}"
    except KeyboardInterrupt:
        failure = "bench: interrupted"
    done = {name: some for name, some in outcomes.items() if some}
    print(f"{machine}\n\n{table(done, restarted=plan.restart)}\n")
    print(f"{describe(plan)}\n{notes(done)}\n{accounting.took(began)}")
    if plan.json_path is not None:
        plan.json_path.write_text(work.pretty({"machine": machine, "outcomes": done}))
    sys.exit(failure or 0)


def run(plan: Plan, name: str, seed: int) -> Outcome:
    began = accounting.moment()
    workload = WORKLOADS[plan.workload]
    talks = conversations(workload, plan.conversations, plan.turns, seed)
    with Processes() as processes, servers(processes.folder, 1 if name == ONE else _SERVERS) as group:
        picker = arrange(plan, name, processes, group)
        play = Play(talks, picker, mixed=plan.mixed, incident=group.restart_one if plan.restart else None)
        outcome = uvloop.run(play.run(workload.in_flight))
    outcome.servers = len(group.endpoints)
    outcome.others_share = began.others_share(accounting.moment())
    return outcome


def arrange(plan: Plan, name: str, processes: Processes, group: "Group") -> Picker:
    if name in _DIRECT:
        return _DIRECT[name](group.endpoints)
    config = dict(plan.config)
    if name != _AS_CONFIGURED:
        config["routing"] = {**config.get("routing", {}), "strategy": name}
    listed = [{"name": one.name, "url": f"http://{one.host}:{one.port}"} for one in group.endpoints]
    place = Place(processes, upstream_port=0)
    names = [f"gateway-{number + 1}" for number in range(plan.gateways)]
    gateways = [start_proxy(place, name, listed, config, [_KEY])[_KEY] for name in names]
    return AtRandom([Endpoint(one.name, one.port, key=one.key) for one in gateways], plan.seed)


class Group:
    """The llama-servers of one run."""

    def __init__(self, start: Callable[[int], LlamaServer], count: int) -> None:
        self._start = start
        self.servers = [start(0) for _ in range(count)]
        self.endpoints = [Endpoint(f"server-{at + 1}", server.port) for at, server in enumerate(self.servers)]

    async def restart_one(self) -> None:
        await asyncio.to_thread(self._restart, _RESTARTED % len(self.servers))

    def _restart(self, at: int) -> None:
        """SIGKILL, and a new one on the same port: another process may hold it for a moment."""
        self.servers[at].kill()
        for left in reversed(range(_STARTS)):
            try:
                self.servers[at] = self._start(self.servers[at].port)
                return
            except ServerFailedError:
                if not left:
                    raise

    def kill(self) -> None:
        for server in self.servers:
            server.kill()


@contextmanager
def servers(folder: Path, count: int) -> Iterator[Group]:
    flags = ("--alias", MODEL, "--parallel", str(_SLOTS), "--ctx", str(_CONTEXT_PER_SLOT), "--threads", "1")
    with ExitStack() as stack:
        group = Group(lambda port: start_server(folder / "models", _MODEL, *flags, port=port), count)
        stack.callback(group.kill)
        yield group


def describe(plan: Plan) -> str:
    work = WORKLOADS[plan.workload]
    low, high = work.later_words
    order = "after each turn waiting for all others" if plan.mixed else "each from its first turn to its last"
    incident = " One server was killed and restarted after half of the turns." if plan.restart else ""
    gateways = f" {plan.gateways} gateways that don't talk, each request to one at random." if plan.gateways > 1 else ""
    return (
        f"- Workload {plan.workload}: {plan.conversations} conversations of {plan.turns} turns, {work.in_flight} "
        f"at a time, {order}; {work.system_words} words of system prompt that all share, {work.first_words} in the "
        f"first turn, {low} to {high} in later ones, {ANSWER_TOKENS} tokens in each answer. Rounds: {plan.rounds}, "
        f"from seed {plan.seed}, pooled.\n"
        f"- {_SERVERS} llama-servers ({ONE}: 1) of {_SLOTS} slots, fresh for each arrangement.{incident}{gateways}"
    )


def parse(arguments: Sequence[str]) -> Plan:
    options = argparse.ArgumentParser(
        prog="scripts/bench conversations", description=(__doc__ or "").partition(": ")[2].partition("\n")[0]
    )
    add = options.add_argument
    known = (*_DIRECT, *_STRATEGIES, _AS_CONFIGURED)
    add("--quick", action="store_true", help="few and short conversations, one round: does it all work?")
    add("--workload", choices=WORKLOADS, default="a")
    add("--strategies", default=",".join(_USUAL), metavar="LIST", help=f"of {', '.join(known)} (default %(default)s)")
    add("--conversations", type=int, metavar="N", help="default 24")
    add("--turns", type=int, metavar="N", help="of each conversation (default 6)")
    add("--rounds", type=int, default=1, metavar="N", help="each with other texts (default 1)")
    add("--seed", type=int, default=1, help="of the first round (default 1)")
    add("--gateways", type=int, default=1, metavar="N", help="so many that don't talk (default 1)")
    add("--restart", action="store_true", help="kill and restart one server after half of the turns")
    text = "after each turn a conversation waits for all others, and does not go on at once"
    add("--mixed", action="store_true", help=text)
    add("--config", type=Path, metavar="FILE", help="JSON: more keys for the gateways' config")
    add("--json", type=Path, metavar="FILE", help="also write every turn there")
    chosen = options.parse_args(arguments)
    arrangements = [name.strip() for name in chosen.strategies.split(",")]
    if unknown := [name for name in arrangements if name not in known]:
        options.error(f"--strategies: {unknown[0]!r} is none of {', '.join(known)}")
    return Plan(
        workload=chosen.workload,
        arrangements=arrangements,
        conversations=chosen.conversations or (6 if chosen.quick else 24),
        turns=chosen.turns or (3 if chosen.quick else 6),
        rounds=chosen.rounds,
        seed=chosen.seed,
        gateways=chosen.gateways,
        restart=chosen.restart,
        mixed=chosen.mixed,
        config=json.loads(chosen.config.read_text()) if chosen.config else {},
        json_path=chosen.json,
    )
