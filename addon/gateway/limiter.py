"""Whether a request may come in now, what it holds while it runs, and what it has used at its end.

The counters say yes or no; here it is decided what they are asked, and what the client is told.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

import msgspec

from gateway import bounds, charges, endpoints, limits
from gateway.auth import Caller
from gateway.exchange import Exchange
from gateway.limit_replies import GRACE_S, headers_of, refusal
from gateway.limits import Rule
from gateway.patterns import ByModel
from gateway.prices import Price, Prices, Use, cost_micros
from gateway.quota import Ask, CountersUnavailable, Decision, Settlement, Standing
from gateway.records import Row, utc_now
from gateway.replies import Refusal
from gateway.settings import Config
from gateway.usage import FORMATS, is_use

log = logging.getLogger(__name__)

# Of one request; what is more is nonsense, and would not fit into the books.
MOST_MICROS = 10**15


class Counters(Protocol):
    """Where limits are counted."""

    async def admit(self, ask: Ask) -> Decision: ...

    async def standings(self, rules: tuple[Rule, ...]) -> tuple[Standing, ...]: ...


class Limiter:
    """The limits and prices of one config over somebody's counters."""

    def __init__(self, config: Config, counters: Counters, worker: str) -> None:
        self._counters = counters
        self._worker = worker
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """Other limits and prices from now on. What is counted stays."""
        self._section = config.limits
        self._fallbacks = config.fallbacks
        self._prices = Prices(config.prices.currency, config.prices.models)
        self._models = ByModel(config.limits.models)
        self._warned: set[str | None] = set()

    def rules_of(self, caller: Caller, model: str | None = None) -> tuple[Rule, ...]:
        """What limits a caller's request for a model: its own limits, its team's, the model's, everybody's."""
        return tuple(
            limits.rules(
                (caller.scope, caller.limits),
                (f"team:{caller.team}", caller.team_limits),
                (f"model:{model}", self._models.of(model) or limits.NONE),
                ("all", self._section.all),
            )
        )

    async def standings(self, rules: Sequence[Rule]) -> tuple[Standing, ...]:
        """How much of them is used now. Raises CountersUnavailable."""
        return await self._counters.standings(tuple(rules)) if rules else ()

    async def admit(self, exchange: Exchange) -> None:
        """Let a request in, and hold what it may use. Raises Refusal: 429, or 503 when nobody can tell."""
        rules = self.rules_of(exchange.caller, exchange.served_model)
        if any(budget.unit == "money" for rule in rules for budget in rule.limits.budgets):
            self._warn_without_price(exchange.served_model)
        if rules:
            await self._admit(exchange, self._ask(exchange, exchange.id, rules))

    async def admit_fallback(self, exchange: Exchange) -> None:
        """Another model answers than the one that was let in: its limits hold as well. Raises Refusal."""
        model = exchange.served_model
        rules = tuple(limits.rules((f"model:{model}", self._models.of(model) or limits.NONE)))
        scopes = {rule.scope for ask in exchange.asks for rule in ask.rules}
        if exchange.fallback_from is not None and rules and rules[0].scope not in scopes:
            await self._admit(exchange, self._ask(exchange, f"{exchange.id} {model}", rules))

    def settlements(self, exchange: Exchange, row: Row) -> Sequence[Settlement]:
        """What a request's end means to the counters, by its final row: one for each admission, one at least."""
        use = charges.charged(exchange, row)
        price = self._prices.of(row.served_model)
        micros = cost_micros(price, use) if price else None
        day = exchange.asks[0].day if exchange.asks else row.started_at[:10]
        whose = [exchange.caller.scope, *([f"team:{exchange.caller.team}"] if exchange.caller.team else [])]
        end = Settlement(
            id=row.id,
            day=day,
            scopes=tuple(whose),
            tokens=charges.tokens_of(use),
            micros=min(micros, MOST_MICROS) if micros is not None else None,
            was_served=row.attempts > 0 and row.outcome not in ("refused", "unreachable"),
        )
        ends = []
        for number, ask in enumerate(exchange.asks):
            budgeted = [rule.scope for rule in ask.rules if rule.limits.budgets]
            scopes = tuple(dict.fromkeys([*(whose if number == 0 else []), *budgeted]))
            ends.append(msgspec.structs.replace(end, id=ask.id, scopes=scopes, rules=ask.rules))
        return ends or [end]

    def add_cost(self, row: Row) -> None:
        """What the request costs by today's prices. A row without a price, or without use, has none."""
        price = self._prices.of(row.served_model)
        if price is None or not is_use(endpoints.canonical(row.endpoint)):
            return
        micros = cost_micros(price, charges.told(row))
        if micros is not None:
            row.cost_micros, row.currency = min(micros, MOST_MICROS), self._prices.currency

    def _warn_without_price(self, model: str | None) -> None:
        if self._prices.of(model) is None and model not in self._warned:
            self._warned.add(model)
            log.warning("prices.models has no price for %r: budgets of money don't see its use", model)

    async def _admit(self, exchange: Exchange, ask: Ask) -> None:
        exchange.asks.append(ask)
        decision = await self._decide(ask)
        denial = decision.denial
        if denial and denial.standing.limit in ("rpm", "tpm") and denial.wait_s and denial.wait_s <= GRACE_S:
            await asyncio.sleep(denial.wait_s)
            if not exchange.settling:  # what ends before it comes in must hold nothing
                decision = await self._decide(ask)
        exchange.limit_headers = exchange.limit_headers | headers_of(decision.standings)
        if decision.denial:
            exchange.asks.remove(ask)
            raise refusal(decision.denial, ask, self._prices.currency, exchange.limit_headers)

    async def _decide(self, ask: Ask) -> Decision:
        try:
            return await self._counters.admit(ask)
        except CountersUnavailable as error:
            message = "Limits can't be checked at the moment."
            raise Refusal(503, "limits_unavailable", message, headers={"retry-after": "5"}) from error

    def _ask(self, exchange: Exchange, ask_id: str, rules: tuple[Rule, ...]) -> Ask:
        """What the request holds until its use is known."""
        ask = Ask(ask_id, self._worker, utc_now()[:10], rules)
        endpoint, is_json = exchange.meaning, exchange.asked.kind == "json"
        if self._section.reserve == "off" or not is_use(endpoint) or not (is_json or exchange.body):
            return ask
        price = self._dearest(exchange)
        if self._section.reserve == "max_tokens":
            tokens = self._bound(exchange)
            micros = cost_micros(
                Price(prompt=max(price.prompt, price.cached or 0, price.completion)), Use(prompt=tokens)
            )
            return msgspec.structs.replace(ask, tokens=tokens, micros=micros or 0, is_bound=True)
        if not is_json or endpoint not in FORMATS:
            return ask
        tokens = bounds.estimate(exchange.body)
        return msgspec.structs.replace(ask, tokens=tokens, micros=cost_micros(price, Use(prompt=tokens)) or 0)

    def _bound(self, exchange: Exchange) -> int:
        """The most that a request can use, which its body says from now on."""
        default = self._section.default_max_tokens
        if exchange.asked.kind != "json":  # sound, say: of its size nothing follows
            return default
        bound = bounds.bound(exchange.meaning, exchange.body, exchange.asked.answers, default)
        exchange.body = bound.body or exchange.body
        return bound.tokens

    def _dearest(self, exchange: Exchange) -> Price:
        """The highest prices of the models that may answer."""
        models = [exchange.served_model, *self._fallbacks.get(exchange.served_model or "", ())]
        prices = [price for price in map(self._prices.of, models) if price]
        return Price(
            prompt=max((price.prompt for price in prices), default=0),
            cached=max((price.prompt if price.cached is None else price.cached for price in prices), default=0),
            completion=max((price.completion for price in prices), default=0),
        )
