"""The end of a request, once, wherever it comes: its server is freed, its row priced and handed to the books."""

import asyncio
import functools
import logging
import time
from collections.abc import Sequence

from gateway.attempts import Attempts
from gateway.exchange import Exchange
from gateway.ledger import Ledger
from gateway.limiter import Limiter
from gateway.quota import LimitEvent, Settlement
from gateway.records import Row
from gateway.shared_counters import SharedCounters

log = logging.getLogger(__name__)

# Counters on another machine may be out of reach: they hear of it later, and nobody waits longer than this.
COUNTERS_WAIT_S = 1.0


class Settler:
    """Ends requests. `shared` None: the ledger keeps the counters, too."""

    def __init__(self, attempts: Attempts, limiter: Limiter, ledger: Ledger, shared: SharedCounters | None) -> None:
        self._attempts = attempts
        self._limiter = limiter
        self._ledger = ledger
        self._shared = shared

    def settle(self, exchange: Exchange, outcome: str) -> "asyncio.Future[None]":
        """The future is done when the row is on disk, and what was used is counted. Raises nothing but what the ledger
        does when it is closed.
        """
        self._free_server(exchange, outcome)
        row = _final_row(exchange, outcome)
        settlements = self._settlements(exchange, row)
        if self._shared is None:
            return self._ledger.settle(row, settlements)
        counted = [self._shared.settle(settlement) for settlement in settlements]
        for future in counted:
            future.add_done_callback(self._note_events)
        return asyncio.ensure_future(_both(self._ledger.settle(row), counted))

    def _free_server(self, exchange: Exchange, outcome: str) -> None:
        """Give back what was claimed, and learn from an answer that ended well. A fault in either costs no row."""
        steps = [exchange.release, exchange.release]  # the second does nothing, unless the first has failed
        if outcome == "ok":
            steps.append(functools.partial(self._attempts.learn, exchange))
        for step in steps:
            try:
                step()
            except Exception:
                log.exception("a fault as a request's server is freed")

    def _settlements(self, exchange: Exchange, row: Row) -> Sequence[Settlement]:
        try:
            self._limiter.add_cost(row)
            return self._limiter.settlements(exchange, row)
        except Exception:
            log.exception("what a request used can't be counted: what it held is given back")
            return [Settlement(ask.id, ask.day, (), ask.rules) for ask in exchange.asks]

    def _note_events(self, counted: "asyncio.Future[list[LimitEvent]]") -> None:
        if not counted.cancelled() and counted.exception() is None:
            for event in counted.result():
                self._ledger.note(event)


async def _both(written: "asyncio.Future[None]", counted: "list[asyncio.Future[list[LimitEvent]]]") -> None:
    if counted:
        await asyncio.wait(counted, timeout=COUNTERS_WAIT_S)
    await written


def _final_row(exchange: Exchange, outcome: str) -> Row:
    try:
        return exchange.row(outcome, time.monotonic())
    except Exception:
        log.exception("what is known of an answer can't be told: its row goes without")
        exchange.relay = None
        return exchange.row(outcome, time.monotonic())
