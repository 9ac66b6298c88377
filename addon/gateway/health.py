"""Whether a server may be sent to: what probes say of it, and what became of the requests that it got.

A probe, or a connection that is refused, tells whether a server is there. Requests that fail one after the other eject
it for a while, longer each time, and a server may ask for a pause itself (Retry-After). After either, one request is
let through as a trial, and its end decides. Times are seconds of a monotonic clock, passed in.
"""

from collections.abc import Callable

from gateway.settings import Health as HealthConfig

# state before, state now, why
OnChange = Callable[[str, str, str | None], None]


class Health:
    """One server's health. `state`: unknown, up, loading, down; or paused, ejected while it is left alone."""

    def __init__(self, config: HealthConfig, on_change: OnChange = lambda before, now, why: None) -> None:
        self.on_change = on_change
        self.reopens_at = 0.0  # when a paused or ejected server gets its trial
        self.reason: str | None = None  # why it is in its state
        self.refuses = False  # it is down because nothing listens there: asking it costs nothing
        self._config = config
        self._reached = "unknown"
        self._left_alone: str | None = None  # paused, ejected
        self._left_alone_at = 0.0
        self._on_trial = False
        self._trials = 0
        self._probes_ok = 0
        self._probes_failed = 0
        self._failures = 0
        self._ejections = 0

    def reconfigure(self, config: HealthConfig) -> None:
        self._config = config

    @property
    def state(self) -> str:
        return self._left_alone if self._left_alone and self.is_reachable else self._reached

    @property
    def is_reachable(self) -> bool:
        """Not known to be down or loading. It may be left alone for now all the same."""
        return self._reached in ("up", "unknown")

    @property
    def is_ejected(self) -> bool:
        return self.state == "ejected"

    def may_take(self, now: float) -> bool:
        """Whether a request may be sent to it."""
        return self.is_reachable and (not self._left_alone or (now >= self.reopens_at and not self._on_trial))

    def begin_trial(self, now: float) -> int | None:
        """A request is about to be sent: is it the trial that decides? Its number, for `end_trial`; None: it is not."""
        if not self._left_alone or self._on_trial or now < self.reopens_at:
            return None
        self._on_trial = True
        self._trials += 1
        return self._trials

    def end_trial(self, trial: int) -> None:
        """The trial has ended; undecided, the next request is one. An older one's end says nothing any more."""
        self._on_trial = self._on_trial and trial != self._trials

    def probe_ok(self, now: float) -> None:
        self._probes_failed = 0
        self._probes_ok += 1
        if self._reached == "down" and self._probes_ok < self._config.up_after:
            return
        why = None if self._reached in ("up", "unknown") else "answers its probe again"
        came_back = self._reached in ("down", "loading")
        before, self._reached, self.refuses = self.state, "up", False
        if came_back and self._left_alone == "ejected":  # another process, most likely: what the old one did is over
            self._readmit()
        self._tell(before, why)

    def probe_loading(self, now: float, reason: str) -> None:
        """It is there and will be ready: it loads its model."""
        self._probes_ok = self._probes_failed = 0
        self._reach("loading", reason)

    def probe_failed(self, now: float, reason: str, *, refuses: bool = False) -> None:
        """`refuses`: nothing listens there."""
        self._probes_ok = 0
        self._probes_failed += 1
        if self._reached in ("unknown", "loading", "down") or self._probes_failed >= self._config.down_after:
            self._reach("down", reason)
            self.refuses = refuses

    def refused(self, now: float, reason: str) -> None:
        """A request's connection was refused. No threshold: nothing listens there."""
        self._probes_ok = 0
        self._reach("down", reason)
        self.refuses = True

    def failed(self, now: float, reason: str) -> None:
        """A request failed that was no mistake of its client's."""
        self._failures += 1
        was_on_its_way = self._left_alone is not None and now < self.reopens_at
        if was_on_its_way or (not self._on_trial and self._failures < self._config.eject_after):
            return
        pause = min(self._config.eject_s * 2**self._ejections, self._config.max_eject_s)
        self._ejections = min(self._ejections + 1, 30)
        self._leave_alone("ejected", now, now + pause, f"{reason}; left alone for {pause:g} s")

    def asked_to_wait(self, now: float, seconds: float) -> None:
        """It asked for a pause (Retry-After)."""
        if now + seconds > self.reopens_at:
            self._leave_alone("paused", now, now + seconds, f"asked for a pause of {seconds:g} s")

    def succeeded(self, sent: float) -> None:
        """A request got its answer. `sent`: when it was sent; one from before the pause does not end the pause."""
        self._failures = 0
        if self._left_alone and sent >= self._left_alone_at:
            before = self.state
            self._readmit()
            self._tell(before, "answers requests again")

    def _readmit(self) -> None:
        self._left_alone, self._on_trial, self.reopens_at = None, False, 0.0
        self._failures = self._ejections = 0

    def _leave_alone(self, state: str, now: float, until: float, why: str) -> None:
        before = self.state
        self._left_alone, self._left_alone_at, self.reopens_at, self._on_trial = state, now, until, False
        self._tell(before, why)

    def _reach(self, reached: str, why: str | None) -> None:
        before, self._reached, self.refuses = self.state, reached, False
        self._tell(before, why)

    def _tell(self, before: str, why: str | None) -> None:
        if before != self.state:
            self.reason = why
            self.on_change(before, self.state, why)
