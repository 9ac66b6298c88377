"""Who is next: order between keys, and what each key gets of the slots in the long run."""

import heapq
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from gateway.auth import Caller
from gateway.fair_queue import FairQueue


def key(number: int, weight: float = 1, priority: int = 1) -> Caller:
    return Caller(number, f"key {number}", (), weight=weight, priority=priority)


def number_of(caller: Caller) -> int:
    assert caller.key_id is not None
    return caller.key_id


A, B, C = key(1), key(2), key(3)


def serve(queue: FairQueue[str], caller: Caller) -> str:
    """Begin the next one, which must be this caller's."""
    ticket = next(queue.in_turn())
    queue.begins(caller)
    assert queue.remove(caller, ticket)
    return ticket


def queue_of(*waiting: tuple[Caller, str]) -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for caller, ticket in waiting:
        queue.add(caller, ticket)
    return queue


def test_empty() -> None:
    queue = queue_of()
    assert (len(queue), list(queue.in_turn()), queue.remove(A, "a")) == (0, [], False)


def test_within_a_key_who_came_first() -> None:
    queue = queue_of((A, "a1"), (A, "a2"), (A, "a3"))
    assert list(queue.in_turn()) == ["a1", "a2", "a3"]
    assert queue.remove(A, "a2")
    assert not queue.remove(A, "a2")
    assert not queue.remove(B, "a1")  # another's
    assert (list(queue.in_turn()), len(queue)) == (["a1", "a3"], 2)


def test_keys_take_turns() -> None:
    queue = queue_of((A, "a1"), (A, "a2"), (A, "a3"), (B, "b1"), (B, "b2"), (C, "c1"))
    order = []
    for _ in range(6):
        ticket = next(queue.in_turn())
        caller = {"a": A, "b": B, "c": C}[ticket[0]]
        order.append(serve(queue, caller))
        queue.ends(caller)  # one slot
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(queue) == 0


def test_who_has_fewer_running_is_next() -> None:
    queue = queue_of()
    for _ in range(3):
        queue.begins(A)
    queue.begins(B)
    for waiting in ((A, "a"), (B, "b"), (C, "c")):
        queue.add(*waiting)
    assert list(queue.in_turn()) == ["c", "b", "a"]
    for _ in range(3):
        queue.ends(A)
    assert list(queue.in_turn()) == ["c", "a", "b"]  # no longer, but C had no turn yet


def test_priority_goes_first_however_much_it_has() -> None:
    high, low = key(1, priority=0), key(3, weight=100, priority=2)
    queue = queue_of((low, "low"), (B, "normal"), (high, "high 1"), (high, "high 2"))
    for _ in range(50):
        queue.begins(high)
    assert list(queue.in_turn()) == ["high 1", "high 2", "normal", "low"]


def test_who_was_away_has_saved_up_nothing() -> None:
    queue = queue_of((A, "a"))
    for number in range(1000):
        queue.add(A, f"a{number}")
        serve(queue, A)
        queue.ends(A)
    queue.add(A, "last")
    for number in range(100):
        queue.add(B, f"b{number}")
    first = []
    for _ in range(20):
        ticket = next(queue.in_turn())
        caller = A if ticket[0] == "a" or ticket == "last" else B
        first.append("A" if caller is A else "B")
        serve(queue, caller)
        queue.ends(caller)
        if caller is A:
            queue.add(A, f"a-again {len(first)}")
    assert Counter(first) == {"A": 10, "B": 10}


def test_coming_and_going_gains_nothing() -> None:
    """One that leaves the queue and comes back gets no more turns than one that stays."""
    queue = queue_of(*((A, f"a{number}") for number in range(200)))
    got: Counter[str] = Counter()
    for number in range(200):
        queue.add(B, f"b{number}")
        ticket = next(queue.in_turn())
        caller = A if ticket[0] == "a" else B
        serve(queue, caller)
        queue.ends(caller)
        got[caller.key_name] += 1
        queue.remove(B, f"b{number}")
    assert got["key 2"] <= 101


