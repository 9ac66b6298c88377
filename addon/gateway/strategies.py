"""Which of several servers gets a request. A strategy chooses; the balancer claims what it chose in the same step.

Adding one: a class with `choose`, a line in STRATEGIES, its name in config.STRATEGIES, a row in the test table.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import msgspec

from gateway.prefix import Match, PrefixIndex, Strangers, home_of
from gateway.prompts import Prompt
from gateway.servers import Server, average
from gateway.settings import Routing

log = logging.getLogger(__name__)


class Wanted(msgspec.Struct, frozen=True):
    """What a server is wanted for. `prompt` None: unknown, or not worth knowing."""

    model: str | None
    prompt: Prompt | None
    request_bytes: int = 0


class Choice(msgspec.Struct, frozen=True):
    """`server` may be full: then the request had better wait for it. `route`: why, in a word; `why`: in a line."""

    server: Server
    route: str
    why: str = ""
    expected: Match | None = None  # what the server should have cached
    is_known: bool = False  # the conversation was sent somewhere before


class Report(msgspec.Struct, frozen=True):
    """What was learned of an answer. `ttft_s`: from its sending to its first event. None: not told."""

    ttft_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    prompt_ms: float | None = None


class Strategy(Protocol):
    """`choose` changes nothing; `sent` and `answered` tell it what became of its choices.

    `reconfigure`: the config has changed, and servers of these names are gone: others may come under the same names.
    """

    def choose(self, servers: Sequence[Server], wanted: Wanted) -> Choice: ...
    def sent(self, servers: Sequence[Server], wanted: Wanted, choice: Choice) -> None: ...
    def answered(self, wanted: Wanted, choice: Choice, report: Report) -> None: ...
    def reconfigure(self, routing: Routing, gone: Collection[str]) -> None: ...


def with_free_slots(servers: Sequence[Server]) -> Sequence[Server]:
    """Those that have one; all of them when none has."""
    return [server for server in servers if not server.is_full] or servers


class RoundRobin:
    """Smooth weighted round-robin, as nginx does it: 1:3 becomes b a b b, not a b b b.

    https://github.com/nginx/nginx/commit/52327e0627f49dbda1e8db695e63a4b0af4448b1
    """

    def __init__(self, routing: Routing) -> None:
        self._ahead: dict[tuple[str | None, str], float] = {}

    def choose(self, servers: Sequence[Server], wanted: Wanted) -> Choice:
        return Choice(max(with_free_slots(servers), key=lambda server: self.turn(server, wanted)), "round-robin")

    def turn(self, server: Server, wanted: Wanted) -> float:
        """How far a server would be ahead: the one that is furthest ahead is next."""
        return self._ahead.get((wanted.model, server.name), 0.0) + server.config.weight

    def sent(self, servers: Sequence[Server], wanted: Wanted, choice: Choice) -> None:
        # One that had no slot has missed its turn: it must not get all that follows once it has one.
        asked = [server for server in servers if server is choice.server or not server.is_full]
        for other in asked:
            self._ahead[wanted.model, other.name] = self.turn(other, wanted)
        self._ahead[wanted.model, choice.server.name] -= sum(other.config.weight for other in asked)

    def answered(self, wanted: Wanted, choice: Choice, report: Report) -> None: ...

    def reconfigure(self, routing: Routing, gone: Collection[str]) -> None:
        self._ahead = {(model, name): ahead for (model, name), ahead in self._ahead.items() if name not in gone}


class LeastBusy(RoundRobin):
    """The server with the fewest running requests for its weight; among equals, whose turn it is."""

    def choose(self, servers: Sequence[Server], wanted: Wanted) -> Choice:
        def order(server: Server) -> tuple[float, float]:
            return server.running / server.config.weight, -self.turn(server, wanted)

        return Choice(min(with_free_slots(servers), key=order), "least-busy")


class Latency(RoundRobin):
    """The server that is expected to begin its answer first: a moving average of its time to first token per byte of
    request, times those who are there already. One that was not measured yet comes first.
    """

    # What every request costs besides its prompt, in bytes of prompt.
    _BASE_BYTES = 2000
    # A server that was slow once, and got nothing since, is asked again: what is known of it fades.
    _FADES = 0.98

    def __init__(self, routing: Routing) -> None:
        super().__init__(routing)
        self._s_per_byte: dict[str, float] = {}

    def choose(self, servers: Sequence[Server], wanted: Wanted) -> Choice:
        slowest = max(self._s_per_byte.values(), default=0.0)

        def order(server: Server) -> tuple[float, float, float]:
            unmeasured = slowest if server.running else 0.0  # one is enough to measure it
            expected = self._s_per_byte.get(server.name, unmeasured) * (server.running + 1) / server.config.weight
            return expected, server.running / server.config.weight, -self.turn(server, wanted)

        return Choice(min(with_free_slots(servers), key=order), "latency")

    def sent(self, servers: Sequence[Server], wanted: Wanted, choice: Choice) -> None:
        super().sent(servers, wanted, choice)
        for other in servers:
            if other is not choice.server and other.name in self._s_per_byte:
                self._s_per_byte[other.name] *= self._FADES

    def answered(self, wanted: Wanted, choice: Choice, report: Report) -> None:
        if report.ttft_s is not None:
            server = choice.server
            measured = report.ttft_s / (wanted.request_bytes + self._BASE_BYTES)
            self._s_per_byte[server.name] = average(self._s_per_byte.get(server.name), measured)

    def reconfigure(self, routing: Routing, gone: Collection[str]) -> None:
        super().reconfigure(routing, gone)
        self._s_per_byte = {name: known for name, known in self._s_per_byte.items() if name not in gone}


class Prefix:
    """The server whose prompt cache holds the conversation, unless waiting for it takes longer than reading the prompt
    anew elsewhere.

    What a server would cost is counted in seconds: how long the request would wait for a slot, plus `stickiness` times
    how long the server would read what it has not cached. Conversations that were not seen before have a home, the same
    in every worker and on every machine. Being at home is worth as much of a cached prompt as there are conversations
    that other gateways take part in; without any, it only decides between equals.
    """

    # A server that works on something answers slower: this much of a request's time for each slot that is taken.
    _COMPANY = 0.1
    # Of a server that does not tell its slots.
    _USUAL_SLOTS = 4
    # A cached prompt of another conversation counts as one's own when it is at least this much of the prompt.
    _OWN_SHARE = 0.5

    def __init__(self, routing: Routing) -> None:
        self._stickiness = routing.prefix.stickiness
        self._index = PrefixIndex(routing.prefix.index_size)
        self._strangers = Strangers()
        self._least_busy = LeastBusy(routing)

    def choose(self, servers: Sequence[Server], wanted: Wanted) -> Choice:
        prompt = wanted.prompt
        if prompt is None:
            return self._least_busy.choose(servers, wanted)
        matches = self._index.find(prompt)
        found = {server: match for server in servers if (match := matches.get(server.name))}
        own_bytes = self._own_bytes(prompt)
        is_own = any(match.end >= own_bytes for match in found.values())
        cached = {server: match.end for server, match in found.items()}
        home = None
        if not is_own:  # a new conversation: what it shares with others is no reason to overload a server
            roomy = self._index.placed.below_share(servers, self._strangers.part)
            home = home_of(roomy, prompt.identity)
            cached = {server: size for server, size in cached.items() if server in roomy}
            cached[home] = max(cached.get(home, 0), int(prompt.bytes * self._strangers.part))
        rate = sum(server.read_s_per_byte for server in servers) / len(servers) * self._stickiness
        costs = {server: self._wait_s(server) + rate * (prompt.bytes - cached.get(server, 0)) for server in servers}
        best = min(servers, key=lambda server: (costs[server], server is not home, -cached.get(server, 0)))
        route = "rendezvous" if best is home else "prefix" if best in cached else "least-busy"
        why = _told(prompt, costs, cached) if log.isEnabledFor(logging.DEBUG) else ""
        return Choice(best, route, why, found.get(best), is_own)

    def _own_bytes(self, prompt: Prompt) -> int:
        if prompt.opening is None:
            return int(prompt.bytes * self._OWN_SHARE)
        return prompt.marks[prompt.opening].end

    def _wait_s(self, server: Server) -> float:
        slots = server.slots or self._USUAL_SLOTS
        there = server.running + server.waiting
        ahead = max(0, there - slots + 1) / slots
        return server.service_s * (ahead + self._COMPANY * min(there, slots) / slots) / server.config.weight

    def sent(self, servers: Sequence[Server], wanted: Wanted, choice: Choice) -> None:
        prompt = wanted.prompt
        if prompt is None:
            self._least_busy.sent(servers, wanted, choice)
            return
        self._index.remember(prompt, choice.server.name)
        if choice.route != "prefix" or not choice.is_known:
            self._index.placed.add(choice.server.name)
        if not choice.is_known and prompt.opening is not None:
            self._strangers.add(prompt.has_history)

    def answered(self, wanted: Wanted, choice: Choice, report: Report) -> None:
        if wanted.prompt and (report.ttft_s is not None or report.prompt_tokens is not None):
            self._index.confirm(wanted.prompt, choice.server.name)
        if wanted.prompt and choice.expected and report.prompt_tokens and report.cached_tokens is not None:
            cached_share = report.cached_tokens / report.prompt_tokens
            self._index.correct(wanted.prompt, choice.server.name, choice.expected, cached_share)

    def reconfigure(self, routing: Routing, gone: Collection[str]) -> None:
        self._stickiness = routing.prefix.stickiness
        self._index.resize(routing.prefix.index_size)
        self._least_busy.reconfigure(routing, gone)
        for name in gone:
            self._index.forget(name)


def _told(prompt: Prompt, costs: dict[Server, float], cached: dict[Server, int]) -> str:
    each = (
        f"{server.name} {cost:.3f} s ({server.running} running, {server.waiting} waiting, "
        f"{cached.get(server, 0)} bytes cached)"
        for server, cost in costs.items()
    )
    return f"prompt of {prompt.bytes} bytes: {', '.join(each)}"


STRATEGIES: dict[str, Callable[[Routing], Strategy]] = {
    "prefix": Prefix,
    "least-busy": LeastBusy,
    "round-robin": RoundRobin,
    "latency": Latency,
}
