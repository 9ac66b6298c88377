"""Names of models as config and keys write them: exact, with wildcards (* and ?), or /a regular expression/, anchored.

Clients choose the names that these are matched against. RE2 matches in linear time: no name can stop the event loop.
"""

from collections.abc import Mapping

import re2


class Pattern:
    """One such name. Raises ValueError for a broken regular expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        is_expression = len(text) > 1 and text.startswith("/") and text.endswith("/")
        self.is_exact = not is_expression and "*" not in text and "?" not in text
        self._compiled = None if self.is_exact else _compiled(text, is_expression)

    def matches(self, name: str) -> bool:
        return name == self.text if self._compiled is None else self._compiled.fullmatch(name) is not None

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"


class ByModel[T]:
    """What is said of models by name or pattern: exact names win, then patterns in their order."""

    def __init__(self, said: Mapping[str, T]) -> None:
        self._said = said
        patterns = [Pattern(name) for name in said]
        self._patterns = sorted(patterns, key=lambda pattern: not pattern.is_exact)
        self._known: dict[str, T | None] = {}

    def of(self, model: str | None) -> T | None:
        """`model`: as its servers name it. None: nothing is said of it."""
        if model is None:
            return None
        if model not in self._known:
            found = next((pattern.text for pattern in self._patterns if pattern.matches(model)), None)
            self._known[model] = None if found is None else self._said[found]
        return self._known[model]


def _compiled(text: str, is_expression: bool) -> "re2._Regexp":
    plain = text[1:-1] if is_expression else "(?s)" + re2.escape(text).replace(r"\*", ".*").replace(r"\?", ".")
    try:
        return re2.compile(plain, _quiet())
    except re2.error as error:
        raise ValueError(f"{text!r} is no regular expression (RE2's syntax): {_reason(error)}") from None


def _quiet() -> "re2.Options":
    options = re2.Options()
    options.log_errors = False
    return options


def _reason(error: Exception) -> str:
    reason = error.args[0] if error.args else error
    return reason.decode() if isinstance(reason, bytes) else str(reason)
