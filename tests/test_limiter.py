"""What the counters are asked, and what the client is told of their answer."""

from typing import Any

import msgspec
import pytest

from gateway.auth import Caller
from gateway.exchange import Exchange
from gateway.limit_replies import duration
from gateway.limiter import Limiter
from gateway.limits import Budget, Limits, Rule
from gateway.prices import Price
from gateway.quota import Ask, CountersUnavailable, Decision, Denial, Standing
from gateway.records import Row, utc_now
from gateway.replies import Refusal
from gateway.settings import Config, LimitsSection, PricesSection, Server
from gateway.wire import Asked

BODY = b'{"model":"m","max_tokens":10,"messages":[]}'
ALICE = Caller(3, "alice", (), limits=Limits(rpm=5), team="research", team_limits=Limits(tpm=100))


class Told:
    """Counters that answer as they are told, and remember what they were asked."""

    def __init__(self, *decisions: Decision | Exception) -> None:
        self.decisions = list(decisions)
        self.asked: list[Ask] = []

    async def admit(self, ask: Ask) -> Decision:
        self.asked.append(ask)
        decision = self.decisions.pop(0)
        if isinstance(decision, Exception):
            raise decision
        return decision

    async def standings(self, rules: tuple[Rule, ...]) -> tuple[Standing, ...]:
        raise AssertionError("nobody asks")


def limiter(told: Told, **section: Any) -> Limiter:
    prices = PricesSection("EUR", {"m": Price(prompt=1, completion=10)})
    return Limiter(Config((Server("a", "http://h:1"),), limits=LimitsSection(**section), prices=prices), told, "worker")


def exchange(caller: Caller = ALICE, body: bytes = BODY, endpoint: str = "/v1/chat/completions") -> Exchange:
    made = Exchange("id", caller, endpoint, endpoint, "2026-11-21T10:00:00.000Z", 0.0, "worker", 10**8)
    made.body, made.request_bytes, made.served_model = body, len(body), "m"
    made.asked = Asked(kind="json", model="m")
    return made


RULES = (Rule("key:3", Limits(rpm=5)), Rule("team:research", Limits(tpm=100)))
ASK = Ask("id", "worker", utc_now()[:10], RULES)
PROMPT = msgspec.structs.replace(ASK, tokens=11, micros=11)

HELD: dict[str, tuple[dict[str, Any], Exchange, Ask]] = {
    "nothing": ({"reserve": "off"}, exchange(), ASK),
    "the prompt's estimate": ({}, exchange(), PROMPT),
    "the most that it can use, at the highest price": (
        {"reserve": "max_tokens"},
        exchange(),
        msgspec.structs.replace(ASK, tokens=43 + 512 + 10, micros=5650, is_bound=True),
    ),
    "an unknown path": ({}, exchange(endpoint="/v1/new"), ASK),
    "the most on an unknown path": (
        {"reserve": "max_tokens", "default_max_tokens": 100},
        exchange(endpoint="/v1/new"),
        msgspec.structs.replace(ASK, tokens=43 + 512 + 100, micros=6550, is_bound=True),
    ),
    "only counting": ({}, exchange(endpoint="/v1/messages/count_tokens"), ASK),
    "no answer is written there": (
        {"reserve": "max_tokens"},
        exchange(endpoint="/v1/embeddings"),
        msgspec.structs.replace(ASK, tokens=43 + 512, micros=5550, is_bound=True),
    ),
}


@pytest.mark.parametrize(("section", "request_", "ask"), HELD.values(), ids=HELD)
async def test_what_is_held(section: dict[str, Any], request_: Exchange, ask: Ask) -> None:
    told = Told(Decision(None))
    await limiter(told, **section).admit(request_)
    assert told.asked == [ask]
    assert request_.asks == [ask]


async def test_without_limits_nobody_is_asked() -> None:
    request = exchange(Caller(3, "bob", ()))
    await limiter(Told()).admit(request)
    assert (request.asks, request.limit_headers) == ([], {})


