"""Invented troubles of servers: when nothing could be sent to one, and what `server_events` says of it.

One at a time, so that others can take over. Every change is seen by each worker of the proxy, moments apart; only what
a worker learns from its own requests (a server that is ejected or asks for a pause) stays its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.records import ServerEvent

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
WORKERS = ("1", "2")
APART_MS = 120_000  # between two troubles


@dataclass(frozen=True)
class Kind:
    """`states`: (share of the outage after which it begins, state, reason). `back`: the reason of being up again."""

    share: float
    median_s: float
    states: tuple[tuple[float, str, str], ...]
    back: str
    seen_by_all: bool


LOADING = "loads its model"
PROBE, REQUESTS = "answers its probe again", "answers requests again"
KINDS = {
    "restart": Kind(0.2, 70, ((0, "down", "refuses connections"), (0.3, "loading", LOADING)), PROBE, True),
    "crash": Kind(
        0.1, 1500, ((0, "down", "does not answer /health within 3 s"), (0.97, "loading", LOADING)), PROBE, True
    ),
    "errors": Kind(0.45, 8, ((0, "ejected", "answered with HTTP 502; left alone for 8 s"),), REQUESTS, False),
    "pause": Kind(0.25, 7, ((0, "paused", "asked for a pause of 7 s"),), REQUESTS, False),
}
# What the last two days' pictures show, whatever the seed: (hours before the end, server, kind, minutes).
RECENT = (
    (36, 1, "errors", 0.6),
    (29, 0, "restart", 2),
    (21, 2, "crash", 55),
    (7, 1, "restart", 3),
    (4, 0, "pause", 0.2),
)
STILL = (0.2, 1, "crash", 60)  # not over yet at the end


@dataclass(frozen=True)
class Outage:
    server: int
    kind: str
    start_ms: int
    stop_ms: int

    def overlaps(self, other: "Outage") -> bool:
        return self.start_ms < other.stop_ms + APART_MS and other.start_ms < self.stop_ms + APART_MS


@dataclass(frozen=True)
class Change:
    """Of a server's state, and which workers see it."""

    at_ms: int
    server: str
    state: str
    previous: str
    reason: str | None
    seen_by: tuple[str, ...]


def invent(random: np.random.Generator, start_ms: int, end_ms: int, servers: int) -> list[Outage]:
    """Outages between the two times, in order: one or two a day, more in the last 48 hours."""
    found = []
    for hours, server, kind, minutes in (*RECENT, STILL):
        begin = int(end_ms - hours * HOUR_MS)
        found.append(Outage(server, kind, begin, begin + int(minutes * 60_000)))
    names = list(KINDS)
    for _ in range(random.poisson(1.5 * (end_ms - start_ms) / DAY_MS)):
        kind = names[random.choice(len(names), p=[KINDS[name].share for name in names])]
        begin = int(random.integers(start_ms, end_ms))
        outage = Outage(
            int(random.integers(servers)),
            kind,
            begin,
            begin + max(3000, int(KINDS[kind].median_s * 1000 * random.lognormal(0, 0.4))),
        )
        if not any(outage.overlaps(other) for other in found):
            found.append(outage)
    return sorted((outage for outage in found if outage.start_ms > start_ms), key=lambda outage: outage.start_ms)


def since(outages: list[Outage], server: NDArray[Any], at_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each request: how many ms its server has been away for at that moment; -1: it is there."""
    away = np.full(len(at_ms), -1)
    for outage in outages:
        if len(at_ms) and outage.start_ms <= at_ms[-1] and outage.stop_ms > at_ms[0]:
            during = (server == outage.server) & (at_ms >= outage.start_ms) & (at_ms < outage.stop_ms)
            away = np.where(during, at_ms - outage.start_ms, away)
    return away


def changes_of(outage: Outage, server: str, worker: str) -> Iterator[Change]:
    kind = KINDS[outage.kind]
    length_ms = outage.stop_ms - outage.start_ms
    before = "up"
    for part, state, reason in (*kind.states, (1, "up", kind.back)):
        at_ms = outage.start_ms + int(part * length_ms)
        yield Change(at_ms, server, state, before, reason, WORKERS if kind.seen_by_all else (worker,))
        before = state


def events(
    random: np.random.Generator, outages: list[Outage], servers: list[str], start_ms: int, end_ms: int
) -> list[ServerEvent]:
    """The rows that the workers write, from the first probe of each server on, oldest first."""
    changes = [Change(start_ms, servers[place], "up", "unknown", None, WORKERS) for place in range(len(servers))]
    for outage in outages:
        changes += changes_of(outage, servers[outage.server], str(random.choice(WORKERS)))
    seen = [
        (change.at_ms + int(random.integers(1500)), change, worker) for change in changes for worker in change.seen_by
    ]
    return [
        ServerEvent(iso(at_ms), change.server, change.state, change.previous, change.reason, worker)
        for at_ms, change, worker in sorted(seen, key=lambda row: row[0])
        if at_ms < end_ms
    ]


def iso(at_ms: int) -> str:
    return f"{np.datetime64(at_ms, 'ms')}Z"
