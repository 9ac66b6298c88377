"""What a caller is told of itself, and of no other: its use by day and model, its limits and budgets, what is left."""

import re
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import Any, Protocol
from urllib.parse import parse_qs

import msgspec

from gateway.auth import Caller
from gateway.books import Books, BooksUnavailable
from gateway.limit_use import BudgetUse, LimitUse, budget_use, cost, limit_use
from gateway.limits import Rule
from gateway.prices import Prices
from gateway.quota import CountersUnavailable, Standing
from gateway.replies import Refusal
from gateway.schema import NONE

DEFAULT_DAYS = 31
MAX_DAYS = 366

# One look-up by primary key for each day, so that it costs the same however many keys there are.
BY_DAY = """
with recursive days(day) as (
  select ? union all select date(day, '+1 day') from days where day < ?
)
select day, model, sum(requests - iif({ours}, ok, 0)) as requests, sum(prompt_tokens) as prompt_tokens,
  sum(cached_tokens) as cached_tokens,
  sum(completion_tokens) as completion_tokens, sum(cost_micros) as cost_micros
from days cross join usage_daily using (day)
where key_id = ? and key_name = ?
group by day, model having sum(requests - iif({ours}, ok, 0)) > 0 order by day, model
""".format(ours=f"(model = '{NONE}' and server = '{NONE}')")


class Whose(msgspec.Struct, frozen=True):
    """The caller."""

    name: str
    team: str | None


class DayUse(msgspec.Struct, frozen=True):
    """What was used of a model in a day of UTC. `model` None: refused before it was known. `cost` None: it has no
    price.

    What the gateway answers by itself (lists of models, this very question) is no use.
    """

    day: str
    model: str | None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: float | None


class Usage(msgspec.Struct, frozen=True, tag_field="object", tag="usage"):
    """The answer to GET /v1/usage."""

    key: Whose
    currency: str
    limits: list[LimitUse]
    budgets: list[BudgetUse]
    days: list[DayUse]


class Limiter(Protocol):
    async def standings(self, rules: Sequence[Rule], /) -> tuple[Standing, ...]: ...


class SelfService:
    """Answers callers. `utc_now` returns the time as UTC ISO 8601."""

    def __init__(self, books: Books, limiter: Limiter, utc_now: Callable[[], str]) -> None:
        self._books = books
        self._limiter = limiter
        self._utc_now = utc_now

    async def usage(self, caller: Caller, rules: Sequence[Rule], query: str, prices: Prices) -> Usage:
        """`rules`: what limits the caller. `query`: the URL's, `days=N` or nothing. Raises Refusal (400, 503)."""
        days, today = _days_of(query), self._utc_now()[:10]
        standings = await self._standings(rules)
        return Usage(
            key=Whose(caller.key_name, caller.team),
            currency=prices.currency,
            limits=[limit_use(each, _name(each, caller)) for each in standings if each.limit != "budget"],
            budgets=[budget_use(each, _name(each, caller), today) for each in standings if each.limit == "budget"],
            days=await self._by_day(caller, days, today, prices),
        )

    async def _standings(self, rules: Sequence[Rule]) -> tuple[Standing, ...]:
        try:
            return await self._limiter.standings(rules)
        except CountersUnavailable as error:
            raise _unavailable("limits_unavailable", "Limits can't be read at the moment.") from error

    async def _by_day(self, caller: Caller, days: int, today: str, prices: Prices) -> list[DayUse]:
        first = date.fromisoformat(today) - timedelta(days=days - 1)
        try:
            # The roll-ups know no NULL: a key of another source than keys.db has 0 for its id.
            rows = await self._books.ask(BY_DAY, [first.isoformat(), today, caller.key_id or 0, caller.key_name])
        except BooksUnavailable as error:
            raise _unavailable("ledger_unavailable", "Use can't be read at the moment.") from error
        return [_day(row, prices) for row in rows]


def _unavailable(code: str, message: str) -> Refusal:
    return Refusal(503, code, message, headers={"retry-after": "5"})


def _days_of(query: str) -> int:
    parameters = parse_qs(query, keep_blank_values=True)
    unknown = next((name for name in parameters if name != "days"), None)
    if unknown is not None:
        message = f"{unknown[:200]}: unknown parameter. There is: days."
        raise Refusal(400, "invalid_request", message, param=unknown[:200])
    given = parameters.get("days", [str(DEFAULT_DAYS)])
    if len(given) > 1 or not re.fullmatch("[0-9]{1,3}", given[0]) or not 1 <= int(given[0]) <= MAX_DAYS:
        raise Refusal(400, "invalid_request", f"days: expected a whole number from 1 to {MAX_DAYS}.", param="days")
    return int(given[0])


def _day(row: dict[str, Any], prices: Prices) -> DayUse:
    model = None if row["model"] == NONE else row["model"]
    return DayUse(
        day=row["day"],
        model=model,
        requests=row["requests"],
        prompt_tokens=row["prompt_tokens"],
        cached_tokens=row["cached_tokens"],
        completion_tokens=row["completion_tokens"],
        cost=cost(row["cost_micros"], model, prices),
    )


def _name(standing: Standing, caller: Caller) -> str | None:
    """Whose a limit is. A caller knows its key by its name."""
    kind, _, name = standing.scope.partition(":")
    return caller.key_name if kind == "key" else name or None
