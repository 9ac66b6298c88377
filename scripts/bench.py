"""scripts/bench: what the proxy costs, beside the same work sent directly and through a bare mitmdump.

Starts everything itself on 127.0.0.1: a scripted fast upstream, the gateways, the load; stops it all, however it ends.
"""

import argparse
import importlib
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "addon"))

from benchmark import accounting, report, work
from benchmark.gateways import STARTERS, Gateway, Place, by_url, free_port, start_upstream
from benchmark.measures import SECTIONS, Section
from benchmark.processes import Processes
from benchmark.runner import QUICK, Effort, Findings, Load, Runner
from supervisor import StartFailedError

# Benches of their own, each a module with a `main`: `scripts/bench NAME --help`.
OTHERS = ("conversations", "fairness")
_ROUNDS = 3
_OPEN_FILES = 16_384  # a thousand streams are two thousand connections in a gateway


@dataclass(frozen=True)
class Plan:
    effort: Effort
    sections: frozenset[Section]
    rows: Sequence[str]  # of STARTERS
    others: Sequence[Gateway]
    upstream_port: int
    keep_streams: bool
    json_path: Path | None


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    allow_open_files()
    if sys.argv[1:2] and sys.argv[1] in OTHERS:
        importlib.import_module(f"benchmark.{sys.argv[1]}").main(sys.argv[2:])
        return
    plan = parse(sys.argv[1:])
    machine = report.machine()
    bench = Bench(plan, Findings(plan.sections))
    began = accounting.moment()
    failure = ""
    try:
        with Processes() as processes:
            bench.measure(processes)
    except StartFailedError as error:
        failure = f"bench: {error}"
    except KeyboardInterrupt:
        failure = "bench: interrupted"
    took = accounting.took(began)
    print(f"{machine}\n\n{report.table(bench.findings, bench.names)}\n")
    print(f"{report.notes(bench.findings, plan.effort.rounds)}\n{took}")
    if plan.json_path is not None:
        plan.json_path.write_text(work.pretty({"machine": machine, "findings": bench.findings}))
    sys.exit(failure or 0)


@dataclass
class Bench:
    """One run; what it has found stays here when it fails halfway."""

    plan: Plan
    findings: Findings
    names: list[str] = field(default_factory=list)  # of the gateways, in the table's order

    def measure(self, processes: Processes) -> None:
        place = Place(processes, self.plan.upstream_port)
        direct = start_upstream(place, keep_streams=self.plan.keep_streams)
        runner = Runner(Load(processes), self.plan.effort, self.findings, say)
        self._name(direct)
        for gateway in self.plan.others:
            if problem := gateway.problem():
                raise StartFailedError(f"{gateway.name}: {problem}")
        if self.plan.sections - {"memory"}:
            started = [STARTERS[row](place) for row in self.plan.rows]
            gateways = [direct, *started, *self.plan.others]
            self._name(*gateways)
            runner.rounds(gateways)
            if "streams" in self.plan.sections:
                runner.sustained(gateways)
            stop(processes, started)
        if "memory" in self.plan.sections:
            for row in self.plan.rows:
                fresh = STARTERS[row](place)
                self._name(fresh)
                runner.memory(fresh)
                stop(processes, [fresh])
            for gateway in self.plan.others:
                self._name(gateway)
                runner.memory(gateway)

    def _name(self, *gateways: Gateway) -> None:
        self.names += [gateway.name for gateway in gateways if gateway.name not in self.names]


def stop(processes: Processes, gateways: Sequence[Gateway]) -> None:
    processes.stop([gateway.process for gateway in gateways if gateway.process is not None])


def parse(arguments: Sequence[str]) -> Plan:
    options = argparse.ArgumentParser(
        prog="scripts/bench",
        description=(__doc__ or "").partition("\n")[0],
        epilog="Benches of their own: scripts/bench conversations --help, scripts/bench fairness --help",
    )
    add = options.add_argument
    add("--quick", action="store_true", help="one short round: does it all work?")
    add("--rounds", type=int, metavar="N", help=f"default {_ROUNDS}, with --quick 1")
    add("--only", action="append", choices=SECTIONS, help="may be given several times")
    add("--rows", default=",".join(STARTERS), help="what to start besides direct (default %(default)s)")
    text = "another gateway, started before on --upstream-port, model 'bench'; its bytes may differ from the upstream's"
    add("--gateway", action="append", default=[], metavar="NAME=URL[,KEY]", help=text)
    add("--pid", action="append", default=[], metavar="NAME=PID", help="that gateway's process, for CPU and memory")
    add("--upstream-port", type=int, metavar="PORT", help="of the scripted upstream (default: a free one)")
    text = "the upstream keeps its connection after a streamed answer; llama-server does not"
    add("--keep-streams", action="store_true", help=text)
    add("--json", type=Path, metavar="FILE", help="also write every number there")
    chosen = options.parse_args(arguments)
    rows = [row for row in chosen.rows.split(",") if row]
    if unknown := [row for row in rows if row not in STARTERS]:
        options.error(f"--rows: {unknown[0]!r} is none of {', '.join(STARTERS)}")
    if chosen.rounds is not None and chosen.rounds < 1:
        options.error("--rounds: at least 1")
    try:
        pids = {name: int(pid) for name, _, pid in (text.partition("=") for text in chosen.pid)}
        others = [by_url(text, pids) for text in chosen.gateway]
    except ValueError as error:
        options.error(str(error))
    effort = QUICK if chosen.quick else Effort(_ROUNDS)
    return Plan(
        effort=replace(effort, rounds=chosen.rounds or effort.rounds),
        sections=frozenset(chosen.only or SECTIONS),
        rows=rows,
        others=others,
        upstream_port=chosen.upstream_port or free_port(),
        keep_streams=chosen.keep_streams,
        json_path=chosen.json,
    )


def allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _leave(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
