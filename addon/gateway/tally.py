"""What is known of one answer's tokens, while it comes and when it has ended.

Servers speak of the whole answer, of one choice at its end, or of one choice on the way; a tally keeps these
apart, so that nothing is counted twice and nothing is lost when an answer is cut. What nobody reported is None.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated

import msgspec

# SQLite's integers and every client's JSON numbers hold this; a larger "count" is no count.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Millis = Annotated[float, msgspec.Meta(ge=0, le=1e10)]


class Tokens(msgspec.Struct):
    """Tokens of one choice, or of the whole answer. `prompt` includes `cached`. None: not reported."""

    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None
    reasoning: int | None = None


class Tally:
    """What was learned of one answer so far. `prompts` and `answers`: how many the request asked for."""

    def __init__(self, prompts: int = 1, answers: int = 1) -> None:
        self.prompts = prompts
        self.answers = answers
        self.deltas: Counter[int] = (
            Counter()
        )  # pieces of content, thinking or tool calls, about a token each, by choice
        self.source: str | None = None
        self.total: Tokens | None = None  # said of the whole answer; the last word wins
        self.finished_choices: dict[int, Tokens] = {}  # said of one choice at its end: these add up
        self.running_choices: dict[int, Tokens] = {}  # said of one choice on the way
        self.last_choice = 0
        self.prompt_ms: float | None = None
        self.predicted_ms: float | None = None
        self.ended_choices: set[int] = set()  # choices that have ended
        self.done = False  # the format's last event was seen: nothing can follow
        self.error: str | None = None  # an error event's code or type
        self.is_broken = False  # reading failed: nothing that is missing here means anything
        self.notes: object = None  # what a format keeps from one event to the next

    @property
    def finished(self) -> bool:
        return self.done or len(self.ended_choices) >= self.answers

    def tokens(self) -> tuple[Tokens, str | None]:
        """The counts, and where they come from: `usage`, `timings`, `counted` (deltas), or None."""
        if self.total is not None:
            if self.total.completion is None and self.deltas:
                return msgspec.structs.replace(self.total, completion=self.deltas.total()), "counted"
            return self.total, self.source
        choices = {**self.running_choices, **self.finished_choices}
        silent = {choice: Tokens(completion=count) for choice, count in self.deltas.items() if choice not in choices}
        return self._sum([*choices.values(), *silent.values()]), "counted" if silent else self.source

    def _sum(self, choices: list[Tokens]) -> Tokens:
        """Choices of one prompt share it (count it once); choices of several prompts each bring their own."""
        if not choices:
            return Tokens()
        shared = max(choices, key=lambda choice: choice.prompt or 0)
        several = self.prompts > 1
        return Tokens(
            prompt=add(choice.prompt for choice in choices) if several else shared.prompt,
            cached=add(choice.cached for choice in choices) if several else shared.cached,
            completion=add(choice.completion for choice in choices),
            reasoning=add(choice.reasoning for choice in choices),
        )

    def report(self, tokens: Tokens, source: str, choice: int | None, final: bool) -> None:
        """Book what the server said: of all (`choice` None), or of one choice, at its end or on the way."""
        if tokens == Tokens():
            return
        if self.source != "usage":
            self.source = source
        if choice is None:
            self.total = tokens
        elif final:
            self.running_choices.pop(choice, None)
            self.finished_choices[choice] = tokens
        else:
            self.running_choices[choice] = tokens

    def time(self, prompt_ms: float | None, predicted_ms: float | None) -> None:
        """The server's own clock. Choices run side by side: the longest is the answer's."""
        if prompt_ms is not None:
            self.prompt_ms = max(self.prompt_ms or 0.0, prompt_ms)
        if predicted_ms is not None:
            self.predicted_ms = max(self.predicted_ms or 0.0, predicted_ms)


def add(values: Iterable[int | None]) -> int | None:
    """The sum of what is known; None when nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
