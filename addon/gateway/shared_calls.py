"""What the script that keeps the counters in Redis is asked, and answers: records to MessagePack and back."""

import math
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import msgspec

from gateway.limits import PERIODS, Budget, Rule, period_end, period_of
from gateway.quota import Ask, CountersUnavailable, Decision, LimitEvent, Settlement, Standing


class Call(msgspec.Struct, frozen=True):
    """An operation of the script, and its message."""

    operation: str
    message: bytes


class Lease(msgspec.Struct, frozen=True):
    """`had`: the lease was still there. `dead`: workers that have none."""

    had: bool
    dead: tuple[str, ...]


class _Limit(msgspec.Struct, frozen=True, omit_defaults=True):
    """A limit as the script takes it. `allowed` of rps: its burst. `first_day`: of the budget's period that it is now,
    which ends at `ends_at`."""

    scope: str
    limit: str
    allowed: float
    rps: float | None = None
    per: str | None = None
    unit: str | None = None
    first_day: str | None = None
    ends_at: float | None = None


class _Event(msgspec.Struct, frozen=True):
    at: float
    scope: str
    per: str
    unit: str
    share: float
    allowed: int
    used: int


def admission(ask: Ask) -> Call:
    message = {
        "id": ask.id,
        "worker": ask.worker,
        "tokens": ask.tokens,
        "micros": ask.micros,
        "is_bound": ask.is_bound,
        "scopes": list(dict.fromkeys(rule.scope for rule in ask.rules)),
        "limits": _limits(ask.rules, ask.day),
    }
    return Call("admit", msgspec.msgpack.encode(message))


def settling(settlement: Settlement) -> Call:
    message = {
        "id": settlement.id,
        "tokens": settlement.tokens or 0,
        "micros": settlement.micros or 0,
        "was_served": settlement.was_served,
        "scopes": list(dict.fromkeys(settlement.scopes)),
        "first_days": {per: period_of(settlement.day, per) for per in PERIODS},
        "budgets": [
            _budget(rule.scope, budget, settlement.day)
            for rule in settlement.rules
            if rule.scope in settlement.scopes
            for budget in rule.limits.budgets
        ],
    }
    return Call("settle", msgspec.msgpack.encode(message))


def asking(rules: Iterable[Rule], now: float) -> Call:
    day = datetime.fromtimestamp(now, UTC).date().isoformat()
    return Call("standings", msgspec.msgpack.encode({"limits": _limits(rules, day)}))


def decision(reply: bytes) -> Decision:
    found = msgspec.msgpack.decode(reply, type=Decision | None)
    if found is None:
        raise CountersUnavailable("the request was given up before it was admitted")
    return found


def events(reply: bytes) -> list[LimitEvent]:
    return [
        LimitEvent(
            at=datetime.fromtimestamp(event.at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z",
            scope=event.scope,
            per=event.per,
            unit=event.unit,
            share=event.share,
            allowed=event.allowed,
            used=event.used,
        )
        for event in msgspec.msgpack.decode(reply, type=list[_Event])
    ]


def standings(reply: bytes) -> tuple[Standing, ...]:
    return msgspec.msgpack.decode(reply, type=tuple[Standing, ...])


def renewal(worker: str, keep_s: float) -> Call:
    return Call("renew", msgspec.msgpack.encode({"worker": worker, "keep_ms": math.ceil(keep_s * 1000)}))


def leaving(worker: str) -> Call:
    return Call("leave", msgspec.msgpack.encode({"worker": worker}))


def giving_back(worker: str) -> Call:
    return Call("give_back", msgspec.msgpack.encode({"worker": worker}))


def lease(reply: bytes) -> Lease:
    return msgspec.msgpack.decode(reply, type=Lease)


def count(reply: bytes) -> int:
    return msgspec.msgpack.decode(reply, type=int)


def _limits(rules: Iterable[Rule], day: str) -> list[_Limit]:
    """In the order that they are asked in."""
    return [limit for rule in rules for limit in _of_rule(rule, day)]


def _of_rule(rule: Rule, day: str) -> Iterator[_Limit]:
    scope, limits = rule.scope, rule.limits
    if limits.concurrency is not None:
        yield _Limit(scope, "concurrency", limits.concurrency)
    if limits.rps is not None:
        burst = limits.burst if limits.burst is not None else max(1, math.ceil(limits.rps))
        yield _Limit(scope, "rps", burst, rps=limits.rps)
    if limits.rpm is not None:
        yield _Limit(scope, "rpm", limits.rpm)
    if limits.tpm is not None:
        yield _Limit(scope, "tpm", limits.tpm)
    for budget in limits.budgets:
        yield _budget(scope, budget, day)


def _budget(scope: str, budget: Budget, day: str) -> _Limit:
    end = period_end(day, budget.per)
    return _Limit(
        scope,
        "budget",
        budget.amount,
        per=budget.per,
        unit=budget.unit,
        first_day=period_of(day, budget.per),
        ends_at=end.timestamp() if end else None,
    )
