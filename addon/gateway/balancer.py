"""Finds a server for a request: the strategy chooses among those that may take it, and the choice is claimed in the
same step. What does not fit waits here, in fair order, for a slot or for a server that loads its model.

All methods are for the event loop; times are of `clock`, in seconds.
"""

import asyncio
import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gateway.auth import Caller
from gateway.fair_queue import FairQueue
from gateway.replies import Refusal
from gateway.routing import Router
from gateway.servers import Claim, Server, average
from gateway.settings import Config
from gateway.strategies import STRATEGIES, Choice, Prefix, Report, Strategy, Wanted

log = logging.getLogger(__name__)

# What is said to come back when nothing better is known, and the longest time that is said.
RETRY_AFTER_S = 5.0
MAX_RETRY_AFTER_S = 600.0
# A report on a prompt that was nearly all cached says nothing about how fast a server reads.
_ENOUGH_READ = 0.1
# Who waits looks up this often whether it has waited too long.
TICK_S = 1.0


class NoServer(Refusal):
    """503: nothing can take the request, and waiting would be in vain."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        seconds = math.ceil(min(max(retry_after_s, 1.0), MAX_RETRY_AFTER_S))
        super().__init__(503, "no_server_available", message, headers={"retry-after": str(seconds)})


@dataclass(eq=False)
class Search:
    """A request that looks for a server, and what it has found so far. `tried`: servers that failed it."""

    caller: Caller
    wanted: Wanted
    may_fall_back: bool = False  # there are other models that will do
    tried: list[Server] = field(default_factory=list)
    claim: Claim | None = None
    choice: Choice | None = None
    prefers: Server | None = None  # which server it waits for
    is_over: bool = False  # the client has left
    found: "asyncio.Future[None] | None" = None  # while it waits

    def untried(self, servers: list[Server]) -> list[Server]:
        """Those that have not failed it yet; all of them when every one has."""
        return [server for server in servers if server not in self.tried] or servers

    def give_up(self) -> None:
        """The client has left: wait no more."""
        self.is_over = True
        if self.found and not self.found.done():
            self.found.cancel()

    def release(self) -> None:
        """Give back what was claimed."""
        if self.claim:
            self.claim.release()


def _nobody(pool: Sequence[Server], now: float) -> NoServer:
    """None of these can take a request."""
    states = ", ".join(
        f"{server.name} is {server.health.state}" + (f" ({server.health.reason})" if server.health.reason else "")
        for server in pool
    )
    reopens_at = [server.health.reopens_at for server in pool if server.health.reopens_at > now]
    message = f"No server is available for this model{': ' * bool(states)}{states}."
    return NoServer(message, min(reopens_at) - now if reopens_at else RETRY_AFTER_S)


class Balancer:
    """Strategies, claims and the queue of the config."""

    def __init__(self, config: Config, router: Router, clock: Callable[[], float]) -> None:
        self._config = config
        self._router = router
        self._clock = clock
        # By model, who was served last last: what a key had of one model is no reason to let it wait for another.
        self._queues: dict[str | None, FairQueue[Search]] = {}
        self._looked_at = 0.0  # when it was looked last who of those that wait can go
        self._strategies: dict[str, Strategy] = {}

    def reconfigure(self, config: Config, gone: Sequence[Server]) -> None:
        """To be called when the router has another config, without the servers that are `gone`. Those who wait go where
        it says, or are refused.
        """
        self._config = config
        wanted = {config.routing.strategy, *config.routing.models.values()}
        self._strategies = {name: strategy for name, strategy in self._strategies.items() if name in wanted}
        for strategy in self._strategies.values():
            strategy.reconfigure(config.routing, {server.name for server in gone})
        for search in [search for queue in self._queues.values() for search in queue.in_turn()]:
            if search.prefers in gone:
                self._prefer(search, None)
        self.changed()

    @property
    def waiting(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def take(self, search: Search) -> bool:
        """Claim a server, if one can be had without a wait. Raises NoServer when a wait would be in vain."""
        return not self._queues.get(search.wanted.model) and not search.is_over and self._claim(search)

    async def wait(self, search: Search) -> None:
        """Wait for a server and claim it; without a claim, the client has left. Raises NoServer: too many, too long."""
        since = self._clock()
        search.found = asyncio.get_running_loop().create_future()
        try:
            if search.is_over:
                return
            self._queue(search.wanted.model).add(search.caller, search)
            self.changed()
            self._make_room(search)  # not before: a server may be free for this one, whatever others wait for
            while not search.found.done():
                left_s = since + self._longest_wait_s(search) - self._clock()
                if left_s <= 0:
                    raise NoServer("No server became free in time.", self._retry_after_s(search))
                await asyncio.wait({search.found}, timeout=min(left_s, TICK_S))
                self._look_for_reopened(search.wanted.model)
            if not search.found.cancelled():
                search.found.result()
        finally:
            self._leave_queue(search)

    async def pause(self, search: Search, seconds: float) -> None:
        """Wait for a while, or until the client leaves."""
        search.found = asyncio.get_running_loop().create_future()
        if not search.is_over:
            await asyncio.wait({search.found}, timeout=seconds)

    def has_other(self, than: Server, model: str | None) -> bool:
        """Whether there is another server of the model to go to."""
        now = self._clock()
        return any(server.health.may_take(now) for server in self._router.servers_of(model) if server is not than)

    def looks_at_prompts(self, model: str | None) -> bool:
        """Whether a prompt would make a difference: there is a choice, and it is made by the prompt."""
        return len(self._router.servers_of(model)) > 1 and isinstance(self._strategy(model), Prefix)

    def changed(self) -> None:
        """A slot or a server may be free: let those go who can, in turn."""
        self._looked_at = self._clock()
        while self._serve_next():
            pass

    def answered(self, search: Search, held_s: float, report: Report) -> None:
        """A server has answered; `held_s`: how long it took for all of it."""
        assert search.choice
        server = search.choice.server
        if server not in self._router.servers:  # it is gone, and another one may have its name
            return
        server.measured_service_s = average(server.measured_service_s, held_s)
        if search.wanted.prompt and report.prompt_ms is not None and report.prompt_tokens:
            read_share = 1 - (report.cached_tokens or 0) / report.prompt_tokens
            if read_share > _ENOUGH_READ:
                per_byte = report.prompt_ms / 1000 / (search.wanted.prompt.bytes * read_share)
                server.measured_read_s_per_byte = average(server.measured_read_s_per_byte, per_byte)
        self._strategy(search.wanted.model).answered(search.wanted, search.choice, report)

    def _queue(self, model: str | None) -> FairQueue[Search]:
        return self._queues.setdefault(model, FairQueue())

    def _forget_idle(self, model: str | None) -> None:
        if model in self._queues and self._queues[model].is_idle:
            del self._queues[model]

    def _make_room(self, newest: Search) -> None:
        """When too many wait, one of them is refused: of the key that has the most, or the newest itself."""
        queue = self._queue(newest.wanted.model)
        if len(queue) <= self._config.queue.max_length:
            return
        search = queue.surplus(newest.caller)
        self._leave_queue(search)
        if search.found and not search.found.done():
            search.found.set_exception(NoServer("Too many requests wait for this model.", self._retry_after_s(search)))

    def _look_for_reopened(self, model: str | None) -> None:
        """Nothing happens when a pause is over: those that wait have to look themselves, the first of them for all."""
        now = self._clock()
        if any(self._looked_at < server.health.reopens_at <= now for server in self._router.servers_of(model)):
            self.changed()

    def _serve_next(self) -> bool:
        """Whether one of those that wait got its claim, or its refusal. Models take turns: they may share servers."""
        waiting = [model for model, queue in self._queues.items() if queue]
        return any(
            self._serve_model(model) for model in sorted(waiting, key=lambda model: self._queues[model].priority)
        )

    def _serve_model(self, model: str | None) -> bool:
        is_full = False  # hundreds may wait, and choosing takes its time
        for search in self._queues[model].in_turn():
            if search.prefers and is_full:
                continue
            if self._serve(search):
                if model in self._queues:
                    self._queues[model] = self._queues.pop(model)
                return True
            is_full = is_full or self._is_full(model)
        return False

    def _is_full(self, model: str | None) -> bool:
        now = self._clock()
        ready = [server for server in self._router.servers_of(model) if server.health.may_take(now)]
        return bool(ready) and all(server.is_full for server in ready)

    def _serve(self, search: Search) -> bool:
        """Whether one that waits has got its claim, or its refusal."""
        assert search.found
        if search.found.done():
            return False
        try:
            if not self._claim(search):
                return False
        except Exception as error:  # a refusal; a fault, too, is this request's alone and holds up nobody else
            search.found.set_exception(error)
        else:
            search.found.set_result(None)
        self._leave_queue(search)
        return True

    def _leave_queue(self, search: Search) -> None:
        model = search.wanted.model
        if model in self._queues:
            self._queues[model].remove(search.caller, search)
            self._forget_idle(model)
        self._prefer(search, None)

    def _prefer(self, search: Search, server: Server | None) -> None:
        if search.prefers:
            search.prefers.waiting -= 1
        search.prefers = server
        if server:
            server.waiting += 1

    def _claim(self, search: Search) -> bool:
        """Choose and claim in one step. False: what was chosen is full, or is not ready yet."""
        candidates = self._candidates(search)
        if not candidates:
            return False
        self._prefer(search, None)
        strategy = self._strategy(search.wanted.model)
        choice = strategy.choose(candidates, search.wanted) if len(candidates) > 1 else Choice(candidates[0], "only")
        if choice.server.is_full:
            self._prefer(search, choice.server)
            return False
        strategy.sent(candidates, search.wanted, choice)
        model = search.wanted.model
        self._queue(model).begins(search.caller)  # the claim's release ends it: nothing may fail in between
        search.claim = Claim(choice.server, self._clock(), functools.partial(self._released, model, search.caller))
        search.choice = choice
        log.debug("%s gets a request for %s (%s) %s", choice.server.name, model, choice.route, choice.why)
        return True

    def _released(self, model: str | None, caller: Caller) -> None:
        self._queue(model).ends(caller)
        self._forget_idle(model)
        self.changed()

    def _candidates(self, search: Search) -> Sequence[Server]:
        """The servers that may take the request, full ones included. None: one of them will be ready soon."""
        now = self._clock()
        pool = self._router.servers_of(search.wanted.model)
        if len(pool) == 1 and pool[0] in search.tried:
            raise _nobody(pool, now)
        ready = [server for server in pool if server.health.may_take(now)]
        if ready:
            return search.untried(ready)
        if not search.may_fall_back:
            if any(server.health.state == "loading" for server in pool):
                return []
            # Ejecting is for going elsewhere. With nowhere to go, a server that fails at times is better than none.
            if len(pool) > 1 and (ejected := [server for server in pool if server.health.is_ejected]):
                return search.untried(ejected)
            if refusing := [server for server in pool if server.health.refuses]:
                return search.untried(refusing)  # it may be back before we know, and asking costs nothing
        raise _nobody(pool, now)

    def _strategy(self, model: str | None) -> Strategy:
        routing = self._config.routing
        name = routing.models.get(model or "", routing.strategy)
        if name not in self._strategies:
            self._strategies[name] = STRATEGIES[name](routing)
        return self._strategies[name]

    def _longest_wait_s(self, search: Search) -> float:
        states = {server.health.state for server in self._router.servers_of(search.wanted.model)}
        only_loading = "loading" in states and not states & {"up", "unknown"}
        return self._config.loading_wait_s if only_loading else self._config.queue.max_wait_s

    def _retry_after_s(self, search: Search) -> float:
        """When the queue will have got through, as fast as it did lately."""
        pool = self._router.servers_of(search.wanted.model)
        if not pool:
            return RETRY_AFTER_S  # they have just told that they have it no more
        at_once = sum(server.slots or 1 for server in pool)
        service_s = sum(server.service_s for server in pool) / len(pool)
        return (len(self._queues.get(search.wanted.model, ())) + 1) * service_s / at_once
