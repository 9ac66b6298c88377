"""Runs the work: round after round, in each round every phase against one gateway after the other (A B C, A B C, …)."""

import select
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from benchmark import accounting
from benchmark.gateways import Gateway
from benchmark.measures import MEASURES, PACE_PER_S, PHASES, Section
from benchmark.processes import Processes
from benchmark.work import LATE, Job, Result, decode_result, encode
from supervisor import StartFailedError

_JOB_GRACE_S = 60.0  # warm-up and waiting for the last answers included
_IDLE_S = 1.0
_STREAM_S = 2.0  # length of the streams whose pace must hold
_IN_TIME = 1.05  # a stream may take so much longer than its pace says, and no more than one in 20 any longer
_LEVELS = (50, 100, 150, 200, 250, 300, 400, 500, 600, 800, 1000)
_TRIES = 3  # another process may get in the way of one: a pace that held once can be held
_LOADED_STREAMS = 100
_LOADED_S = 2.0
_MEMORY_SECONDS = 120.0


@dataclass(frozen=True)
class Effort:
    """How much of everything is done."""

    rounds: int
    time_factor: float = 1.0  # of each phase's seconds
    levels: Sequence[int] = _LEVELS
    requests_before: int = 2_000
    requests_after: int = 20_000


QUICK = Effort(rounds=1, time_factor=0.3, levels=(50, 100), requests_before=200, requests_after=1_000)


@dataclass
class Findings:
    """Everything measured, by gateway."""

    sections: frozenset[Section]
    results: dict[str, dict[str, list[Result]]] = field(default_factory=dict)  # phase -> gateway -> one per round
    sustained: dict[str, int] = field(default_factory=dict)
    sustains_more: set[str] = field(default_factory=set)  # held the highest level that was tried
    memory_mb: dict[str, dict[str, float]] = field(default_factory=dict)  # row -> gateway -> MB
    idle_cpu_share: dict[str, float] = field(default_factory=dict)
    errors: dict[str, Counter[str]] = field(default_factory=dict)

    def count_errors(self, gateway: Gateway, where: str, result: Result) -> None:
        counted = self.errors.setdefault(gateway.name, Counter())
        counted.update({f"{where}: {reason}": count for reason, count in result.errors.items()})


class Load:
    """The load generator's process."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._process: subprocess.Popen[str] = processes.start_part("load")

    def run(self, job: Job) -> Result:
        """Raises StartFailedError when it answers nothing in time."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(encode(job) + "\n")
        stdin.flush()
        length_s = job.chunks / job.pace_per_s if job.pace_per_s else 0.0
        ready, _, _ = select.select([stdout], [], [], job.seconds + length_s + _JOB_GRACE_S)
        line = stdout.readline() if ready else ""
        if not line:
            raise StartFailedError(f"the load generator gave no result:\n{self._processes.last_words('load')}")
        return decode_result(line)

    def run_on(self, gateway: Gateway, job: Job, **more: object) -> Result:
        target = {
            "host": gateway.host,
            "port": gateway.port,
            "path": gateway.path,
            "key": gateway.key,
            "exact": gateway.exact,
            "reconnect": gateway.is_direct,
            "pids": tuple(accounting.tree(gateway.pid)) if gateway.pid else (),
        }
        return self.run(msgspec.structs.replace(job, **target, **more))


