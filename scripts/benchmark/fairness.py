"""scripts/bench fairness: how long short requests wait beside a user with many long jobs.

One user sends all long jobs at once; five others send one short request at a time, again and again, as long as jobs
wait. Times are told in units of one long job's mean service time.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmark import accounting, report, shapes, work
from benchmark.chat import Endpoint
from benchmark.crowd import HOG, USERS, Crowd, Found, lengths, unit
from benchmark.gateways import Place, free_port, start_proxy
from benchmark.load import percentile
from benchmark.processes import Processes
from llama import Model, ServerFailedError, start_server
from supervisor import StartFailedError

_SLOTS = 4
_SCRIPTED_TOKENS = 1000  # of a long job: a second
# Real ones: a model so slow that its 4 streams together, about 500 tokens a second, are little work for the gateway.
_REAL_TOKENS = 120
_REAL_MODEL = Model("bench-fair", layers=8, embd=512)


@dataclass(frozen=True)
class Row:
    label: str
    slots: int | None  # in the gateway's config; None: without a gateway


ROWS = {
    "direct": Row("no gateway", None),
    "unbounded": Row("gateway, `slots: 0`: the server's own queue", 0),
    "fair": Row(f"gateway, `slots: {_SLOTS}`: the fair queue", _SLOTS),
    # A gateway that knows no slots yet: nothing about them in its config.
    "default": Row("gateway, slots left out", -1),
}
_USUAL = ("direct", "unbounded", "fair")


@dataclass(frozen=True)
class Plan:
    rows: Sequence[str]
    rounds: int
    seed: int
    jobs: int
    tokens: int
    spread: float
    think: float
    real: bool
    config: dict[str, Any]
    json_path: Path | None


def main(arguments: Sequence[str]) -> None:
    plan = parse(arguments)
    machine = report.machine()
    began = accounting.moment()
    found: dict[str, list[Found]] = {name: [] for name in plan.rows}
    failure = ""
    try:
        for number in range(plan.rounds):
            for name in plan.rows:
                print(f"round {number + 1} of {plan.rounds}: {name}", file=sys.stderr, flush=True)
                found[name].append(run(plan, ROWS[name], plan.seed + number))
    except (StartFailedError, ServerFailedError) as error:
        failure = f"bench: {error}"
    except KeyboardInterrupt:
        failure = "bench: interrupted"
    done = {name: some for name, some in found.items() if some}
    print(f"{machine}\n\n{table(done)}\n\n{describe(plan)}\n{errors(done)}{accounting.took(began)}")
    if plan.json_path is not None:
        plan.json_path.write_text(work.pretty({"machine": machine, "found": done}))
    sys.exit(failure or 0)


def run(plan: Plan, row: Row, seed: int) -> Found:
    sizes = lengths(seed, plan.jobs, plan.tokens, plan.spread, plan.think, _SLOTS)
    with Processes() as processes, ExitStack() as stack:
        port = _real_server(processes, stack) if plan.real else _scripted_server(processes)
        unit_s = uvloop.run(unit(Endpoint("direct", port), plan.tokens, _SLOTS))
        return uvloop.run(Crowd(_endpoints(plan, row, processes, port), sizes, _SLOTS, unit_s).run())


def _endpoints(plan: Plan, row: Row, processes: Processes, port: int) -> dict[str, Endpoint]:
    """Where each user sends requests."""
    if row.slots is None:
        return dict.fromkeys((HOG, *USERS), Endpoint("direct", port))
    server = {"name": "four-slots", "url": f"http://127.0.0.1:{port}"}
    bound = {"slots": row.slots} if row.slots >= 0 else {}
    gateways = start_proxy(Place(processes, port), "gateway", [{**server, **bound}], plan.config, (HOG, *USERS))
    return {user: Endpoint("gateway", one.port, key=one.key) for user, one in gateways.items()}


def _scripted_server(processes: Processes) -> int:
    port = free_port()
    process = processes.start_part("slots_upstream", str(port), "--slots", str(_SLOTS))
    assert process.stdout
    if not process.stdout.readline().startswith("READY"):
        raise StartFailedError(f"slots_upstream did not start:\n{processes.last_words('slots_upstream')}")
    return port


def _real_server(processes: Processes, stack: ExitStack) -> int:
    flags = ("--alias", shapes.MODEL, "--parallel", str(_SLOTS), "--threads", "1")
    return stack.enter_context(start_server(processes.folder / "models", _REAL_MODEL, *flags)).port


def table(found: Mapping[str, Sequence[Found]]) -> str:
    """Rounds are pooled; waits are told in units of their own round's mean long job."""
    lines = [
        "| | short requests | wait p50 | wait p90 | longest | one long job | all long jobs done after | errors |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in found.items():
        waits = [wait for one in runs for wait in one.waits]
        cells = (
            *(ROWS[name].label, f"{len(waits):,}", _units(waits, 0.5), _units(waits, 0.9), _units(waits, 1.0)),
            *(
                f"{statistics.mean(one.unit_s for one in runs):.2f} s",
                f"{statistics.mean(one.all_after for one in runs):.1f}",
            ),
            f"{sum(one.errors.total() for one in runs):,}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _units(values: list[float], share: float) -> str:
    return f"{percentile(values, share):.2f}" if values else "–"


def errors(found: Mapping[str, Sequence[Found]]) -> str:
    return "".join(
        f"- {ROWS[name].label}: {count:,} × {reason}\n"
        for name, runs in found.items()
        for one in runs
        for reason, count in one.errors.most_common()
    )


def describe(plan: Plan) -> str:
    server = (
        "A real llama-server"
        if plan.real
        else "A scripted server that serves in order of arrival, as llama-server does,"
    )
    return (
        f"- {server} with {_SLOTS} slots. One user sends {plan.jobs} long jobs at once, five others (keys of their "
        "own) one short request at a time, of 5 to 10 % of a long job, and think for "
        f"{plan.think:g} long jobs on average.\n"
        f"- Long jobs differ by up to ±{plan.spread:.0%}, and the first {_SLOTS} have any part of their time left, so "
        f"that slots are out of step. Rounds: {plan.rounds}, from seed {plan.seed}, pooled.\n"
        "- Wait: from sending to the first text, in units of one mean long job; of the short requests that were sent "
        "while long jobs waited for a slot. Without preemption the next slot that gets free is the best there is: 0.44 "
        "at p90 when four equal jobs stand at random places."
    )


def parse(arguments: Sequence[str]) -> Plan:
    options = argparse.ArgumentParser(
        prog="scripts/bench fairness", description=(__doc__ or "").partition(": ")[2].partition("\n")[0]
    )
    add = options.add_argument
    add("--quick", action="store_true", help="jobs of a tenth of a second, one round: does it all work?")
    add("--rows", default=",".join(_USUAL), metavar="LIST", help=f"of {', '.join(ROWS)} (default %(default)s)")
    add("--rounds", type=int, metavar="N", help="default 3, with --quick 1")
    add("--seed", type=int, default=1, help="of the first round (default 1)")
    add("--jobs", type=int, default=60, metavar="N", help="long ones (default 60)")
    text = "by what share of their mean long jobs differ, up and down (default %(default)s)"
    add("--spread", type=float, default=0.5, metavar="SHARE", help=text)
    text = "mean pause between a user's short requests, in long jobs (default %(default)s)"
    add("--think", type=float, default=0.5, metavar="JOBS", help=text)
    add("--real", action="store_true", help="a real llama-server instead of a scripted one")
    add("--config", type=Path, metavar="FILE", help="JSON: more keys for the gateway's config")
    add("--json", type=Path, metavar="FILE", help="also write every wait there")
    chosen = options.parse_args(arguments)
    rows = [row.strip() for row in chosen.rows.split(",")]
    if unknown := [row for row in rows if row not in ROWS]:
        options.error(f"--rows: {unknown[0]!r} is none of {', '.join(ROWS)}")
    tokens = _REAL_TOKENS if chosen.real else _SCRIPTED_TOKENS
    return Plan(
        rows=rows,
        rounds=chosen.rounds or (1 if chosen.quick else 3),
        seed=chosen.seed,
        jobs=chosen.jobs,
        tokens=tokens // 10 if chosen.quick else tokens,
        spread=chosen.spread,
        think=chosen.think,
        real=chosen.real,
        config=json.loads(chosen.config.read_text()) if chosen.config else {},
        json_path=chosen.json,
    )
