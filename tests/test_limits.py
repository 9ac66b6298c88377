"""The records of limits: what is taken, what is refused and how, and the periods of budgets."""

from datetime import UTC, datetime

import pytest

from gateway.limits import Budget, Limits, Problem, check, period_end, period_of, rules, to_micros

GOOD: dict[str, Limits] = {
    "none": Limits(),
    "nothing allowed": Limits(rpm=0, rps=0, tpm=0, concurrency=0, budgets=(Budget("day", tokens=0),)),
    "all": Limits(5, 0.5, 3, 1000, 2, (Budget("month", tokens=5), Budget("month", money=2.5), Budget("day", money=1))),
}

BAD: dict[str, tuple[Limits, str]] = {
    "negative": (Limits(rpm=-1), "rpm"),
    "too large": (Limits(tpm=10**13), "tpm"),
    "no number": (Limits(rps=float("nan")), "rps"),
    "a burst of nothing": (Limits(burst=3), "burst"),
    "no period": (Limits(budgets=(Budget("year", tokens=1),)), "budgets[0].per"),
    "neither": (Limits(budgets=(Budget("day"),)), "budgets[0]"),
    "both": (Limits(budgets=(Budget("day", tokens=1, money=1),)), "budgets[0]"),
    "twice": (Limits(budgets=(Budget("day", tokens=1), Budget("day", tokens=2))), "budgets[1]"),
    "negative money": (Limits(budgets=(Budget("day", money=-0.01),)), "budgets[0].money"),
    "less money than there is": (Limits(budgets=(Budget("day", money=1e-7),)), "budgets[0].money"),
    "endless money": (Limits(budgets=(Budget("day", money=float("inf")),)), "budgets[0].money"),
}


@pytest.mark.parametrize("limits", GOOD.values(), ids=GOOD)
def test_good(limits: Limits) -> None:
    check(limits)


@pytest.mark.parametrize(("limits", "field"), BAD.values(), ids=BAD)
def test_bad(limits: Limits, field: str) -> None:
    with pytest.raises(Problem) as caught:
        check(limits)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: expected ")


def test_what_is_left_out_comes_from_the_default() -> None:
    default = Limits(rpm=60, tpm=1000, budgets=(Budget("day", tokens=5),))
    assert Limits(rpm=0).over(default) == Limits(rpm=0, tpm=1000, budgets=(Budget("day", tokens=5),))
    assert Limits().over(default) is default


def test_only_what_limits_is_a_rule() -> None:
    assert [rule.scope for rule in rules(("key:1", Limits()), ("all", Limits(rpm=0)))] == ["all"]


# 2026-11-21 is a Saturday.
PERIODS: dict[str, tuple[str, str, datetime | None]] = {
    "day": ("2026-11-21", "2026-11-21", datetime(2026, 11, 22, tzinfo=UTC)),
    "week": ("2026-11-21", "2026-11-16", datetime(2026, 11, 23, tzinfo=UTC)),
    "month": ("2026-12-31", "2026-12-01", datetime(2027, 1, 1, tzinfo=UTC)),
    "total": ("2026-11-21", "", None),
}


@pytest.mark.parametrize("per", PERIODS)
def test_periods(per: str) -> None:
    day, begin, end = PERIODS[per]
    assert (period_of(day, per), period_end(day, per)) == (begin, end)


@pytest.mark.parametrize(("money", "micros"), [(0.1, 100_000), (2.5, 2_500_000), (0.0000005, 0), (1e6, 10**12)])
def test_money(money: float, micros: int) -> None:
    assert to_micros(money) == micros
