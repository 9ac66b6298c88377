"""Names of models as config and keys write them: exact, with wildcards (* and ?), or /a regular expression/,
anchored.
"""

import re


class Pattern:
    """One such name. Raises ValueError for a broken regular expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_exact = False
        if len(text) > 1 and text.startswith("/") and text.endswith("/"):
            try:
                self._compiled = re.compile(text[1:-1])
            except re.error as error:
                raise ValueError(f"{text!r} is no regular expression: {error}") from None
        else:
            self.is_exact = "*" not in text and "?" not in text
            self._compiled = re.compile(re.escape(text).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)

    def matches(self, name: str) -> bool:
        return self._compiled.fullmatch(name) is not None

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"
