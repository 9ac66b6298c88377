"""What use costs: whole micro-units, once, and nothing made up where something is unknown."""

import pytest

from gateway.prices import Price, Prices, Use, cost_micros

PRICE = Price(prompt=1.0, cached=0.1, completion=10.0)

CASES: dict[str, tuple[Price, Use, int | None]] = {
    "all of it": (PRICE, Use(60, 20, 40), 40 + 2 + 400),
    "cached costs as prompt, unless it has a price": (Price(prompt=1.0), Use(60, 20, 40), 60),
    "cached for nothing": (Price(prompt=1.0, cached=0), Use(60, 20, 40), 40),
    "nothing known": (PRICE, Use(), None),
    "nothing that costs is known": (Price(completion=1), Use(prompt=5), None),
    "what is unknown adds nothing": (PRICE, Use(completion=3), 30),
    "more cached than there is": (PRICE, Use(5, 9, None), 1),
    "for free": (Price(), Use(5, 0, 5), 0),
    "seconds of a GPU": (Price(gpu_second=0.5), Use(gpu_ms=1500.0), 750_000),
    "halves go up": (Price(prompt=0.5), Use(prompt=1), 1),
    "less than half": (Price(prompt=0.49), Use(prompt=1), 0),
    "binary fractions don't show": (Price(prompt=0.1), Use(prompt=3), 0),
    "a large one": (Price(completion=75), Use(completion=200_000), 15_000_000),
}


@pytest.mark.parametrize(("price", "use", "micros"), CASES.values(), ids=CASES)
def test_cost(price: Price, use: Use, micros: int | None) -> None:
    assert cost_micros(price, use) == micros


def test_of_which_model() -> None:
    exact, wide = Price(prompt=1), Price(prompt=2)
    prices = Prices("EUR", {"qwen*": wide, "qwen3-8b": exact})
    assert [prices.of(model) for model in ("qwen3-8b", "qwen3-32b", "llama", None)] == [exact, wide, None, None]