def test_who_used_what_nobody_waited_for_owes_nothing() -> None:
    queue = queue_of((A, "a1"), (A, "a2"), (A, "a3"))
    for _ in range(1000):
        queue.begins(B)
        queue.ends(B)
    queue.add(C, "c")
    queue.add(B, "b")
    order = []
    while queue:
        caller = {"a": A, "b": B, "c": C}[next(queue.in_turn())[0]]
        order.append(serve(queue, caller))
        queue.ends(caller)
    assert order == ["a1", "c", "a2", "b", "a3"]


def test_turns_of_another_class_say_nothing() -> None:
    """The low one never had a turn, and who comes new to the high class must not be put on a par with it."""
    high, new = key(1, priority=0), key(2, priority=0)
    queue = queue_of((key(3, priority=2), "low"), *((high, f"high {number}") for number in range(120)))
    for _ in range(100):
        serve(queue, high)
        queue.ends(high)
    for number in range(10):
        queue.add(new, f"new {number}")
    order = []
    for _ in range(8):
        caller = high if next(queue.in_turn())[0] == "h" else new
        order.append(serve(queue, caller)[0])
        queue.ends(caller)
    assert order == list("nhnhnhnh")


def test_surplus_is_the_newest_of_who_has_most() -> None:
    queue = queue_of((A, "a1"), (A, "a2"), (B, "b1"))
    assert queue.surplus(B) == "a2"
    queue.add(B, "b2")
    assert (queue.surplus(A), queue.surplus(B)) == ("a2", "b2")
    queue.add(key(3, priority=2), "low")
    assert queue.surplus(B) == "low"


def test_idle() -> None:
    queue = queue_of((A, "a"))
    assert not queue.is_idle
    serve(queue, A)
    assert not queue.is_idle
    queue.ends(A)
    assert queue.is_idle


def test_odd_weights() -> None:
    callers = [key(1, 5e-324), key(2, 1e308), key(3, 1e-300)]
    queue = queue_of(*((caller, f"{caller.key_id}") for caller in callers))
    for caller in callers:
        for _ in range(3):
            queue.begins(caller)
    assert next(queue.in_turn()) == "2"
    for caller in callers:
        for _ in range(3):
            queue.ends(caller)
    assert sorted(queue.in_turn()) == ["1", "2", "3"]


def test_a_weight_that_changes_while_it_waits() -> None:
    queue = queue_of((A, "a1"), (key(1, weight=7, priority=0), "a2"), (B, "b"))
    assert sorted(queue.in_turn()) == ["a1", "a2", "b"]
    assert queue.remove(key(1, weight=9), "a1")
    assert next(queue.in_turn()) == "a2"


class Hall:
    """Slots, a clock, and keys that always have something waiting. Counts the time that each key holds slots for."""

    def __init__(self, callers: list[Caller], slots: int, service_s: dict[int, float], seed: int) -> None:
        self.random = random.Random(seed)
        self.queue: FairQueue[int] = FairQueue()
        self.callers = {number_of(caller): caller for caller in callers}
        self.service_s = service_s
        self.tickets: dict[int, int] = {}  # ticket -> key
        self.came: dict[int, float] = {}
        self.ends_at: list[tuple[float, int]] = []  # when, key
        self.now = 0.0
        self.held_s = dict.fromkeys(self.callers, 0.0)
        self.waits: dict[int, list[float]] = {key_id: [] for key_id in self.callers}
        self.free = slots

    def come(self, key_id: int) -> None:
        ticket = len(self.tickets)
        self.tickets[ticket], self.came[ticket] = key_id, self.now
        self.queue.add(self.callers[key_id], ticket)

    def start(self) -> Iterator[int]:
        """Fill the free slots. Yields whose requests begin."""
        while self.free and self.queue:
            ticket = next(self.queue.in_turn())
            key_id = self.tickets[ticket]
            self.queue.begins(self.callers[key_id])
            self.queue.remove(self.callers[key_id], ticket)
            self.waits[key_id].append(self.now - self.came[ticket])
            mean_s = self.service_s.get(key_id, 1.0)
            held_s = mean_s * self.random.uniform(0.5, 1.5)
            self.held_s[key_id] += held_s
            heapq.heappush(self.ends_at, (self.now + held_s, key_id))
            self.free -= 1
            yield key_id

    def end_one(self) -> int:
        self.now, key_id = heapq.heappop(self.ends_at)
        self.queue.ends(self.callers[key_id])
        self.free += 1
        return key_id