def test_whose_limits() -> None:
    one = limiter(Told(), all=Limits(rpm=9), models={"m*": Limits(rpm=7), "mini": Limits(rpm=8)})
    assert one.rules_of(ALICE, "mini") == (*RULES, Rule("model:mini", Limits(rpm=8)), Rule("all", Limits(rpm=9)))
    assert one.rules_of(ALICE, "mx") == (*RULES, Rule("model:mx", Limits(rpm=7)), Rule("all", Limits(rpm=9)))
    assert one.rules_of(ALICE) == (*RULES, Rule("all", Limits(rpm=9)))


def standing(limit: str, **more: Any) -> Standing:
    return Standing(**{"scope": "key:3", "limit": limit, "allowed": 5, "used": 5, **more})


# denial -> status, code, Retry-After, whether to retry, words of the message
DENIALS: dict[str, tuple[Denial, str, str, bool, str]] = {
    "a minute's requests": (
        Denial(standing("rpm"), 58.2),
        "rate_limit_exceeded",
        "58",
        True,
        "The rate of this API key is 5 requests per minute, and is used up. Try again in 58.2s.",
    ),
    "a bit more than it was": (Denial(standing("rpm"), 58.3), "rate_limit_exceeded", "59", True, "58.3s"),
    "a team's tokens": (
        Denial(standing("tpm", scope="team:research"), 30.0),
        "rate_limit_exceeded",
        "30",
        True,
        "The rate of the team 'research' is 5 tokens per minute, and is used up.",
    ),
    "nothing allowed": (Denial(standing("rpm"), None), "rate_limit_exceeded", "3600", False, "won't help"),
    "at once": (Denial(standing("concurrency", scope="all"), 1.0), "rate_limit_exceeded", "1", True, "all users"),
    "a month's money": (
        Denial(standing("budget", per="month", unit="money", allowed=2_500_000, used=2_500_000), 86400.0),
        "insufficient_quota",
        "86400",
        False,
        "The budget of this API key is 2.5 EUR per month, and is used up. Try again in 24h0m0s.",
    ),
    "all tokens for ever": (
        Denial(standing("budget", per="total", unit="tokens", allowed=1_000_000, used=1_000_000), None),
        "insufficient_quota",
        "3600",
        False,
        "this API key is 1,000,000 tokens, and is used up. Waiting won't help",
    ),
}


@pytest.mark.parametrize(("denial", "code", "after", "retry", "words"), DENIALS.values(), ids=DENIALS)
async def test_a_denial(denial: Denial, code: str, after: str, retry: bool, words: str) -> None:
    request = exchange()
    with pytest.raises(Refusal) as caught:
        await limiter(Told(Decision(denial, (denial.standing,)))).admit(request)
    refusal = caught.value
    assert (refusal.status, refusal.code, refusal.headers["retry-after"]) == (429, code, after)
    assert ("x-should-retry" not in refusal.headers) == retry
    assert words in refusal.message
    assert request.asks == []


async def test_a_request_that_may_need_more_than_is_left() -> None:
    denial = Denial(standing("budget", per="day", unit="tokens", allowed=250, used=0), None)
    with pytest.raises(Refusal, match="up to 565 tokens, and 250 tokens are left"):
        await limiter(Told(Decision(denial)), reserve="max_tokens").admit(exchange())


async def test_budgets_of_money_without_a_price(caplog: pytest.LogCaptureFixture) -> None:
    caller = Caller(3, "alice", (), limits=Limits(budgets=(Budget("day", money=1),)))
    one = limiter(Told(Decision(None), Decision(None)))
    for _ in range(2):
        request = exchange(caller)
        request.served_model = "unpriced"
        await one.admit(request)
    assert caplog.messages == ["prices.models has no price for 'unpriced': budgets of money don't see its use"]


