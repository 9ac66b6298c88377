"""What users say in conversations like a coding agent's: from a seed, the same for every arrangement of servers."""

import random
from dataclasses import dataclass, field

from llama.make_gguf import WORDS

ANSWER_TOKENS = 40
MODEL = "agent"

type Message = dict[str, str]


@dataclass(frozen=True)
class Workload:
    """Lengths in words, which are about as many tokens of the generated model."""

    system_words: int
    first_words: int
    later_words: tuple[int, int]  # from, to
    in_flight: int  # requests at any moment


# a: much is read at the beginning and little is added. b: the prompt grows with each turn, on twice the users.
WORKLOADS = {
    "a": Workload(system_words=400, first_words=1200, later_words=(20, 60), in_flight=4),
    "b": Workload(system_words=400, first_words=400, later_words=(150, 500), in_flight=8),
}


@dataclass
class Conversation:
    """One user's side, and what has been said up to now."""

    number: int
    says: tuple[str, ...]  # one text for each turn
    messages: list[Message]  # begins with the system prompt
    turn: int = 0  # the next one, from 0
    seed: int = field(kw_only=True)

    @property
    def is_over(self) -> bool:
        return self.turn == len(self.says)

    def body(self) -> dict[str, object]:
        """The request of this turn: an answer of exactly ANSWER_TOKENS tokens, the same from every server."""
        return {
            "model": MODEL,
            "messages": [*self.messages, _user(self.says[self.turn])],
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
            "seed": self.seed + self.turn,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def answered(self, text: str) -> None:
        self.messages += [_user(self.says[self.turn]), {"role": "assistant", "content": text}]
        self.turn += 1


def conversations(workload: Workload, count: int, turns: int, seed: int) -> list[Conversation]:
    """They share the system prompt and nothing else."""
    chance = random.Random(seed)
    system = {"role": "system", "content": _text(chance, workload.system_words)}
    made = []
    for number in range(count):
        lengths = [workload.first_words, *(chance.randint(*workload.later_words) for _ in range(turns - 1))]
        says = tuple(_text(chance, length) for length in lengths)
        made.append(Conversation(number, says, [system], seed=chance.randrange(1 << 30)))
    return made


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))
