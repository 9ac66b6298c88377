"""Who is next, of those that wait for a server: fair between keys, not between requests.

A higher class goes before a lower one. Within a class, the key with the fewest running requests for its weight is
next; among equals, the one that had the fewest turns for its weight since it began to wait. So a key with sixty
requests gets what is left over, and a key that comes with one gets the next slot.
"""

from collections.abc import Iterator
from typing import Any

from gateway.auth import Caller


class _Key:
    """One key: what it waits for and what runs for it. `turns`: how many it had, for its weight."""

    def __init__(self) -> None:
        self.running = 0
        self.turns = 0.0
        self.last_turn = 0.0  # `turns` before its last one
        self.waiting: dict[Any, Caller] = {}  # in the order of their coming

    @property
    def priority(self) -> int:
        return next(iter(self.waiting.values())).priority


class FairQueue[T]:
    """Tickets (any hashable) of callers. It doesn't know what they wait for."""

    def __init__(self) -> None:
        self._keys: dict[str, _Key] = {}
        self._length = 0
        self._running = 0

    def __len__(self) -> int:
        return self._length

    @property
    def is_idle(self) -> bool:
        """Nothing waits or runs: there is nothing worth remembering."""
        return not self._length and not self._running

    @property
    def priority(self) -> int:
        """The class of those that are next. Not to be asked when nobody waits."""
        return min(key.priority for key in self._keys.values() if key.waiting)

    def add(self, caller: Caller, ticket: T) -> None:
        key = self._key(caller)
        if not key.waiting:
            self._line_up(key, caller)
        key.waiting[ticket] = caller
        self._length += 1

    def remove(self, caller: Caller, ticket: T) -> bool:
        """It has got what it waited for, or waits no more. False: it was not there."""
        if self._key(caller).waiting.pop(ticket, None) is None:
            return False
        self._length -= 1
        return True

    def begins(self, caller: Caller) -> None:
        """A request of this caller begins to run."""
        key = self._key(caller)
        key.last_turn = key.turns
        key.turns += 1 / caller.weight
        key.running += 1
        self._running += 1

    def ends(self, caller: Caller) -> None:
        self._key(caller).running -= 1
        self._running -= 1

    def surplus(self, caller: Caller) -> T:
        """Who is to go when there are too many, and this caller came last: the newest one of the key that has the most
        waiting for its weight, in the lowest class; among equals, this caller's own.
        """
        own = self._key(caller)

        def order(key: _Key) -> tuple[int, float, bool]:
            newest = next(reversed(key.waiting.values()))
            return newest.priority, len(key.waiting) / newest.weight, key is own

        most = max((key for key in self._keys.values() if key.waiting), key=order)
        ticket: T = next(reversed(most.waiting))
        return ticket

    def in_turn(self) -> Iterator[T]:
        """All tickets, who is next first. Not to be changed while it is walked through."""
        firsts = {key: next(iter(key.waiting.values())) for key in self._keys.values() if key.waiting}
        smallest = min((caller.weight for caller in firsts.values()), default=1.0)

        def order(key: _Key) -> tuple[float, float, float]:
            caller = firsts[key]
            # Whole shares: with two slots, weights of 1 and 3 are to take turns, not to hold one slot each.
            return caller.priority, key.running // (caller.weight / smallest), key.turns

        for key in sorted(firsts, key=order):
            yield from key.waiting

    def _line_up(self, key: _Key, caller: Caller) -> None:
        """A key begins to wait: it has saved up nothing, and owes nothing for what it got while others didn't want it.

        It is compared with those of its class that wait: what others had, for whatever server, says nothing here.
        """
        others = [each for each in self._keys.values() if each.waiting and each.priority == caller.priority]
        if not others:
            return
        least = min(each.last_turn for each in others)
        most = min(each.turns for each in others) + 1 / caller.weight
        key.turns = min(max(key.turns, least), most)
        key.last_turn = min(max(key.last_turn, least), key.turns)

    def _key(self, caller: Caller) -> _Key:
        return self._keys.setdefault(caller.scope, _Key())