@dataclass(frozen=True)
class Runner:
    load: Load
    effort: Effort
    findings: Findings
    say: Callable[[str], None]

    def rounds(self, gateways: Sequence[Gateway]) -> None:
        """Fills in the results of all phases, without what the gateways' processes use when idle."""
        wanted = {measure.phase for measure in MEASURES if measure.section in self.findings.sections}
        idle = {gateway.name: self._idle_cpu_share(gateway) for gateway in gateways}
        self.findings.idle_cpu_share.update(idle)
        for number in range(1, self.effort.rounds + 1):
            for name in (name for name in PHASES if name in wanted):
                self.say(f"round {number} of {self.effort.rounds}: {name}")
                for gateway in gateways:
                    job = PHASES[name].job
                    result = self.load.run_on(gateway, job, seconds=job.seconds * self.effort.time_factor)
                    if result.cpu_s is not None:
                        used = result.cpu_s - idle[gateway.name] * result.elapsed_s
                        result = msgspec.structs.replace(result, cpu_s=used)
                    self.findings.results.setdefault(name, {}).setdefault(gateway.name, []).append(result)
                    self.findings.count_errors(gateway, name, result)

    def sustained(self, gateways: Sequence[Gateway]) -> None:
        """Raises the number of paced streams until a gateway's pace slips; each level alternates like the rounds."""
        holding = list(gateways)
        self.findings.sustained.update(dict.fromkeys((gateway.name for gateway in gateways), 0))
        for level in self.effort.levels:
            if all(gateway.is_direct for gateway in holding):
                break
            self.say(f"{level} streams at {PACE_PER_S} chunks/s")
            for gateway in list(holding):
                if any(self._holds_pace(gateway, level) for _ in range(_TRIES)):
                    self.findings.sustained[gateway.name] = level
                else:
                    holding.remove(gateway)
        self.findings.sustains_more.update(gateway.name for gateway in holding)

    def memory(self, gateway: Gateway) -> None:
        """A fresh gateway: idle, after some requests, after many, with streams, after them."""
        self.say(f"memory of {gateway.name}")
        idle = self.load.run_on(gateway, Job(kind="idle", seconds=_IDLE_S))
        if idle.rss_mb is None:
            return
        before, after = self.effort.requests_before, self.effort.requests_after
        requests = Job(kind="requests", seconds=_MEMORY_SECONDS, in_flight=16)
        self._remember(gateway, "idle", idle.rss_mb)
        at_before = self._remembered_run(gateway, f"after {before:,} requests", requests, most=before)
        at_after = self._remembered_run(gateway, f"after {after:,} requests", requests, most=after - before)
        self._remember(gateway, f"growth from {before:,} to {after:,} requests", at_after - at_before)
        chunks = int(PACE_PER_S * (_LOADED_S + 2))
        streams = Job(kind="hold", seconds=_LOADED_S, in_flight=_LOADED_STREAMS, chunks=chunks, pace_per_s=PACE_PER_S)
        result = self.load.run_on(gateway, streams)
        self.findings.count_errors(gateway, "memory", result)
        self._remember(gateway, f"loaded: {_LOADED_STREAMS} streams at once", result.rss_peak_mb or 0.0)
        self._remembered_run(gateway, "afterwards", Job(kind="idle", seconds=_IDLE_S))

    def _idle_cpu_share(self, gateway: Gateway) -> float:
        result = self.load.run_on(gateway, Job(kind="idle", seconds=_IDLE_S))
        return (result.cpu_s or 0.0) / result.elapsed_s if result.elapsed_s else 0.0

    def _holds_pace(self, gateway: Gateway, level: int) -> bool:
        stream_s = _STREAM_S * max(self.effort.time_factor, 0.7)
        chunks = int(stream_s * PACE_PER_S)
        job = Job(kind="once", seconds=stream_s * 1.5 + 2, in_flight=level, chunks=chunks, pace_per_s=PACE_PER_S)
        result = self.load.run_on(gateway, job)
        wrong = {reason: count for reason, count in result.errors.items() if reason != LATE}  # late is the finding here
        self.findings.count_errors(gateway, f"{level} streams", msgspec.structs.replace(result, errors=wrong))
        return not result.errors and result.answers == level and 0 < result.stretch_p95 <= _IN_TIME

    def _remembered_run(self, gateway: Gateway, row: str, job: Job, **more: object) -> float:
        result = self.load.run_on(gateway, job, **more)
        self.findings.count_errors(gateway, "memory", result)
        self._remember(gateway, row, result.rss_mb or 0.0)
        return result.rss_mb or 0.0

    def _remember(self, gateway: Gateway, row: str, mb: float) -> None:
        self.findings.memory_mb.setdefault(row, {})[gateway.name] = mb
