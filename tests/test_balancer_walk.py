"""No slot is lost and nobody starves, whatever happens in whatever order."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable

import pytest

from gateway.auth import Caller
from gateway.balancer import NoServer, Search
from gateway.prompts import read_prompt
from gateway.settings import Queue
from gateway.strategies import STRATEGIES, Report, Wanted
from room import Room, got, rounds, search


class Walk:
    """Requests that come, wait, leave and end at random, while servers fail and change."""

    def __init__(self, seed: int, strategy: str) -> None:
        self.chance = random.Random(seed)
        self.room = Room("a 1 m", "b 2 m n", "c - n", "d 3 m n", strategy=strategy, queue=Queue(max_length=3))
        self.held: list[Search] = []
        self.waiting: dict[Search, asyncio.Task[None]] = {}
        self.refusals = self.waits = 0

    def new(self) -> Search:
        chance = self.chance
        model = chance.choice(["m", "n", None])
        body = json.dumps({"prompt": f"{chance.randrange(20)} " + "word " * 500}).encode()
        prompt = read_prompt(model, "/completion", body)
        wanted = Wanted(model, prompt if chance.random() < 0.5 else None, len(body))
        return Search(Caller(chance.randrange(4), "key", (), weight=chance.choice((1, 3))), wanted)

    async def come(self) -> None:
        wanted = self.new()
        wanted.tried = self.chance.sample(self.room.router.servers, self.chance.randrange(3))
        try:
            taken = self.room.balancer.take(wanted)
        except NoServer:
            self.refusals += 1
            return
        if taken:
            self.held.append(wanted)
        else:
            self.waits += 1
            self.waiting[wanted] = await self.room.wait(wanted)

    async def end(self) -> None:
        if self.held:
            ended = self.held.pop(self.chance.randrange(len(self.held)))
            if self.chance.random() < 0.5:
                report = Report(0.1, 100, self.chance.randrange(101), 9)
                self.room.balancer.answered(ended, self.chance.random(), report)
            ended.release()

    async def leave(self) -> None:
        if self.waiting:
            self.chance.choice([*self.waiting]).give_up()

    async def leave_as_a_slot_comes(self) -> None:
        leaves = self.chance.choice([*self.waiting]) if self.waiting else None
        if leaves and self.chance.random() < 0.5:
            leaves.give_up()
        await self.end()
        if leaves:
            leaves.give_up()

    async def fail(self) -> None:
        health, now = self.chance.choice(self.room.router.servers).health, self.room.now
        what: Callable[[], object] = self.chance.choice(
            [
                lambda: health.probe_ok(now),
                lambda: health.probe_ok(now),
                lambda: health.probe_loading(now, "loads its model"),
                lambda: health.probe_failed(now, "late"),
                lambda: health.refused(now, "refuses connections"),
                lambda: health.failed(now, "was reset"),
                lambda: health.asked_to_wait(now, 5),
                lambda: health.succeeded(now),
            ]
        )
        what()
        self.room.now += self.chance.choice((0, 1, 20))
        self.room.balancer.changed()

    async def change(self) -> None:
        server = self.chance.choice(self.room.router.servers)
        server.slots = self.chance.choice((None, 0, 1, 2, 3))
        if self.chance.random() < 0.3:
            server.models = tuple(self.chance.sample(["m", "n"], self.chance.randrange(1, 3)))
            self.room.router.learn()
        self.room.balancer.changed()

    async def settle(self) -> None:
        """Sort those that waited by what became of them."""
        await rounds()
        for wanted, task in [*self.waiting.items()]:
            if not task.done():
                continue
            del self.waiting[wanted]
            if task.exception():
                assert isinstance(task.exception(), NoServer)
                assert wanted.claim is None
                self.refusals += 1
            elif wanted.claim and wanted.is_over:
                wanted.release()
            elif wanted.claim:
                self.held.append(wanted)
            else:
                assert wanted.is_over

    def check(self) -> None:
        running = Counter(got(wanted) for wanted in self.held)
        assert {name: server.running for name, server in self.room.servers.items()} == {
            name: running[name] for name in self.room.servers
        }
        preferred = Counter(wanted.prefers.name for wanted in self.waiting if wanted.prefers)
        assert {name: server.waiting for name, server in self.room.servers.items()} == {
            name: preferred[name] for name in self.room.servers
        }
        assert self.room.balancer.waiting == len(self.waiting)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(4))
async def test_no_slot_is_lost_in_a_random_walk(seed: int, strategy: str) -> None:
    walk = Walk(seed, strategy)
    steps = [walk.come] * 7 + [walk.end] * 4 + [walk.leave, walk.leave_as_a_slot_comes, walk.fail, walk.change]
    for _ in range(600):
        await walk.chance.choice(steps)()
        for _ in range(3):  # what was held over may let others go
            await walk.settle()
        walk.check()
    for wanted in walk.waiting:
        wanted.give_up()
    await walk.settle()
    while walk.held:
        await walk.end()
    assert walk.room.counts == (0, 0, 0)
    assert walk.room.balancer._queues == {}
    assert min(walk.refusals, walk.waits) > 10  # the walk went through narrow places


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_nobody_starves(strategy: str) -> None:
    """All that wait get their turn, in as many releases as there are requests."""
    room = Room("a 1", "b 2", strategy=strategy, queue=Queue(max_length=1000))
    held, waiting = [search() for _ in range(3)], [search(key % 7) for key in range(100)]
    for each in held:
        assert room.take(each)
    tasks = [await room.wait(each) for each in waiting]
    for _ in range(100):
        held.pop(0).release()
        held += [each for each in waiting if each.claim and each not in held and each.prefers is None][: 3 - len(held)]
        waiting = [each for each in waiting if each not in held]
    await asyncio.gather(*tasks)
    assert waiting == []
