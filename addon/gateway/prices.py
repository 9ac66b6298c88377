"""What use costs: prices by model -> integer micro-units of the currency, computed once, when a request is settled."""

import functools
from collections.abc import Mapping
from decimal import Decimal

import msgspec

from gateway.patterns import ByModel

MICRO = 1_000_000


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Per million tokens. `cached` None: a cached token costs what a prompt token does.

    `gpu_second`: per second that the server says it worked (`prompt_ms + predicted_ms`).
    """

    prompt: float = 0
    cached: float | None = None
    completion: float = 0
    gpu_second: float = 0


class Use(msgspec.Struct, frozen=True):
    """What a request used. None: unknown."""

    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None
    gpu_ms: float | None = None


class _Rates(msgspec.Struct, frozen=True):
    """A price in whole millionths of what it is written in: sums of them are exact."""

    prompt: int
    cached: int
    completion: int
    gpu_second: int


@functools.lru_cache(maxsize=256)
def _rates(price: Price) -> _Rates:
    def whole(amount: float) -> int:
        return round(Decimal(str(amount)) * MICRO)

    cached = price.prompt if price.cached is None else price.cached
    return _Rates(whole(price.prompt), whole(cached), whole(price.completion), whole(price.gpu_second))


def cost_micros(price: Price, use: Use) -> int | None:
    """Micro-units, rounded half up. None: nothing that has a price is known. What else is unknown adds nothing."""
    rates = _rates(price)
    cached = min(use.cached or 0, use.prompt or 0)
    # A price per million tokens is as many micro-units per token; one per second is as many per microsecond.
    parts = [
        (rates.prompt, None if use.prompt is None else use.prompt - cached),
        (rates.cached, None if use.prompt is None else cached),
        (rates.completion, use.completion),
        (rates.gpu_second, None if use.gpu_ms is None else round(use.gpu_ms * 1000)),
    ]
    known = [rate * amount for rate, amount in parts if rate and amount is not None]
    if not known:
        return None if any(rate for rate, _ in parts) else 0
    return (sum(known) + MICRO // 2) // MICRO


class Prices(ByModel[Price]):
    """Prices by model, in one currency."""

    def __init__(self, currency: str, models: Mapping[str, Price]) -> None:
        super().__init__(models)
        self.currency = currency
