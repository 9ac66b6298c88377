"""What a tally makes of reports: of the whole answer, of choices at their end, and of choices on the way."""

from collections import Counter

import pytest

from gateway.tally import Tally, Tokens, add

type Report = tuple[Tokens, str, int | None, bool]  # tokens, source, choice, final

REPORTS: dict[str, tuple[list[Report], int, int, tuple[Tokens, str | None]]] = {
    "nothing": ([], 1, 0, (Tokens(), None)),
    "only deltas": ([], 1, 3, (Tokens(completion=3), "counted")),
    "deltas beside a count": ([(Tokens(5, 1, 2), "usage", None, True)], 1, 3, (Tokens(5, 1, 2), "usage")),
    "zero was measured": ([(Tokens(5, 0, 0), "usage", None, True)], 1, 3, (Tokens(5, 0, 0), "usage")),
    "a prompt, then deltas": ([(Tokens(5, 1), "usage", None, False)], 1, 3, (Tokens(5, 1, 3), "counted")),
    "the last word counts": (
        [(Tokens(5, 0, 1), "usage", None, True), (Tokens(5, 0, 2), "usage", None, True)],
        1,
        0,
        (Tokens(5, 0, 2), "usage"),
    ),
    "a choice on the way": (
        [(Tokens(5, 0, 1), "timings", 0, False), (Tokens(5, 0, 2), "timings", 0, False)],
        1,
        2,
        (Tokens(5, 0, 2), "timings"),
    ),
    "a choice on the way, then at its end": (
        [(Tokens(5, 0, 1), "timings", 0, False), (Tokens(5, 0, 2), "timings", 0, True)],
        1,
        2,
        (Tokens(5, 0, 2), "timings"),
    ),
    "choices of one prompt share it": (
        [(Tokens(5, 4, 1), "timings", 0, True), (Tokens(5, 4, 2), "timings", 1, False)],
        1,
        0,
        (Tokens(5, 4, 3), "timings"),
    ),
    "choices of several prompts": (
        [(Tokens(5, 4, 1), "usage", 0, True), (Tokens(7, 0, 2), "usage", 1, True)],
        2,
        0,
        (Tokens(12, 4, 3), "usage"),
    ),
    "a total beats its choices": (
        [(Tokens(5, 0, 1), "usage", 0, False), (Tokens(5, 0, 9), "usage", None, True)],
        1,
        0,
        (Tokens(5, 0, 9), "usage"),
    ),
    "usage beats timings as a source": (
        [(Tokens(5, 0, 1), "usage", 0, True), (Tokens(5, 0, 2), "timings", 1, True)],
        1,
        0,
        (Tokens(5, 0, 3), "usage"),
    ),
}


@pytest.mark.parametrize(("reports", "prompts", "deltas", "expected"), REPORTS.values(), ids=REPORTS)
def test_tokens(reports: list[Report], prompts: int, deltas: int, expected: tuple[Tokens, str | None]) -> None:
    tally = Tally(prompts)
    tally.deltas = Counter({0: deltas} if deltas else {})
    for report in reports:
        tally.report(*report)
    assert tally.tokens() == expected


@pytest.mark.parametrize(
    ("values", "expected"), [([], None), ([None], None), ([0, None], 0), ([1, None, 2], 3)], ids=str
)
def test_add(values: list[int | None], expected: int | None) -> None:
    assert add(values) == expected
