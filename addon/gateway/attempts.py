"""From what is wanted to a claimed server, and after a failed attempt to the next one."""

import contextlib
import logging
import random
import time
from datetime import UTC, datetime

from gateway import failover
from gateway.balancer import Balancer, NoServer, Search
from gateway.discovery import Prober
from gateway.exchange import Exchange
from gateway.failover import Failure
from gateway.prompts import read_prompt
from gateway.replies import Refusal
from gateway.servers import Server
from gateway.settings import Config
from gateway.strategies import Wanted
from gateway.usage import FORMATS

log = logging.getLogger(__name__)

# An error that a server has begun to tell is told in full by then.
ERROR_BODY_S = 5.0


class Attempts:
    """Finds servers for exchanges, and tells servers' health what became of them."""

    def __init__(self, config: Config, balancer: Balancer, prober: Prober) -> None:
        self._config = config
        self._balancer = balancer
        self._prober = prober

    def reconfigure(self, config: Config) -> None:
        self._config = config

    def begin(self, exchange: Exchange) -> None:
        """The model is known."""
        exchange.search = Search(exchange.caller, self._wanted(exchange, exchange.served_model))
        exchange.search.is_over = exchange.has_left

    async def find(self, exchange: Exchange) -> bool:
        """Claim a server, for a fallback model if there is none for the one that was asked for. False: the client left.

        Raises NoServer.
        """
        search, since = exchange.search, time.monotonic()
        assert search
        try:
            others = self._fallbacks(exchange)
            for model in [exchange.served_model, *others] if others else []:
                with contextlib.suppress(NoServer):
                    return await self._find(exchange, model, may_fall_back=True)
            return await self._find(exchange, exchange.served_model)
        finally:
            exchange.waited_s += time.monotonic() - since

    async def _find(self, exchange: Exchange, model: str | None, *, may_fall_back: bool = False) -> bool:
        """For one model. `may_fall_back`: not with its last resorts, there are others."""
        search = exchange.search
        assert search
        if search.wanted.model != model:
            search.wanted = self._wanted(exchange, model)
        search.may_fall_back = may_fall_back
        if not self._balancer.take(search):
            await self._balancer.wait(search)
        if search.is_over:
            return False
        if model != exchange.served_model:
            exchange.fallback_from, exchange.served_model = exchange.fallback_from or exchange.served_model, model
        return True

    async def find_again(self, exchange: Exchange) -> bool:
        """After a failed attempt: as `find`. Raises Refusal when no other attempt is to be made."""
        failure, search = exchange.failure, exchange.search
        assert failure and search and search.claim
        server = search.claim.server
        log.info("server %s: %s (attempt %d)", server.name, failure.message, exchange.attempts)
        # A connection that was used before may just have been closed as idle: its server is fine.
        was_idle = failure.kind == "closed" and exchange.connection_was_used and exchange.head_status is None
        if not was_idle:
            self._blame(server, exchange, failure)
            if not failure.is_loading:
                search.tried.append(server)
        search.release()  # after its server was told: a trial that failed must not let another one in
        refusal = self._given_up(exchange)
        if self._is_exhausted(exchange, failure):
            raise refusal
        if not was_idle:
            await self._back_off(exchange)
        try:
            return await self.find(exchange)
        except NoServer:
            raise refusal from None

    def _is_exhausted(self, exchange: Exchange, failure: Failure) -> bool:
        """Attempts are bounded in number; those that meet a model that loads, in time."""
        if not failure.is_loading:
            return exchange.attempts - exchange.met_loading >= self._config.routing.max_attempts
        now = time.monotonic()
        exchange.met_loading += 1
        exchange.loading_since = exchange.loading_since or now
        return now - exchange.loading_since >= self._config.loading_wait_s

    def _blame(self, server: Server, exchange: Exchange, failure: Failure) -> None:
        # On a path that we don't know, a status may be an answer like any other: it is held against nobody.
        if failure.kind != "answered" or exchange.meaning in FORMATS:
            failover.tell(server, failure, time.monotonic(), datetime.now(UTC))
            if server.health.state in ("down", "loading"):
                self._prober.ask_soon(server)

    async def _back_off(self, exchange: Exchange) -> None:
        routing, search = self._config.routing, exchange.search
        assert search
        doublings = min(exchange.attempts - 1, 30)  # a model may load for thousands of attempts
        pause_s = min(routing.backoff_s * 2**doublings, routing.max_backoff_s)
        began = time.monotonic()
        await self._balancer.pause(search, pause_s * random.uniform(0.5, 1.5))
        exchange.waited_s += time.monotonic() - began

    def _given_up(self, exchange: Exchange) -> Refusal:
        failure = exchange.failure
        assert failure
        if failure.kind == "timed_out":
            message = f"The server sent nothing within {self._config.first_byte_timeout_s:g} seconds."
            return Refusal(504, "upstream_timeout", message)
        return Refusal(502, "upstream_unreachable", f"The server {failure.message}.")

    def began(self, exchange: Exchange) -> None:
        """A server's answer is passed on: whatever it says, the server is well, unless it says that it is not."""
        claim = exchange.search.claim if exchange.search else None
        if claim and exchange.sent is not None and exchange.status not in failover.RETRIED:
            health = claim.server.health
            before = health.state
            health.succeeded(exchange.sent)
            if health.state != before:  # others may have waited for it
                self._balancer.changed()

    def learn(self, exchange: Exchange) -> None:
        """What an answer that ended well tells of its server."""
        search, report = exchange.search, exchange.report()
        if search and search.choice and report and exchange.sent is not None:
            self._balancer.answered(search, time.monotonic() - exchange.sent, report)

    def is_overdue(self, exchange: Exchange, now: float) -> bool:
        """Whether a server is silent for so long that it counts as failed."""
        silent_s, server = exchange.silent_s(now), exchange.server
        is_down = server is not None and server.health.state == "down"
        if exchange.has_begun and not is_down:  # between two events it may think
            return False
        if silent_s > self._config.first_byte_timeout_s:
            return True
        if exchange.is_answering or server is None:
            return False
        # One that does not even answer its probe will not answer this either, and another one may.
        is_lost = is_down and self._balancer.has_other(server, exchange.served_model)
        return is_lost or (exchange.head_status in failover.RETRIED and silent_s > ERROR_BODY_S)

    def broke_off(self, exchange: Exchange) -> None:
        """A server ended an answer in the midst of it."""
        if exchange.server:
            exchange.server.health.failed(time.monotonic(), "broke off an answer")

    def _wanted(self, exchange: Exchange, model: str | None) -> Wanted:
        prompt = None
        if exchange.asked.kind == "json" and self._balancer.looks_at_prompts(model):
            prompt = read_prompt(model, exchange.endpoint, exchange.body)
        return Wanted(model, prompt, exchange.request_bytes)

    def _fallbacks(self, exchange: Exchange) -> list[str]:
        """The models that may stand in for the one that is served now."""
        wanted = exchange.fallback_from or exchange.served_model or ""
        models = [model for model in self._config.fallbacks.get(wanted, ()) if exchange.caller.may_use(model)]
        at = models.index(exchange.served_model) + 1 if exchange.served_model in models else 0
        return models[at:]