async def test_a_fallback_has_limits_of_its_own() -> None:
    told = Told(Decision(None), Decision(None))
    one = limiter(told, models={"n": Limits(rpm=1)})
    request = exchange()
    await one.admit(request)
    await one.admit_fallback(request)
    request.fallback_from, request.served_model = "m", "n"
    await one.admit_fallback(request)
    await one.admit_fallback(request)
    assert [(ask.id, ask.rules) for ask in told.asked] == [("id", RULES), ("id n", (Rule("model:n", Limits(rpm=1)),))]
    ends = one.settlements(request, row(prompt_tokens=5))
    assert [(end.id, end.scopes, end.rules, end.tokens) for end in ends] == [
        ("id", ("key:3", "team:research"), RULES, 5),
        ("id n", (), (Rule("model:n", Limits(rpm=1)),), 5),
    ]


async def test_a_window_that_opens_at_once_is_waited_for() -> None:
    told = Told(Decision(Denial(standing("rpm"), 0.001)), Decision(None))
    await limiter(told).admit(exchange())
    assert len(told.asked) == 2


async def test_counters_that_fail_let_nobody_in() -> None:
    with pytest.raises(Refusal) as caught:
        await limiter(Told(CountersUnavailable("gone"))).admit(exchange())
    assert (caught.value.status, caught.value.code) == (503, "limits_unavailable")


async def test_what_the_answer_says_is_left() -> None:
    """Of several limits, those that have the least left."""
    standings = (
        standing("rpm", allowed=60, used=10, reset_s=60.0),
        standing("rpm", scope="all", allowed=100, used=95, reset_s=12.34),
        standing("tpm", allowed=1000, used=100, held=950, reset_s=0.05),
        standing("budget", allowed=1, per="day", unit="tokens"),
    )
    request = exchange()
    await limiter(Told(Decision(None, standings))).admit(request)
    assert request.limit_headers == {
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-requests": "5",
        "x-ratelimit-reset-requests": "12.4s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "50ms",
    }


DURATIONS = {
    0: "0ms",
    0.0004: "1ms",
    0.12: "120ms",
    6.46: "6.5s",
    59.95: "1m0s",
    60: "1m0s",
    61.2: "1m2s",
    12000: "3h20m0s",
}


@pytest.mark.parametrize(("seconds", "text"), DURATIONS.items())
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def row(**more: Any) -> Row:
    known = {"id": "id", "started_at": "2026-11-21T10:00:00.000Z", "outcome": "ok", "worker": "w", "attempts": 1}
    return Row(**{**known, "endpoint": "/v1/chat/completions", "served_model": "m", **more})


ENDS: dict[str, tuple[Row, tuple[int | None, int | None, bool]]] = {
    "used": (row(prompt_tokens=60, completion_tokens=40), (100, 460, True)),
    "half known": (row(completion_tokens=4, outcome="client_closed"), (4, 40, True)),
    "unknown": (row(outcome="error"), (None, None, True)),
    "refused": (row(outcome="refused", attempts=0), (None, None, False)),
    "unreachable": (row(outcome="unreachable"), (None, None, False)),
    "left the queue": (row(outcome="client_closed", attempts=0), (None, None, False)),
    "only counted": (row(endpoint="/v1/messages/count_tokens", prompt_tokens=60), (None, None, True)),
    "no price": (row(served_model="n", prompt_tokens=60), (60, None, True)),
}


@pytest.mark.parametrize(("end", "expected"), ENDS.values(), ids=ENDS)
def test_the_end(end: Row, expected: tuple[int | None, int | None, bool]) -> None:
    one, request = limiter(Told()), exchange(endpoint=end.endpoint)
    request.asks = [ASK]
    one.add_cost(end)
    (settlement,) = one.settlements(request, end)
    assert (settlement.tokens, settlement.micros, settlement.was_served) == expected
    assert (settlement.scopes, settlement.rules) == (("key:3", "team:research"), RULES)
    assert (end.cost_micros, end.currency) == (expected[1], "EUR" if expected[1] is not None else None)
