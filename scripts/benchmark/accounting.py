"""What a process and its children cost, from the kernel's own books (Linux)."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_CPUCLOCK_SCHED = 2  # linux/posix-timers.h: the exact run time, not the 10 ms ticks of /proc/PID/stat


def tree(root: int) -> list[int]:
    """The process and all that descend from it."""
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found.extend(int(child) for child in children.read_text().split())
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """User and system time of all their threads, ended ones too. Raises OSError when one is gone."""
    return sum(time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED) for pid in pids) / 1e9


def rss_mb(pids: Iterable[int]) -> float:
    """Resident memory, in MB of 1,000,000 bytes."""
    pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return sum(pages) * _PAGE_BYTES / 1e6
