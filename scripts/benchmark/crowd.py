"""One user with many long jobs and five with short requests, on one server's slots."""

import asyncio
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from benchmark import shapes
from benchmark.chat import Endpoint, Reply, ask

HOG = "many-jobs"
USERS = tuple(f"user-{number}" for number in range(1, 6))
_SHORT = (0.05, 0.1)  # of a long job, from, to
_HEAD_START = 0.1  # long jobs: all of them wait when the first short request comes
_MOST_SHORT = 1_000  # of one user; more than fit into any run


@dataclass(frozen=True)
class Lengths:
    """What a round consists of, in tokens and, where it is thinking, in long jobs."""

    long_tokens: int  # the mean
    jobs: Sequence[int]
    requests: Mapping[str, Sequence[tuple[float, int]]]  # user -> thinks so long, then asks for so many tokens


def lengths(seed: int, jobs: int, tokens: int, spread: float, think: float, slots: int) -> Lengths:
    """`spread`: long jobs differ evenly by up to this share of their mean, and the first ones in the slots have any
    part of it, so that slots don't end at the same moment. `think`: the mean pause between a user's requests."""
    chance = random.Random(seed)
    first = [chance.uniform(0.05, 1) for _ in range(slots)]
    shares = first + [chance.uniform(1 - spread, 1 + spread) for _ in range(jobs - slots)]

    def user() -> list[tuple[float, int]]:
        return [(chance.uniform(0, 2 * think), _tokens(tokens, chance.uniform(*_SHORT))) for _ in range(_MOST_SHORT)]

    return Lengths(tokens, [_tokens(tokens, share) for share in shares], {name: user() for name in USERS})


def _tokens(long_tokens: int, share: float) -> int:
    return max(1, round(long_tokens * share))


@dataclass
class Found:
    """One round. Waits from sending to the first text, in units of one mean long job."""

    unit_s: float = 0.0
    waits: list[float] = field(default_factory=list)
    all_after: float = 0.0  # the last long job's end, in units
    errors: Counter[str] = field(default_factory=Counter)


async def unit(endpoint: Endpoint, tokens: int, slots: int) -> float:
    """Seconds that a long job of so many tokens takes when all slots are taken: to pace users with, before a round."""
    replies = await asyncio.gather(*(_ask(endpoint, tokens) for _ in range(slots)))
    return statistics.mean(served_s(reply) for reply in replies)


def served_s(reply: Reply) -> float:
    """From the first text to the end; 0 of a failed one."""
    if reply.problem or reply.first_at is None or reply.ended_at is None:
        return 0.0
    return reply.ended_at - reply.first_at


class Crowd:
    """One round. `unit_s`: about what a long job takes."""

    def __init__(self, endpoints: Mapping[str, Endpoint], lengths: Lengths, slots: int, unit_s: float) -> None:
        self._endpoints = endpoints
        self._lengths = lengths
        self._slots = slots
        self._unit_s = unit_s
        self._unfinished = len(lengths.jobs)
        self._per_token_s: list[float] = []  # of each long job
        self._waits_s: list[float] = []
        self._errors: Counter[str] = Counter()

    async def run(self) -> Found:
        began = perf_counter()
        async with asyncio.TaskGroup() as group:
            jobs = [group.create_task(self._job(tokens)) for tokens in self._lengths.jobs]
            for name in USERS:
                group.create_task(self._user(name))
            await asyncio.wait(jobs)
            ended = perf_counter()
        if not self._per_token_s:
            return Found(errors=self._errors)
        unit_s = statistics.mean(self._per_token_s) * self._lengths.long_tokens
        return Found(unit_s, [wait / unit_s for wait in self._waits_s], (ended - began) / unit_s, self._errors)

    async def _job(self, tokens: int) -> None:
        reply = await self._counted(HOG, tokens)
        self._unfinished -= 1
        if taken_s := served_s(reply):
            self._per_token_s.append(taken_s / tokens)

    async def _user(self, name: str) -> None:
        """Goes on while long jobs wait for a slot: afterwards there is nothing to wait for."""
        await asyncio.sleep(_HEAD_START * self._unit_s)
        for thinks, tokens in self._lengths.requests[name]:
            await asyncio.sleep(thinks * self._unit_s)
            if self._unfinished <= self._slots:
                return
            sent = perf_counter()
            reply = await self._counted(name, tokens)
            if not reply.problem and reply.first_at is not None:
                self._waits_s.append(reply.first_at - sent)

    async def _counted(self, user: str, tokens: int) -> Reply:
        reply = await _ask(self._endpoints[user], tokens)
        if reply.problem:
            self._errors[f"{user}: {reply.problem}"] += 1
        return reply


async def _ask(endpoint: Endpoint, tokens: int) -> Reply:
    message = {"role": "user", "content": "tell me about the world and the people"}
    body = {"model": shapes.MODEL, "messages": [message], "max_tokens": tokens, "ignore_eos": True, "stream": True}
    return await ask(endpoint, {**body, "stream_options": {"include_usage": True}})
