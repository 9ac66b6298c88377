"""Findings as a markdown table: medians over the rounds, and beside each number its ratio to the bare mitmdump's."""

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from benchmark.gateways import BARE, DIRECT
from benchmark.measures import MEASURES, PACE_PER_S, Measure
from benchmark.runner import Findings

_SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Row:
    label: str
    unit: str
    values: dict[str, list[float]]  # gateway -> one per round
    digits: int = 0
    added: bool = False
    or_more: frozenset[str] = frozenset()


def rows(findings: Findings) -> list[Row]:
    measures = [measure for measure in MEASURES if measure.section in findings.sections]
    measured = [_row(findings, measure) for measure in measures if measure.phase in findings.results]
    if findings.sustained:
        sustained: dict[str, list[float]] = {name: [count] for name, count in findings.sustained.items()}
        label = f"streams of {PACE_PER_S} chunks/s sustained"
        measured.append(Row(label, "", sustained, or_more=frozenset(findings.sustains_more)))
    for name, by_gateway in findings.memory_mb.items():
        measured.append(Row(f"memory, {name}", "MB", {key: [mb] for key, mb in by_gateway.items()}, digits=1))
    return [row for row in measured if row.values]


def _row(findings: Findings, measure: Measure) -> Row:
    values: dict[str, list[float]] = {}
    by_gateway = findings.results[measure.phase]
    direct = [measure.read(result) for result in by_gateway.get(DIRECT, [])]
    for name, results in by_gateway.items():
        if name == DIRECT and measure.of_gateways_only:
            continue
        read = [measure.read(result) for result in results]
        if measure.added and name != DIRECT:
            pairs = zip(read, direct, strict=True)
            read = [None if one is None or base is None else one - base for one, base in pairs]
        known = [one for one in read if one is not None]
        if known:
            values[name] = known
    return Row(measure.label, measure.unit, values, measure.digits, measure.added)


def table(findings: Findings, names: Sequence[str]) -> str:
    lines = [
        "| | " + " | ".join(names) + " | spread |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for row in rows(findings):
        cells = [_cell(row, name) for name in names]
        lines.append(f"| {row.label} | " + " | ".join(cells) + f" | {_spread(row)} |")
    counts = [f"{findings.errors[name].total():,}" if name in findings.errors else "–" for name in names]
    lines.append("| wrong or missing answers | " + " | ".join(counts) + " | |")
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    values = row.values.get(name)
    if not values:
        return "–"
    median = statistics.median(values)
    sign = "+" if row.added and name != DIRECT else ""
    text = f"{median:{sign},.{row.digits}f} {row.unit}".strip()
    if name in row.or_more:
        text = f"≥ {text}"
    bare = statistics.median(row.values[BARE]) if row.values.get(BARE) else 0.0
    if name == DIRECT or bare <= 0 or median < 0:
        return text
    return f"{text} ({median / bare:.2f}×)"


def _spread(row: Row) -> str:
    """The widest of the gateways: half the way from the lowest to the highest round, as a share of the median."""
    shares = [
        (max(values) - min(values)) / 2 / abs(statistics.median(values))
        for values in row.values.values()
        if len(values) > 1 and statistics.median(values)
    ]
    return f"±{max(shares):.0%}" if shares else ""


def notes(findings: Findings, rounds: int) -> str:
    idle = [f"{name} {share:.2%} of a core" for name, share in findings.idle_cpu_share.items() if name != DIRECT]
    lines = [
        f"Medians of {rounds} alternating rounds (in brackets: the ratio to {BARE}); spread: the widest of a row. "
        "Latency and time to first token of gateways: what they add to direct.",
        f"{BARE}: `mitmdump -q`, default addons, an addon that sets `flow.response.stream = True`.",
        f"CPU: of the gateway's processes alone, less what they use when idle ({'; '.join(idle) or 'not measured'}).",
    ]
    for name, errors in findings.errors.items():
        lines += [f"{name}: {count:,} × {reason}" for reason, count in errors.most_common(_SHOWN_ERRORS)]
    return "\n".join(f"- {line}" for line in lines)


@dataclass(frozen=True)
class Machine:
    when: str
    cpu: str
    cores: int
    system: str
    python: str
    versions: dict[str, str]
    load_average: float

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"{self.when} · {self.cpu}, {self.cores} cores · {self.system} · Python {self.python}, {versions} · "
            f"load average before: {self.load_average:.2f}"
        )


def machine() -> Machine:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(
        (line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), platform.machine()
    )
    return Machine(
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={name: version(name) for name in ("mitmproxy", "uvloop", "msgspec")},
        load_average=os.getloadavg()[0],
    )
