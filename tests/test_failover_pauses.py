"""A server that failed, or asked to be left alone, gets nothing for a while; then one request tries it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from pairs import (
    CALM,
    OVERLOADED,
    Pair,
    events_of,
    good_body,
    good_reply,
    pairs,
    paused_for,
    row_of,
)
from upstream import CLOSE, STALL, Behaviour, Step, reply
from waiting import eventually

EJECT_S = 0.4
PAUSE_S = 2
# The gateway's clock is not the test's: it begins a pause with the answer that asks for it.
EARLY_S = 0.05
TESTS = (
    "seconds",
    "429",
    "date",
    "half-open",
    "half-open-fails",
    "ejection",
    "by-503",
    "not-in-a-row",
    "by-500",
    "events",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[dict[str, Pair]]:
    config = {**CALM["health"], "eject_after": 3, "eject_s": EJECT_S, "max_eject_s": 20}
    folder = tmp_path_factory.mktemp("pauses")
    with pairs(folder, confdir, [*TESTS, "alone"], alone=["alone"], health=config) as made:
        yield made


def returns(pair: Pair, within_s: float = 10) -> float:
    """Ask until the first server gets a request again, and give the moment when it did."""
    before = len(pair.first.times)

    def look() -> bool:
        assert pair.ask().status == 200
        return len(pair.first.times) > before

    eventually(look, "a request at the first server", within_s)
    return pair.first.times[before]


def fail(pair: Pair, times: int, fault: Behaviour = CLOSE) -> None:
    """The first server fails this often in a row; clients don't notice."""
    for _ in range(times):
        pair.first.plan(fault)
        assert pair.ask().body == good_body(pair.second.name)


# -- Retry-After -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["seconds", "429"])
def test_retry_after(made: dict[str, Pair], model: str) -> None:
    pair = made[model]
    status, seconds = (429, 1) if model == "429" else (503, PAUSE_S)
    pair.first.plan(paused_for(str(seconds), status))
    answer = pair.ask()
    assert answer.body == good_body(pair.second.name)
    assert row_of(pair.proxy, answer)["attempts"] == 2
    assert pair.state(pair.first) == "paused"
    assert returns(pair) - pair.first.times[0] >= seconds - EARLY_S
    eventually(lambda: pair.state(pair.first) == "up", "its return")
    assert pair.ask().body == good_body(pair.first.name)


def test_retry_after_a_date(made: dict[str, Pair]) -> None:
    """Dates have whole seconds: this one is between one and two seconds away."""
    pair = made["date"]
    until = (datetime.now(UTC) + timedelta(seconds=2)).replace(microsecond=0)
    pair.first.plan(paused_for(format_datetime(until, usegmt=True)))
    assert pair.ask().body == good_body(pair.second.name)
    assert pair.state(pair.first) == "paused"
    returns(pair, within_s=5)
    assert datetime.now(UTC) >= until - timedelta(seconds=EARLY_S)


def test_retry_after_of_the_only_server(made: dict[str, Pair]) -> None:
    """Its own answer for the one that met it; the others hear how long to wait."""
    pair = made["alone"]
    pair.first.plan(paused_for(str(PAUSE_S)))
    answer = pair.ask()
    assert (answer.status, answer.json()) == (503, {"error": {"message": "later"}})
    assert answer.values("retry-after") == [str(PAUSE_S)]
    assert row_of(pair.proxy, answer)["outcome"] == "error"
    answer = pair.ask()
    assert (answer.status, answer.code) == (503, "no_server_available")
    assert 1 <= int(answer.value("retry-after") or 0) <= PAUSE_S
    row = row_of(pair.proxy, answer)
    assert (row["outcome"], row["attempts"], len(pair.first.times)) == ("refused", 0, 1)
    eventually(lambda: pair.ask().status == 200, "its return")
    assert pair.first.times[1] - pair.first.times[0] >= PAUSE_S - EARLY_S


# -- half-open ---------------------------------------------------------------------------------------------------------


