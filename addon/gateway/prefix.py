"""Which server was sent which prompt: a bounded index over the marks of prompts, and homes for new conversations.

The index believes that a server has cached what it was sent last. What servers report afterwards corrects it: one that
had not cached a prompt has lost what it was sent before that prompt, too (caches drop the oldest first, a restart drops
everything), and none of that is believed any more.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence

import msgspec

from gateway.prompts import Mark, Prompt
from gateway.servers import Server

# A report of less than this much of what was expected says that the server had lost it. Templates and tokens make
# shares of bytes and of tokens differ somewhat; a system prompt that many share stays cached in any case.
_LOST_SHARE = 0.5
_SERVER_BITS = 10
_SERVER, _SURE = (1 << _SERVER_BITS) - 1, 1 << _SERVER_BITS


class Match(msgspec.Struct, frozen=True, gc=False):
    """`end`: bytes of the prompt that a server was sent before. `sent`: when, as a count of what was sent.

    `is_sure`: it has answered since. One that still reads has not cached it yet, and has lost nothing.
    """

    end: int
    sent: int
    is_sure: bool


class PrefixIndex:
    """Hash of a mark -> the server that was sent it last. At most `size` marks are kept, those used last."""

    def __init__(self, size: int) -> None:
        self.placed = Placements()
        self._size = size
        self._sent = 0
        # One number for all, to stay small: when it was sent, whether it was answered, and the number of the server.
        self._marks: dict[int, int] = {}
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._unused: list[int] = []  # numbers of servers that are gone
        self._lost: dict[int, int] = {}  # server's number -> what it was sent until then is not believed

    def __len__(self) -> int:
        return len(self._marks)

    def resize(self, size: int) -> None:
        self._size = size

    def forget(self, server: str) -> None:
        """The server is gone. Its number will be another's, who has cached nothing of what this one was sent."""
        self.placed.forget(server)
        if (number := self._numbers.pop(server, None)) is not None:
            self._lost[number] = self._sent
            self._unused.append(number)

    def find(self, prompt: Prompt) -> dict[str, Match]:
        """Server -> the longest beginning of the prompt that it was sent and should still have."""
        found: dict[str, Match] = {}
        for mark in reversed(prompt.marks):
            entry = self._marks.get(mark.hash)
            if entry is None:
                continue
            sent, number = entry >> _SERVER_BITS + 1, entry & _SERVER
            if sent > self._lost.get(number, 0):
                found.setdefault(self._names[number], Match(mark.end, sent, bool(entry & _SURE)))
        return found

    def remember(self, prompt: Prompt, server: str) -> None:
        """The prompt was sent to this server."""
        self._sent += 1
        entry = self._sent << _SERVER_BITS + 1 | self._number(server)
        first_later = _first_later(prompt)
        for mark in prompt.marks[first_later:-1]:
            self._marks.pop(mark.hash, None)  # where earlier turns ended
        for mark in _kept(prompt):
            self._marks.pop(mark.hash, None)
            self._marks[mark.hash] = entry
        if len(self._marks) > self._size:
            # Many at once: looking for a dict's first entry goes through all that were deleted before it.
            surplus = len(self._marks) - self._size + self._size // 64
            for oldest in [*itertools.islice(self._marks, surplus)]:
                del self._marks[oldest]

    def confirm(self, prompt: Prompt, server: str) -> None:
        """The server has answered the prompt."""
        number = self._number(server)
        for mark in _kept(prompt):
            entry = self._marks.get(mark.hash)
            if entry is not None and entry & _SERVER == number:
                self._marks[mark.hash] = entry | _SURE

    def correct(self, prompt: Prompt, server: str, expected: Match, cached_share: float) -> None:
        """The server reports how much of the prompt (0 to 1) it had cached, where `expected` was expected."""
        if expected.is_sure and cached_share < _LOST_SHARE * expected.end / prompt.bytes:
            number = self._number(server)
            self._lost[number] = max(self._lost.get(number, 0), expected.sent)

    def _number(self, server: str) -> int:
        if (number := self._numbers.get(server)) is None:
            if self._unused:
                number = self._unused.pop()
                self._names[number] = server
            else:
                number = len(self._names)
                self._names.append(server)
            self._numbers[server] = number
        return number


def _first_later(prompt: Prompt) -> int:
    """The index of the first mark after a conversation's beginning."""
    return len(prompt.marks) if prompt.opening is None else prompt.opening + 1


def _kept(prompt: Prompt) -> Iterable[Mark]:
    """The conversation's beginning, and where it ends now. A raw prompt may go on anywhere: all of its marks."""
    first_later = _first_later(prompt)
    yield from prompt.marks[:first_later]
    if len(prompt.marks) > first_later:
        yield prompt.marks[-1]


class Placements:
    """How many new conversations each server got lately, so that none gets much more than its share."""

    # The last hundred or so count.
    _FADES = 0.99
    # Above its share by this many conversations, plus this part of its share, a server gets no new ones.
    _SPARE, _SPARE_SHARE = 1.0, 0.05
    # More where other gateways are: sending a conversation away from its home makes them disagree about it. In a
    # simulation of two, 3 % of conversations were read twice with this, 26 % without.
    _SPARE_FOR_OTHERS = 2.0

    def __init__(self) -> None:
        self._placed: dict[str, float] = {}

    def add(self, server: str) -> None:
        for name in self._placed:
            self._placed[name] *= self._FADES
        self._placed[server] = self._placed.get(server, 0.0) + 1

    def forget(self, server: str) -> None:
        self._placed.pop(server, None)

    def below_share(self, servers: Sequence[Server], others: float = 0.0) -> list[Server]:
        """The servers that may get a new conversation: never none. `others`: the part that other gateways have."""
        spare = self._SPARE + others * self._SPARE_FOR_OTHERS
        weights = sum(server.config.weight for server in servers)
        placed = sum(self._placed.get(server.name, 0.0) for server in servers)

        def limit(server: Server) -> float:
            return (placed + 1) * server.config.weight / weights * (1 + self._SPARE_SHARE) + spare

        return [server for server in servers if self._placed.get(server.name, 0.0) + 1 <= limit(server)] or [*servers]


class Strangers:
    """Which part of conversations goes on here that began elsewhere: whether other gateways use the same servers."""

    # The last five or so count.
    _SHARE = 0.2

    def __init__(self) -> None:
        self._share = 0.0

    def add(self, has_history: bool) -> None:
        """A conversation that was not known comes; with a history, it began elsewhere."""
        self._share += self._SHARE * (has_history - self._share)

    @property
    def part(self) -> float:
        """Of each conversation that begins here, as many go on elsewhere as come from there: 0 to 1."""
        return min(1.0, self._share / (1 - self._share)) if self._share < 1 else 1.0


def home_of(servers: Sequence[Server], identity: int) -> Server:
    """Weighted rendezvous hashing: everybody who knows the same servers by the same names finds the same one.

    https://www.snia.org/sites/default/files/SDC15_presentations/dist_sys/Jason_Resch_New_Consistent_Hashings_Rev.pdf
    """

    def score(server: Server) -> float:
        data = identity.to_bytes(8) + server.name.encode("utf-8", "surrogatepass")
        drawn = (int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) + 0.5) / 2**64
        return -server.config.weight / math.log(drawn)

    return max(servers, key=score)
