"""What may be used: rates, tokens, concurrency and budgets, as records. Left out: no limit. 0: nothing is allowed."""

import functools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import msgspec

PERIODS = ("day", "week", "month", "total")
# Rates are counted over this long.
WINDOW_S = 60.0
MICRO = 1_000_000
# More than any team uses, and still exact as SQLite's and Lua's numbers.
MAX_AMOUNT = 1_000_000_000_000
# A request in three hours.
MIN_RPS = 0.0001


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An amount per `per` (one of PERIODS; days, weeks from Monday and months of UTC): tokens, or money in the currency
    of the prices. One of the two is given.
    """

    per: str
    tokens: int | None = None
    money: float | None = None

    @property
    def unit(self) -> str:
        return "tokens" if self.tokens is not None else "money"

    @property
    def amount(self) -> int:
        """Tokens, or micro-units of money."""
        return self.tokens if self.tokens is not None else to_micros(self.money or 0)


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a key, a team, a model or all together may use.

    `rpm`: requests in any 60 seconds. `rps`: requests a second, evenly, with `burst` at once (None: `rps`, rounded up).
    `tpm`: tokens in any 60 seconds, of prompts and answers. `concurrency`: requests at once.
    """

    rpm: int | None = None
    rps: float | None = None
    burst: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    budgets: tuple[Budget, ...] = ()

    def __bool__(self) -> bool:
        return self != NONE

    def over(self, default: "Limits") -> "Limits":
        """These limits; what they leave out comes from `default`."""
        given = {name: getattr(self, name) for name in self.__struct_fields__ if getattr(self, name) not in (None, ())}
        return msgspec.structs.replace(default, **given) if given else default


NONE = Limits()


class Problem(ValueError):
    """A field holds what it must not: `field` as in `budgets[0].per`, `str` is the field and what was expected."""

    def __init__(self, field: str, expected: str, got: object) -> None:
        super().__init__(f"{field}: expected {expected}, got {got!r}")
        self.field = field


def check(limits: Limits) -> None:
    """What types can't say. Raises Problem."""
    for name in ("rpm", "tpm", "concurrency", "burst"):
        value = getattr(limits, name)
        if value is not None and not 0 <= value <= MAX_AMOUNT:
            raise Problem(name, "a whole number, 0 (nothing) or more", value)
    # Not a number is not either.
    if limits.rps is not None and limits.rps != 0 and not MIN_RPS <= limits.rps <= MAX_AMOUNT:
        raise Problem("rps", f"0 (nothing), or a number from {MIN_RPS:g}", limits.rps)
    if limits.burst is not None and limits.rps is None:
        raise Problem("burst", "an rps beside it", limits.burst)
    seen = set()
    for index, budget in enumerate(limits.budgets):
        at = f"budgets[{index}]"
        if budget.per not in PERIODS:
            raise Problem(f"{at}.per", f"one of {', '.join(PERIODS)}", budget.per)
        if (budget.tokens is None) == (budget.money is None):
            raise Problem(at, "either tokens or money", msgspec.to_builtins(budget))
        if budget.tokens is not None and not 0 <= budget.tokens <= MAX_AMOUNT:
            raise Problem(f"{at}.tokens", "a whole number, 0 (nothing) or more", budget.tokens)
        if budget.money is not None and not (budget.money == 0 or 1 / MICRO <= budget.money <= MAX_AMOUNT / MICRO):
            raise Problem(f"{at}.money", "0 (nothing), or a number from 0.000001 to 1,000,000", budget.money)
        if (budget.per, budget.unit) in seen:
            raise Problem(at, "each period and unit once", f"{budget.unit} per {budget.per}")
        seen.add((budget.per, budget.unit))


def to_micros(money: float) -> int:
    """Money as it is written -> whole micro-units."""
    return round(Decimal(str(money)) * MICRO)


@functools.lru_cache(maxsize=64)
def period_of(day: str, per: str) -> str:
    """The first day of the period that a day (2026-11-21) is in. "" of `total`."""
    if per == "total":
        return ""
    if per == "month":
        return f"{day[:7]}-01"
    moment = datetime.fromisoformat(day)
    return day if per == "day" else (moment - timedelta(days=moment.weekday())).date().isoformat()


@functools.lru_cache(maxsize=64)
def period_end(day: str, per: str) -> datetime | None:
    """When the period that a day is in is over, UTC. None: never."""
    if per == "total":
        return None
    begin = datetime.fromisoformat(period_of(day, per)).replace(tzinfo=UTC)
    if per == "month":
        return (begin + timedelta(days=32)).replace(day=1)
    return begin + timedelta(days=7 if per == "week" else 1)


class Rule(msgspec.Struct, frozen=True):
    """Limits, and whose they are: `scope` names the counters ("key:3", "team:research", "model:qwen3-8b", "all")."""

    scope: str
    limits: Limits

    @property
    def kind(self) -> str:
        return self.scope.partition(":")[0]


def rules(*named: tuple[str, Limits]) -> Iterator[Rule]:
    """Those that limit anything."""
    return (Rule(scope, limits) for scope, limits in named if limits)
