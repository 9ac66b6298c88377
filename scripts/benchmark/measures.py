"""What is measured: pieces of work (phases), and the numbers that are read out of their results (measures)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from benchmark.work import Job, Result

Section = Literal["cpu", "latency", "streams", "memory"]
SECTIONS: tuple[Section, ...] = ("cpu", "latency", "streams", "memory")

# 50 tokens a second is what one user of a mid-sized model sees.
PACE_PER_S = 50
# Requests in flight while CPU is measured: enough to keep a gateway busy, few enough for one machine.
BUSY = 16
_HELD_STREAMS = 60  # x 50 chunks/s: a load that a bare mitmdump bears, with mostly one chunk per wake-up
_HELD_S = 2.0
_BEFORE_AND_AFTER_S = 1.5  # held streams begin before the measured time, and end after it


@dataclass(frozen=True)
class Phase:
    sections: frozenset[Section]
    job: Job


def _phase(job: Job, *sections: Section) -> Phase:
    return Phase(frozenset(sections), job)


# Enough for a p99; what needs no more time than this (direct) does not get it.
_MOST = 5_000

# Seconds are chosen so that one round over four gateways takes about a minute. Paced streams are as long as it takes to
# begin some 100 new ones a second at most: more would measure the cost of requests.
PHASES: dict[str, Phase] = {
    "requests 1": _phase(Job(kind="requests", seconds=1.0, in_flight=1, most=_MOST), "latency"),
    "requests 16": _phase(Job(kind="requests", seconds=2.0, in_flight=BUSY, most=_MOST), "cpu", "latency"),
    "requests 100": _phase(Job(kind="requests", seconds=1.5, in_flight=100, most=_MOST), "latency"),
    "streams 1": _phase(Job(kind="streams", seconds=1.0, in_flight=1, most=_MOST), "latency"),
    "streams 16": _phase(Job(kind="streams", seconds=2.0, in_flight=BUSY, most=_MOST), "cpu", "latency"),
    "streams 100": _phase(Job(kind="streams", seconds=1.5, in_flight=100, most=_MOST), "latency"),
    "paced 16": _phase(Job(kind="streams", seconds=1.5, in_flight=16, chunks=10, pace_per_s=PACE_PER_S), "latency"),
    "paced 100": _phase(Job(kind="streams", seconds=2.0, in_flight=100, chunks=50, pace_per_s=PACE_PER_S), "latency"),
    "held": _phase(
        Job(
            kind="hold",
            seconds=_HELD_S,
            in_flight=_HELD_STREAMS,
            chunks=int(PACE_PER_S * (_HELD_S + _BEFORE_AND_AFTER_S)),
            pace_per_s=PACE_PER_S,
        ),
        "cpu",
    ),
    "full speed": _phase(Job(kind="streams", seconds=2.0, in_flight=BUSY, chunks=200), "streams"),
}


@dataclass(frozen=True)
class Measure:
    """One row. `added`: of a gateway it is the difference to direct, in the same round."""

    label: str
    unit: str
    section: Section
    phase: str
    read: Callable[[Result], float | None]
    added: bool = False
    of_gateways_only: bool = False
    digits: int = 0


def _cpu_us_per_answer(result: Result) -> float | None:
    return result.cpu_s / result.answers * 1e6 if result.cpu_s is not None and result.answers else None


def _cpu_us_per_event(result: Result) -> float | None:
    return result.cpu_s / result.events * 1e6 if result.cpu_s is not None and result.events else None


def _answers_per_s(result: Result) -> float | None:
    return result.answers / result.elapsed_s if result.elapsed_s else None


def _events_per_s(result: Result) -> float | None:
    return result.events / result.elapsed_s if result.elapsed_s else None


def _at(values: Callable[[Result], list[float]], position: int) -> Callable[[Result], float | None]:
    return lambda result: values(result)[position] if values(result) else None


def _spread(label: str, phase: str, values: Callable[[Result], list[float]]) -> list[Measure]:
    return [
        Measure(f"{label}, {name}", "ms", "latency", phase, _at(values, position), added=True, digits=2)
        for position, name in enumerate(("p50", "p99"))
    ]


def _latency(result: Result) -> list[float]:
    return result.latency_ms


def _ttft(result: Result) -> list[float]:
    return result.ttft_ms


MEASURES: tuple[Measure, ...] = (
    Measure("CPU per request", "µs", "cpu", "requests 16", _cpu_us_per_answer, of_gateways_only=True),
    Measure("CPU per streamed chunk", "µs", "cpu", "held", _cpu_us_per_event, of_gateways_only=True, digits=1),
    Measure("CPU per stream of 8 chunks", "µs", "cpu", "streams 16", _cpu_us_per_answer, of_gateways_only=True),
    Measure("requests per second, 16 in flight", "", "cpu", "requests 16", _answers_per_s),
    *(
        measure
        for count in (1, 16, 100)
        for measure in _spread(f"latency, {count} in flight", f"requests {count}", _latency)
    ),
    *(
        measure
        for count in (1, 16, 100)
        for measure in _spread(f"time to first token, {count} in flight, no pause", f"streams {count}", _ttft)
    ),
    *(
        measure
        for count in (16, 100)
        for measure in _spread(f"time to first token, {count} streams of 50 chunks/s", f"paced {count}", _ttft)
    ),
    Measure("chunks per second, 16 streams at full speed", "", "streams", "full speed", _events_per_s),
)
