"""What several sources say of one key, where all of them must let it in: no limit of any of them is lost."""

import math
from collections.abc import Iterable, Sequence

from gateway.limits import Budget, Limits
from gateway.sources.chain import Grant


class Conflict(Exception):
    """Two sources contradict each other."""


def team_of(grants: Iterable[Grant]) -> str | None:
    """The team that one of them names. Raises Conflict where they name different ones: their limits can't both hold."""
    teams = {grant.key.team for grant in grants if grant.key.team is not None}
    if len(teams) > 1:
        raise Conflict(f"the sources put one key into different teams: {', '.join(sorted(teams))}")
    return next(iter(teams), None)


def narrowest(grants: Sequence[Grant]) -> Limits:
    """The smallest of each limit, and of the budgets of each period and unit."""
    all_limits = [grant.key.limits for grant in grants]
    if len(all_limits) == 1:
        return all_limits[0]
    budgets: dict[tuple[str, str], Budget] = {}
    for budget in (each for limits in all_limits for each in limits.budgets):
        known = budgets.setdefault((budget.per, budget.unit), budget)
        if budget.amount < known.amount:
            budgets[budget.per, budget.unit] = budget
    rates = [limits for limits in all_limits if limits.rps is not None]
    return Limits(
        rpm=_least(limits.rpm for limits in all_limits),
        tpm=_least(limits.tpm for limits in all_limits),
        concurrency=_least(limits.concurrency for limits in all_limits),
        rps=min((limits.rps for limits in rates if limits.rps is not None), default=None),
        burst=min(map(_burst, rates), default=None),
        budgets=tuple(budgets.values()),
    )


def _burst(limits: Limits) -> int:
    return limits.burst if limits.burst is not None else math.ceil(limits.rps or 0)


def _least(values: Iterable[int | None]) -> int | None:
    return min((value for value in values if value is not None), default=None)
