"""Standings as people are told them: whose limit it is, what is left of it, and money in units of the currency."""

import msgspec

from gateway.limits import MICRO, period_end
from gateway.prices import Prices
from gateway.quota import Standing


class LimitUse(msgspec.Struct, frozen=True):
    """A limit of the last 60 seconds, or of what runs. `scope`: key, team, model or all; `name`: which of them."""

    scope: str
    name: str | None
    limit: str
    allowed: int | float
    used: int | float
    held: int | float
    left: int | float
    resets_in_s: float | None


class BudgetUse(msgspec.Struct, frozen=True):
    """An amount per period, in tokens or in units of the currency. `resets_at` None: never."""

    scope: str
    name: str | None
    per: str
    unit: str
    allowed: int | float
    used: int | float
    held: int | float
    left: int | float
    resets_at: str | None
    resets_in_s: float | None


def limit_use(standing: Standing, name: str | None) -> LimitUse:
    """`name`: whose it is, within its scope."""
    return LimitUse(
        scope=standing.scope.partition(":")[0],
        name=name,
        limit=standing.limit,
        allowed=_whole(standing.allowed),
        used=_whole(standing.used),
        held=_whole(standing.held),
        left=_whole(_left(standing)),
        resets_in_s=_seconds(standing.reset_s),
    )


def budget_use(standing: Standing, name: str | None, today: str) -> BudgetUse:
    """`today`: the day of UTC, which the period is told by."""
    unit, per = standing.unit or "tokens", standing.per or "total"
    end = period_end(today, per)
    return BudgetUse(
        scope=standing.scope.partition(":")[0],
        name=name,
        per=per,
        unit=unit,
        allowed=_amount(standing.allowed, unit),
        used=_amount(standing.used, unit),
        held=_amount(standing.held, unit),
        left=_amount(_left(standing), unit),
        resets_at=f"{end:%Y-%m-%dT%H:%M:%SZ}" if end else None,
        resets_in_s=_seconds(standing.reset_s),
    )


def cost(micros: int, model: str | None, prices: Prices) -> float | None:
    """Of a sum of the roll-ups, which have no null: nothing was booked, and there is no price, so nobody knows."""
    return None if not micros and prices.of(model) is None else micros / MICRO


def _amount(value: float, unit: str) -> int | float:
    """Micro-units of money as units, tokens as they are."""
    return value / MICRO if unit == "money" else _whole(value)


def _whole(count: float) -> int | float:
    """Requests and tokens are whole numbers, also where the counters know only numbers with a fraction."""
    return int(count) if count == int(count) else count


def _left(standing: Standing) -> float:
    return max(standing.allowed - standing.used - standing.held, 0)


def _seconds(span: float | None) -> float | None:
    return None if span is None else round(span, 1)
