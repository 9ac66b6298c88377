"""Plays conversations against servers or gateways, a few requests at a time, and notes what each turn cost."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from benchmark.chat import Endpoint, Reply, ask
from benchmark.talk import ANSWER_TOKENS, Conversation

# A turn that failed is sent again, as an agent does, so that all arrangements do the same work. Each failure counts.
_TRIES = 20
_PAUSE_S = 0.1


class Picker(Protocol):
    """Where a request goes; `done` when it has ended."""

    def pick(self, conversation: int) -> Endpoint: ...

    def done(self, endpoint: Endpoint) -> None: ...


@dataclass
class Pinned:
    """Each conversation has its place, from the first turn on: what nobody can know who sees single requests."""

    endpoints: Sequence[Endpoint]

    def pick(self, conversation: int) -> Endpoint:
        return self.endpoints[conversation % len(self.endpoints)]

    def done(self, endpoint: Endpoint) -> None:
        pass


class AtRandom:
    """Gateways that don't talk, behind a load balancer that knows nothing."""

    def __init__(self, endpoints: Sequence[Endpoint], seed: int) -> None:
        self._endpoints = endpoints
        self._chance = random.Random(seed)

    def pick(self, conversation: int) -> Endpoint:
        return self._chance.choice(self._endpoints)

    def done(self, endpoint: Endpoint) -> None:
        pass


class InTurn:
    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._next = itertools.cycle(endpoints)

    def pick(self, conversation: int) -> Endpoint:
        return next(self._next)

    def done(self, endpoint: Endpoint) -> None:
        pass


class LeastBusy:
    """The fewest requests under way; the first among equals."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._running = dict.fromkeys(endpoints, 0)

    def pick(self, conversation: int) -> Endpoint:
        endpoint = min(self._running, key=lambda one: self._running[one])
        self._running[endpoint] += 1
        return endpoint

    def done(self, endpoint: Endpoint) -> None:
        self._running[endpoint] -= 1


@dataclass(frozen=True)
class Turn:
    """One turn that was answered in the end; what failed before is in its time to first token, too."""

    conversation: int
    number: int  # from 0
    server: str
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float


@dataclass
class Outcome:
    """What one run of one arrangement gave."""

    turns: list[Turn] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    servers: int = 0  # how many there are, asked or not
    wall_s: float = 0.0
    others_share: float = 0.0  # of the machine, taken by others meanwhile


Ask = Callable[[Endpoint, dict[str, object]], Awaitable[Reply]]
Incident = Callable[[], Awaitable[None]]


class Play:
    """One run. `incident` happens once half of the turns have been answered, while the others go on."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        picker: Picker,
        *,
        mixed: bool = False,
        incident: Incident | None = None,
        ask: Ask = ask,
    ) -> None:
        self.outcome = Outcome()
        self._picker = picker
        self._mixed = mixed
        self._incident = incident
        self._ask = ask
        self._line: asyncio.Queue[Conversation] = asyncio.Queue()
        for conversation in conversations:
            self._line.put_nowait(conversation)
        self._half = sum(len(conversation.says) for conversation in conversations) // 2
        self._incidents: list[asyncio.Task[None]] = []

    async def run(self, in_flight: int) -> Outcome:
        began = perf_counter()
        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(self._work()) for _ in range(in_flight)]
            await self._line.join()
            self.outcome.wall_s = perf_counter() - began
            for worker in workers:
                worker.cancel()
        await asyncio.gather(*self._incidents)
        return self.outcome

    async def _work(self) -> None:
        """One conversation to its end and then the next, or mixed: after each turn it goes to the back of the line."""
        while True:
            conversation = await self._line.get()
            while await self._take_turn(conversation) and not conversation.is_over:
                if self._mixed:
                    self._line.put_nowait(conversation)
                    break
            self._line.task_done()

    async def _take_turn(self, conversation: Conversation) -> bool:
        """False when it is given up."""
        began = perf_counter()
        for _ in range(_TRIES):
            endpoint = self._picker.pick(conversation.number)
            try:
                reply = await self._ask(endpoint, conversation.body())
            finally:
                self._picker.done(endpoint)
            if problem := problem_of(reply):
                self.outcome.errors[problem] += 1
                await asyncio.sleep(_PAUSE_S)
                continue
            self._note(conversation, endpoint, reply, began)
            conversation.answered(reply.text)
            return True
        self.outcome.errors[f"given up: turn {conversation.turn + 1} of a conversation"] += 1
        return False

    def _note(self, conversation: Conversation, endpoint: Endpoint, reply: Reply, began: float) -> None:
        assert reply.usage
        assert reply.first_at is not None
        turn = Turn(
            conversation.number,
            conversation.turn,
            reply.headers.get("x-llmproxy-server", endpoint.name),
            reply.usage.prompt_tokens,
            reply.cached_tokens,
            reply.first_at - began,
        )
        self.outcome.turns.append(turn)
        self.outcome.routes[reply.headers.get("x-llmproxy-route", "")] += 1
        if self._incident and len(self.outcome.turns) == self._half:
            self._incidents.append(asyncio.ensure_future(self._incident()))


def problem_of(reply: Reply) -> str:
    """What is wrong with an answer, or nothing."""
    if reply.problem or not reply.usage:
        return reply.problem or "no usage"
    tokens = reply.usage.completion_tokens
    return "" if tokens == ANSWER_TOKENS else f"an answer of {tokens} tokens instead of {ANSWER_TOKENS}"
