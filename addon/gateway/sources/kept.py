"""Answers that are kept for a while, by the key's SHA-256 and, where a source decides by it, the client's address.

Bounded twice: no key pushes out the answers of all others, from however many addresses it comes.
"""

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from gateway.sources.source import Answer

# Of each kind. Unknown keys can't push out good ones.
MAX_KEPT = 10_000
# Of each key.
MAX_ADDRESSES = 100
# A key that was good this long ago is likely good still: its question does not wait behind those of unknown ones.
REMEMBERED_S = 3600.0


class Place(msgspec.Struct, frozen=True):
    """What an answer holds for. `address`: empty for any."""

    sha256: str
    address: str = ""


class Entry(msgspec.Struct, frozen=True):
    answer: Answer
    until: float


class Kept:
    """`now`: a monotonic clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._keys: OrderedDict[str, dict[str, Entry]] = OrderedDict()
        self._count = 0

    def get(self, place: Place) -> Entry | None:
        entry = self._keys.get(place.sha256, {}).get(place.address)
        return entry if entry and self._now() < entry.until else None

    def keep(self, place: Place, entry: Entry) -> None:
        mine = self._forget(place.sha256)
        mine.pop(place.address, None)
        mine[place.address] = entry
        if len(mine) > MAX_ADDRESSES:
            del mine[next(iter(mine))]
        self._keys[place.sha256] = mine
        self._count += len(mine)
        while self._count > MAX_KEPT:
            self._forget(next(iter(self._keys)))

    def _forget(self, sha256: str) -> dict[str, Entry]:
        found = self._keys.pop(sha256, {})
        self._count -= len(found)
        return found


class GoodLately:
    """The keys that were let in within REMEMBERED_S, the MAX_KEPT last ones."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._until: OrderedDict[str, float] = OrderedDict()

    def has(self, sha256: str) -> bool:
        return self._now() < self._until.get(sha256, 0)

    def note(self, sha256: str, *, is_good: bool) -> None:
        self._until.pop(sha256, None)
        if is_good:
            self._until[sha256] = self._now() + REMEMBERED_S
        if len(self._until) > MAX_KEPT:
            self._until.popitem(last=False)