def trial(pair: Pair, pool: ThreadPoolExecutor) -> None:
    """Send requests until one of them is held by the first server."""
    before = len(pair.first.times)

    def look() -> bool:
        asked = pool.submit(pair.ask)
        eventually(lambda: asked.done() or len(pair.first.times) > before, "an answer, or a trial")
        return len(pair.first.times) > before

    eventually(look, "a trial")


@pytest.mark.parametrize("model", ["half-open", "half-open-fails"])
def test_one_request_tries_it(made: dict[str, Pair], model: str) -> None:
    """The others go elsewhere while that one is undecided."""
    pair = made[model]
    pair.first.plan(paused_for("1"))
    assert pair.ask().body == good_body(pair.second.name)
    end: Step = CLOSE if model == "half-open-fails" else good_reply(pair.first.name)
    pair.first.plan((STALL, end))
    with ThreadPoolExecutor(8) as pool:
        trial(pair, pool)
        answers = list(pool.map(lambda _: pair.ask(), range(6)))
        assert [answer.body for answer in answers] == [good_body(pair.second.name)] * 6
        assert len(pair.first.times) == 2
        decided = time.monotonic()
        pair.first.upstream.release()
    if model == "half-open":
        eventually(lambda: pair.state(pair.first) == "up", "its return")
        assert pair.ask().body == good_body(pair.first.name)
    else:
        assert pair.state(pair.first) == "ejected"
        assert returns(pair) - decided >= EJECT_S * 0.9


# -- ejection ----------------------------------------------------------------------------------------------------------


def test_ejection_and_growing_pauses(made: dict[str, Pair]) -> None:
    pair = made["ejection"]
    fail(pair, 3)
    ejected = time.monotonic()
    assert pair.state(pair.first) == "ejected"
    pair.first.plan(CLOSE, CLOSE)
    first = returns(pair)
    assert pair.state(pair.first) == "ejected"
    second = returns(pair)
    third = returns(pair)  # this one is well
    pauses = [first - ejected, second - first, third - second]
    assert all(pause >= EJECT_S * 2**number * 0.9 for number, pause in enumerate(pauses)), pauses
    eventually(lambda: pair.state(pair.first) == "up", "its return")
    fail(pair, 2)
    assert pair.state(pair.first) == "up"  # counted anew


def test_ejection_by_503(made: dict[str, Pair]) -> None:
    pair = made["by-503"]
    fail(pair, 3, OVERLOADED)
    assert pair.state(pair.first) == "ejected"


def test_failures_that_are_not_in_a_row(made: dict[str, Pair]) -> None:
    pair = made["not-in-a-row"]
    for _ in range(3):
        fail(pair, 2)
        assert pair.ask().body == good_body(pair.first.name)
    assert pair.state(pair.first) == "up"


def test_mistakes_of_clients_dont_count(made: dict[str, Pair]) -> None:
    """llama-server answers 500 to an image for a model of texts, and to inputs that are too long."""
    pair = made["by-500"]
    for status in (500, 400, 500, 501, 500, 413, 500, 500):
        pair.first.plan(reply({"error": {"message": "yours"}}, status))
        assert pair.ask().status == status
    assert pair.state(pair.first) == "up"
    assert pair.ask().body == good_body(pair.first.name)


def test_server_events(made: dict[str, Pair]) -> None:
    """One row for each change, with its reason. The first probe is one, too."""
    pair = made["events"]
    fail(pair, 3)
    returns(pair)
    changes = [("unknown", "up"), ("up", "ejected"), ("ejected", "up")]
    rows = eventually(
        lambda: found if len(found := events_of(pair.proxy, pair.first.name)) >= len(changes) else [], "the rows"
    )
    assert [(row["previous"], row["state"]) for row in rows] == changes
    assert rows[1]["reason"]
    assert all(datetime.fromisoformat(row["at"]).tzinfo for row in rows)
    assert [row["at"] for row in rows] == sorted(row["at"] for row in rows)
    assert {row["worker"] for row in rows} == {row_of(pair.proxy, pair.ask())["worker"]}
    others = events_of(pair.proxy, pair.second.name)
    assert [(row["previous"], row["state"]) for row in others] == [("unknown", "up")]