SHARES = {
    "equal, one slot": ((1, 1, 1), 1),
    "equal": ((1, 1, 1), 4),
    "1:3, one slot": ((1, 3), 1),
    "1:3, two slots": ((1, 3), 2),
    "1:3, three slots": ((1, 3), 3),
    "1:3, four slots": ((1, 3), 4),
    "1:3, eight slots": ((1, 3), 8),
    "1:1:2, three slots": ((1, 1, 2), 3),
    "1:10": ((1, 10), 4),
    "parts": ((0.25, 0.75), 2),
    "large": ((100, 300), 2),
}


@pytest.mark.parametrize(("weights", "slots"), SHARES.values(), ids=SHARES)
def test_shares_by_weight(weights: tuple[float, ...], slots: int) -> None:
    hall = Hall([key(number, weight) for number, weight in enumerate(weights)], slots, {}, seed=1)
    for number in range(len(weights)):
        for _ in range(2 * slots):
            hall.come(number)
    for _ in range(4000):
        for number in hall.start():
            hall.come(number)
        hall.end_one()
    for number, weight in enumerate(weights):
        assert hall.held_s[number] / sum(hall.held_s.values()) == pytest.approx(weight / sum(weights), abs=0.04)


def test_a_heavy_key_against_light_ones() -> None:
    """Sixty long jobs at once on four slots; five others each bring a short one as soon as their last has ended."""
    heavy, lights = key(0), [key(number) for number in range(1, 6)]
    hall = Hall([heavy, *lights], 4, {0: 10.0} | {number_of(light): 0.5 for light in lights}, seed=2)
    for _ in range(60):
        hall.come(0)
    list(hall.start())
    for light in lights:
        hall.come(number_of(light))
    while len(hall.waits[0]) < 50:
        ended = hall.end_one()
        if ended:
            hall.come(ended)
        list(hall.start())
    waits = sorted(wait for light in lights for wait in hall.waits[number_of(light)])
    assert len(waits) > 200
    assert waits[len(waits) * 9 // 10] < 6  # 0.6 of a long job; in the order of their coming it would be over 100
    assert hall.held_s[0] > sum(hall.held_s.values()) / 6  # nor does the heavy one starve


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_in_a_random_walk(seed: int) -> None:
    chance, queue = random.Random(seed), FairQueue[int]()
    waiting: dict[int, Caller] = {}
    running: list[Caller] = []
    for ticket in range(3000):
        what = chance.random()
        caller = key(chance.randrange(5), chance.choice((0.5, 1, 3)), chance.randrange(3))
        if what < 0.4:
            queue.add(caller, ticket)
            waiting[ticket] = caller
        elif what < 0.6 and waiting:
            found = next(queue.in_turn())
            queue.begins(waiting[found])
            running.append(waiting[found])
            assert queue.remove(waiting.pop(found), found)
        elif what < 0.7 and waiting:
            gone = chance.choice([*waiting])
            assert queue.remove(waiting.pop(gone), gone)
        elif running:
            queue.ends(running.pop(chance.randrange(len(running))))
        assert len(queue) == len(waiting)
        assert sorted(queue.in_turn()) == sorted(waiting)
    assert Counter(scope for scope, each in queue._keys.items() for _ in range(each.running)) == Counter(
        caller.scope for caller in running
    )
