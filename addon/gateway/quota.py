"""What is asked of the counters, and what they answer. `accounts` keeps them in usage.db, `shared_accounts` in Redis.

A request is admitted against all its rules at once, or not at all; what it holds from then on is given back when it is
settled, with what it really used in its place.
"""

from typing import Protocol

import msgspec

from gateway.limits import Rule


class CountersUnavailable(Exception):
    """Nobody can tell what is left. Nothing is admitted until somebody can."""


class Ask(msgspec.Struct, frozen=True):
    """A request that wants in. `tokens`, `micros` (of money): what it holds until it is settled.

    `is_bound`: it can't use more than it holds, and is admitted only where that fits; otherwise some must be left.
    """

    id: str
    worker: str
    day: str
    rules: tuple[Rule, ...]
    tokens: int = 0
    micros: int = 0
    is_bound: bool = False


class Standing(msgspec.Struct, frozen=True):
    """How much of a limit is used. `limit`: rpm, rps, tpm, concurrency or budget; `per`, `unit`: of a budget.

    Amounts are requests, tokens or micro-units of money. `held`: by requests that run. `reset_s`: until it is as if
    nothing had been used, provided that what runs has ended; None: never.
    """

    scope: str
    limit: str
    allowed: float
    used: float
    held: float = 0
    reset_s: float | None = 0
    per: str | None = None
    unit: str | None = None


class Denial(msgspec.Struct, frozen=True):
    """The limit that stands in the way. `wait_s`: until it may let this request in; None: it never will."""

    standing: Standing
    wait_s: float | None


class Decision(msgspec.Struct, frozen=True):
    """`denial` None: the request is in. `standings`: of all its limits, with itself counted if it is in."""

    denial: Denial | None
    standings: tuple[Standing, ...] = ()


class Settlement(msgspec.Struct, frozen=True):
    """The end of a request. `tokens`, `micros`: what it used; None: unknown, nothing is booked.

    `scopes`: whose use it is, for budgets now and later: its key's, its team's. `rules`: as it was admitted with; empty
    if it never was. `was_served` False: no server got it, so it costs no request either.
    """

    id: str
    day: str
    scopes: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    tokens: int | None = None
    micros: int | None = None
    was_served: bool = True


class LimitEvent(msgspec.Struct, frozen=True):
    """A row of `limit_events`: a budget was used up to `share` (0.8 or 1)."""

    at: str
    scope: str
    per: str
    unit: str
    share: float
    allowed: int
    used: int


class Accounts(Protocol):
    """The counters. `now`: seconds since 1970, of one clock for all. All of it blocks: it is for threads."""

    def admit(self, ask: Ask, now: float) -> Decision: ...

    def settle(self, settlement: Settlement, now: float) -> list[LimitEvent]: ...

    def standings(self, rules: tuple[Rule, ...], now: float) -> tuple[Standing, ...]: ...
