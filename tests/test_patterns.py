"""Names of models: exact, wildcards, regular expressions; always of the whole name."""

import pytest

from gateway.patterns import Pattern

CASES = [
    ("gpt-4", "gpt-4", True),
    ("gpt-4", "gpt-4o", False),
    ("gpt-4", "GPT-4", False),
    ("gpt.4", "gpt-4", False),
    ("gpt-*", "gpt-", True),
    ("gpt-*", "gpt-4o\nx", True),
    ("gpt-*", "my-gpt-4", False),
    ("*", "", True),
    ("?", "x", True),
    ("?", "", False),
    ("a?c*", "abcdef", True),
    ("[ab]*", "a", False),
    ("[ab]*", "[ab]x", True),
    ("/gpt-[34]/", "gpt-4", True),
    ("/gpt-[34]/", "gpt-4o", False),
    ("/gpt-[34]/", "my gpt-4", False),
    ("/a|b/", "ab", False),
    ("/(?i)gpt/", "GPT", True),
    ("/gpt/", "gpt\n", False),
    ("/", "/", True),
    ("//", "", True),
    ("/org/model", "/org/model", True),
    ("org/model.gguf", "org/model.gguf", True),
]


@pytest.mark.parametrize(("pattern", "name", "expected"), CASES)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert Pattern(pattern).matches(name) is expected


@pytest.mark.parametrize(
    ("pattern", "is_exact"), [("a", True), ("/a", True), ("a*", False), ("a?", False), ("/a/", False)]
)
def test_is_exact(pattern: str, is_exact: bool) -> None:
    assert Pattern(pattern).is_exact is is_exact


def test_a_broken_regular_expression() -> None:
    with pytest.raises(ValueError, match=r"'/\(/' is no regular expression"):
        Pattern("/(/")
