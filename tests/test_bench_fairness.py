"""scripts/bench fairness: its work, its scripted server and its table. No test judges a time."""

import asyncio
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmark.chat import Reply
from benchmark.crowd import USERS, Found, lengths, served_s
from benchmark.fairness import table
from benchmark.load import percentile
from benchmark.slots_upstream import SlotServer

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, 0.0), ([7.0], 0.9, 7.0), ([3.0, 1.0, 2.0], 0.5, 2.0), ([float(n) for n in range(10)], 0.9, 9.0)],
)
def test_percentile(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def test_the_work_of_a_round() -> None:
    made = lengths(seed=5, jobs=60, tokens=1000, spread=0.2, think=0.5, slots=4)
    assert made == lengths(seed=5, jobs=60, tokens=1000, spread=0.2, think=0.5, slots=4)
    assert made != lengths(seed=6, jobs=60, tokens=1000, spread=0.2, think=0.5, slots=4)
    assert len(made.jobs) == 60
    assert all(0 < tokens <= 1000 for tokens in made.jobs[:4])  # they began before
    assert all(800 <= tokens <= 1200 for tokens in made.jobs[4:])
    assert list(made.requests) == list(USERS)
    asked = [one for requests in made.requests.values() for one in requests]
    assert all(0 <= thinks <= 1 and 50 <= tokens <= 100 for thinks, tokens in asked)


def test_a_failed_job_tells_no_time() -> None:
    reply = Reply()
    reply.first_at = 1.0
    reply.fail("cut before the end", now=3.0)
    assert served_s(reply) == 0.0


def test_the_table_of_fairness() -> None:
    fair = Found(unit_s=1.0, waits=[0.1, 0.2, 0.3], all_after=16.0)
    own = Found(unit_s=2.0, waits=[12.0], all_after=15.0, errors=Counter({"user-1: status 503": 2}))
    lines = table({"unbounded": [own], "fair": [fair, fair]}).splitlines()
    assert lines[2].endswith(" | 1 | 12.00 | 12.00 | 12.00 | 2.00 s | 15.0 | 2 |")
    assert lines[3].endswith(" | 6 | 0.20 | 0.30 | 0.30 | 1.00 s | 16.0 | 0 |")


async def test_the_scripted_server_gives_slots_in_order_of_arrival() -> None:
    """Nothing is sent to who waits; the head and the first text come with the slot."""
    server = SlotServer(slots=1)
    order: list[str] = []

    class Writer:
        def __init__(self, name: str) -> None:
            self._name = name

        def write(self, data: bytes) -> None:
            order.append(f"{self._name} {'begins' if data.startswith(b'HTTP') else 'ends'}")

    body = b'{"max_tokens": 1}'
    async with asyncio.TaskGroup() as group:
        for name in ("first", "second", "third"):
            group.create_task(server.work(body, Writer(name)))
    assert order == [f"{name} {what}" for name in ("first", "second", "third") for what in ("begins", "ends")]


def test_a_short_run_prints_the_table() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "fairness", "--quick", "--jobs", "12"]
    done = subprocess.run([*command, "--rows", "direct"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| no gateway |")]
    assert row.endswith(" 0 |")
