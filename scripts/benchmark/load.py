"""The load generator: a process that reads a job per line on standard input and prints its result as a line.

It also reads the CPU time and memory of the processes under test, at the very moments when the measured work begins and
ends, so that neither start-up nor the way to another process counts.
"""

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from time import perf_counter

import uvloop

from benchmark import accounting
from benchmark.caller import Caller, Tally
from benchmark.work import LATE, Job, Result, decode_job, encode

_GRACE_S = 10.0  # for what is under way when the time is up
_WARM_UP = 2  # answers per connection before the clock starts
_WARM_UP_S = 20.0
_SPREAD_S = 0.8  # over which the streams of `hold` and `once` begin
_SETTLE_S = 0.2
_MEMORY_EVERY_S = 0.2
_GOLDEN_RATIO = 0.618034  # its multiples' fractions lie evenly, however many


class Meter:
    """What the processes under test cost between start and stop."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.elapsed_s = 0.0
        self.cpu_s = 0.0
        self.rss_peak_mb = 0.0
        self._pids = pids
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watch = asyncio.create_task(self._watch_memory())
        self.cpu_s = -accounting.cpu_s(self._pids)
        self.elapsed_s = -perf_counter()

    def stop(self) -> None:
        self.elapsed_s += perf_counter()
        self.cpu_s += accounting.cpu_s(self._pids)
        if self._watch is not None:
            self._watch.cancel()

    async def _watch_memory(self) -> None:
        while self._pids:
            self.rss_peak_mb = max(self.rss_peak_mb, accounting.rss_mb(self._pids))
            await asyncio.sleep(_MEMORY_EVERY_S)


async def idle(job: Job, meter: Meter, tally: Tally, callers: Sequence[Caller]) -> None:
    """Sends nothing."""
    meter.start()
    await asyncio.sleep(job.seconds)
    meter.stop()


async def loop(job: Job, meter: Meter, tally: Tally, callers: Sequence[Caller]) -> None:
    """Keeps `in_flight` requests or streams under way for so many seconds or so many answers."""
    length_s = job.chunks / job.pace_per_s if job.pace_per_s else 0.0
    tally.allow(len(callers) * (1 if length_s else _WARM_UP), _WARM_UP_S)
    await end(begin(job, callers), tally, _WARM_UP_S + _GRACE_S)
    tally.clear()
    meter.start()
    tally.allow(job.most, job.seconds + length_s)
    await end(begin(job, callers, spread_s=length_s), tally, job.seconds + 2 * length_s + _GRACE_S)
    meter.stop()


async def hold(job: Job, meter: Meter, tally: Tally, callers: Sequence[Caller]) -> None:
    """Streams that are all under way while the meter runs: the cost of chunks alone."""
    tally.allow(len(callers), _WARM_UP_S)
    streams = begin(job, callers, spread_s=_SPREAD_S)
    await asyncio.sleep(_SPREAD_S + _SETTLE_S)
    before = tally.events
    meter.start()
    await asyncio.sleep(job.seconds)
    meter.stop()
    events = tally.events - before
    await end(streams, tally, job.chunks / job.pace_per_s + _GRACE_S)
    tally.events = events


async def once(job: Job, meter: Meter, tally: Tally, callers: Sequence[Caller]) -> None:
    """So many paced streams, each one time, given no longer than `seconds`: does their pace hold?"""
    tally.allow(len(callers), job.seconds)
    meter.start()
    await end(begin(job, callers, spread_s=_SPREAD_S), tally, job.seconds)
    meter.stop()


KINDS = {"idle": idle, "requests": loop, "streams": loop, "hold": hold, "once": once}


def begin(job: Job, callers: Sequence[Caller], spread_s: float = 0.0) -> list[asyncio.Task[None]]:
    """Starts them evenly over the time, each at another moment of the chunks' interval, so that no burst forms."""
    interval_s = 1 / job.pace_per_s if job.pace_per_s else 0.0
    delays_s = [spread_s * at / len(callers) + interval_s * (at * _GOLDEN_RATIO % 1) for at in range(len(callers))]
    return [asyncio.create_task(caller.run(delay_s)) for caller, delay_s in zip(callers, delays_s, strict=True)]


async def end(tasks: Sequence[asyncio.Task[None]], tally: Tally, seconds: float) -> None:
    """Waits for them; those that are not done in time are cut and counted."""
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
        tally.errors[LATE] += 1
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()):
            tally.errors[f"the load generator: {error!r}"] += 1


async def do(job: Job) -> Result:
    tally, meter = Tally(), Meter(job.pids)
    callers = [Caller(job, tally) for _ in range(job.in_flight)]
    try:
        await KINDS[job.kind](job, meter, tally, callers)
        return result(job, meter, tally)
    except OSError as error:
        return Result(elapsed_s=0.0, errors={f"the measured process is gone: {error}": 1})
    finally:
        for caller in callers:
            caller.close()


def result(job: Job, meter: Meter, tally: Tally) -> Result:
    # A stream's first chunk comes at once, each next one an interval later, finish and [DONE] as one.
    length_s = job.chunks / job.pace_per_s if job.pace_per_s else 0.0
    return Result(
        elapsed_s=meter.elapsed_s,
        answers=len(tally.samples),
        errors=dict(tally.errors),
        events=tally.events,
        latency_ms=p50_p99_ms([sample.latency_s for sample in tally.samples]),
        ttft_ms=p50_p99_ms([sample.ttft_s for sample in tally.samples]),
        stretch_p95=percentile([sample.from_first_s / length_s for sample in tally.samples], 0.95) if length_s else 0.0,
        cpu_s=meter.cpu_s if job.pids else None,
        rss_mb=accounting.rss_mb(job.pids) if job.pids else None,
        rss_peak_mb=meter.rss_peak_mb if job.pids else None,
    )


def p50_p99_ms(seconds: list[float]) -> list[float]:
    return [percentile(seconds, 0.5) * 1e3, percentile(seconds, 0.99) * 1e3] if seconds else []


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def serve() -> None:
    running = asyncio.get_running_loop()
    while line := await running.run_in_executor(None, sys.stdin.readline):
        print(encode(await do(decode_job(line))), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve())
