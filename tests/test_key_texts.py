"""Limits and tables as people read them."""

import pytest

from gateway.limits import Budget, Limits
from key_texts import limits_text, short_time, table

LIMITS = {
    "none": (Limits(), ""),
    "nothing allowed": (Limits(rpm=0, concurrency=0), "0 rpm, 0 at once"),
    "plain": (Limits(rpm=60, tpm=1234), "60 rpm, 1234 tpm"),
    "thousands and millions": (Limits(rpm=1000, tpm=2_500_000, concurrency=3_000_000), "1k rpm, 2500k tpm, 3M at once"),
    "a rate": (Limits(rps=0.5), "0.5 rps"),
    "a rate with a burst": (Limits(rps=2, burst=10), "2 rps (burst 10)"),
    "budgets": (
        Limits(budgets=(Budget("month", tokens=5_000_000), Budget("day", money=2.5), Budget("total", money=0.005))),
        "5M tokens/month, 2.50 EUR/day, 0.005 EUR in total",
    ),
    "empty budgets": (
        Limits(budgets=(Budget("week", tokens=0), Budget("week", money=0))),
        "0 tokens/week, 0.00 EUR/week",
    ),
}


@pytest.mark.parametrize(("limits", "text"), LIMITS.values(), ids=LIMITS)
def test_limits(limits: Limits, text: str) -> None:
    assert limits_text(limits, "EUR") == text


TABLES = {
    "heads alone": ([("A", "B")], ["A  B"]),
    "columns are as wide as their widest": (
        [("A", "B", "C"), ("long", "1", "x"), ("b", "22", "")],
        ["A     B   C", "long  1   x", "b     22"],
    ),
    "a column of nothing is left out": ([("A", "B", "C"), ("1", "-", "2"), ("3", "-", "-")], ["A  C", "1  2", "3  -"]),
}


@pytest.mark.parametrize(("rows", "lines"), TABLES.values(), ids=TABLES)
def test_tables(rows: list[tuple[str, ...]], lines: list[str]) -> None:
    assert table(rows).splitlines() == lines


def test_times() -> None:
    assert short_time("2027-02-01T00:00:59.999Z") == "2027-02-01 00:00Z"
    assert short_time(None) == ""
