"""What the bench asks of the load generator, and what it gets back: one JSON line each."""

import json
from typing import Literal

import msgspec

LATE = "no end in time"  # of Result.errors

Kind = Literal["idle", "requests", "streams", "hold", "once"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of work.

    idle: send nothing. requests, streams: a closed loop, as many as `in_flight` at any moment. hold: `in_flight` long
    streams, measured while all of them run. once: `in_flight` streams, each one time.
    """

    kind: Kind
    seconds: float
    in_flight: int = 1
    most: int = 1_000_000  # answers, whatever the time
    chunks: int = 8
    pace_per_s: int = 0  # 0: as fast as it goes
    host: str = "127.0.0.1"
    port: int = 0
    path: str = ""
    key: str = ""
    exact: bool = True  # the answer's bytes must be the upstream's
    reconnect: bool = False  # the server closes after each stream and does not say so
    pids: tuple[int, ...] = ()


class Result(msgspec.Struct, frozen=True, kw_only=True):
    elapsed_s: float
    answers: int = 0
    errors: dict[str, int] = {}
    events: int = 0  # SSE events received
    latency_ms: list[float] = []  # p50, p99 until the last byte
    ttft_ms: list[float] = []  # p50, p99 until the first event
    stretch_p95: float = 0.0  # how much longer than their pace the slowest streams took: 1.0 is in time
    cpu_s: float | None = None
    rss_mb: float | None = None  # at the end
    rss_peak_mb: float | None = None


def encode(message: Job | Result) -> str:
    return msgspec.json.encode(message).decode()


def decode_job(line: str) -> Job:
    return msgspec.json.decode(line, type=Job)


def decode_result(line: str) -> Result:
    return msgspec.json.decode(line, type=Result)


def pretty(value: object) -> str:
    return json.dumps(msgspec.to_builtins(value), indent=1, ensure_ascii=False)
