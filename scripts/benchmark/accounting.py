"""What a process and its children cost, from the kernel's own books (Linux)."""

import os
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Moment:
    """Readings whose differences tell what the rest of the machine did meanwhile."""

    clock_s: float
    busy_s: float  # of all cores
    stolen_s: float  # by the host of a virtual machine
    own_s: float  # this process and its children that have ended

    def others_share(self, later: "Moment") -> float:
        """Share of the machine that others used, stolen time included."""
        others_s = later.busy_s - self.busy_s + later.stolen_s - self.stolen_s - (later.own_s - self.own_s)
        return max(0.0, others_s / (later.clock_s - self.clock_s) / (os.cpu_count() or 1))


def moment() -> Moment:
    ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(tick) / os.sysconf("SC_CLK_TCK") for tick in ticks)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own_s = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return Moment(time.monotonic(), user + nice + system + irq + softirq, steal, own_s)


def took(began: Moment) -> str:
    """How long it has been since then, and who else was at work."""
    ended = moment()
    others = f"other processes and the host used {began.others_share(ended):.0%} of the machine meanwhile"
    return f"- The run took {ended.clock_s - began.clock_s:.0f} s; {others}."
