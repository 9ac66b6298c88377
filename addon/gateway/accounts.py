"""The counters behind limits and budgets, in usage.db: exact over all workers of a machine, and there after a restart.

The ledger's thread calls this within its transactions: a request's use is booked in the same commit as its row. A log
of the last minute stands beside its sums, so that a decision costs the same however many requests it is about.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from sqlite3 import Connection
from typing import NamedTuple

from gateway.limits import WINDOW_S, Budget, Limits, Rule, period_end, period_of
from gateway.quota import Ask, Decision, Denial, LimitEvent, Settlement, Standing

# When a request that runs stands in the way: it may end at any time.
MAY_END_S = 1.0
SHARES = (0.8, 1.0)
# Times since 1970 are floats of a quarter of a microsecond, and sums of them drift.
_TOLERANCE_S = 1e-4


@dataclass
class _Counter:
    """What is counted of one scope. `tat`: when the next request would come if all came evenly (GCRA), in seconds.
    `last_request_at`: if it came just now. `spent`: of budgets that were asked for.
    """

    scope: str
    requests: int = 0
    tokens: int = 0
    running: int = 0
    held_tokens: int = 0
    held_micros: int = 0
    tat: float = 0.0
    last_request_at: float | None = None
    spent: dict[Budget, int] = field(default_factory=dict)

    def held(self, budget: Budget) -> int:
        return self.held_tokens if budget.unit == "tokens" else self.held_micros


class _Denied(NamedTuple):
    """A limit that stands in the way. `wait_s`: until it may be worth another try; None: never."""

    scope: str
    limit: str | Budget
    wait_s: float | None


class SqliteAccounts:
    """Works on a connection inside a transaction of somebody else's."""

    def __init__(self, connection: Connection) -> None:
        self._db = connection

    def admit(self, ask: Ask, now: float) -> Decision:
        counters = {rule.scope: self._load(rule.scope, now) for rule in ask.rules}
        denied = [each for rule in ask.rules for each in self._denials(rule, counters[rule.scope], ask, now)]
        if denied:
            # Whoever comes back is to be let in: the last of them to give way is the one that counts.
            last = max(denied, key=lambda each: math.inf if each.wait_s is None else each.wait_s)
            standings = self._standings(ask.rules, counters, ask.day, now)
            found = next(each for each in standings if each.scope == last.scope and _is_of(each, last.limit))
            return Decision(Denial(found, last.wait_s), standings)
        for rule in ask.rules:
            self._take(rule.limits, counters[rule.scope], ask, now)
        return Decision(None, self._standings(ask.rules, counters, ask.day, now))

    def settle(self, settlement: Settlement, now: float) -> list[LimitEvent]:
        events = list(self._book(settlement, now))
        for scope, at, tokens, micros in self._end(settlement.id) if settlement.rules else ():
            self._give_back(scope, tokens, micros, used=settlement.tokens or 0)
            if settlement.tokens:
                self._log(scope, now, settlement.id, 0, settlement.tokens)
            if not settlement.was_served:
                self._take_back(scope, at, settlement.id)
        return events

    def standings(self, rules: tuple[Rule, ...], now: float) -> tuple[Standing, ...]:
        counters = {rule.scope: self._load(rule.scope, now) for rule in rules}
        return self._standings(rules, counters, _day(now), now)

    def tidy(self, now: float) -> None:
        """Forget what is over, also of scopes that nobody asks for any more, and what a clock left that was ahead."""
        over = "at <= ? or at > ?"
        since = (now - WINDOW_S, now + 1)
        changed = self._db.execute(
            f"select scope, sum(requests), sum(tokens) from limit_log where {over} group by scope", since
        ).fetchall()
        self._db.execute(f"delete from limit_log where {over}", since)
        for scope, requests, tokens in changed:
            self._count_less(scope, requests, tokens)
        self._db.execute(
            "delete from limit_counters where requests = 0 and tokens = 0 and running = 0 and tat <= ?", (now,)
        )

    def forget_worker(self, worker: str) -> None:
        """A worker is dead: what its requests held is given back. That they came stays counted."""
        held = "delete from limit_held where worker = ? returning scope, tokens, micros"
        for scope, tokens, micros in self._db.execute(held, (worker,)).fetchall():
            self._give_back(scope, tokens, micros)

    def _end(self, request_id: str) -> list[tuple[str, float, int, int]]:
        """What a request held: scope, since when, tokens, micros."""
        held = "delete from limit_held where id = ? returning scope, at, tokens, micros"
        return self._db.execute(held, (request_id,)).fetchall()

    def _load(self, scope: str, now: float) -> _Counter:
        """A scope's counter, without what is older than the window."""
        row = self._db.execute(
            "select scope, requests, tokens, running, held_tokens, held_micros, tat "
            "from limit_counters where scope = ?",
            (scope,),
        ).fetchone()
        if row is None:
            return _Counter(scope)
        counter = _Counter(*row)
        left = self._db.execute(
            "delete from limit_log where scope = ? and at <= ? returning requests, tokens", (scope, now - WINDOW_S)
        ).fetchall()
        if left:
            requests, tokens = sum(each[0] for each in left), sum(each[1] for each in left)
            counter.requests -= requests
            counter.tokens -= tokens
            self._count_less(scope, requests, tokens)
        return counter

    def _denials(self, rule: Rule, counter: _Counter, ask: Ask, now: float) -> Iterator[_Denied]:
        scope, limits = rule.scope, rule.limits
        if limits.concurrency is not None and counter.running + 1 > limits.concurrency:
            yield _Denied(scope, "concurrency", MAY_END_S if limits.concurrency else None)
        if limits.rps is not None:
            wait_s = _pace_wait_s(limits, counter, now)
            if wait_s is None or wait_s > _TOLERANCE_S:
                yield _Denied(scope, "rps", wait_s)
        if limits.rpm is not None and (surplus := counter.requests + 1 - limits.rpm) > 0:
            yield _Denied(scope, "rpm", self._requests_leave_s(scope, surplus, now) if limits.rpm else None)
        if limits.tpm is not None:
            need = max(ask.tokens, 1) if ask.is_bound else max(min(ask.tokens, limits.tpm), 1)
            surplus = counter.tokens + counter.held_tokens + need - limits.tpm
            if surplus > 0:
                wait_s = self._tokens_leave_s(scope, surplus, now) if need <= limits.tpm else None
                yield _Denied(scope, "tpm", wait_s)
        for budget in limits.budgets:
            asked = ask.tokens if budget.unit == "tokens" else ask.micros
            need = max(asked, 1) if ask.is_bound else 1
            spent = self._spent_of(counter, ask.day, budget)
            if spent + counter.held(budget) + need > budget.amount:
                yield _Denied(scope, budget, _budget_wait_s(budget, spent, need, ask.day, now))

    def _take(self, limits: Limits, counter: _Counter, ask: Ask, now: float) -> None:
        counter.requests += 1
        counter.last_request_at = now
        counter.running += 1
        counter.held_tokens += ask.tokens
        counter.held_micros += ask.micros
        if limits.rps:
            counter.tat = _pace(limits, counter, now) + 1 / limits.rps
        self._db.execute(
            "insert into limit_counters (scope, requests, tokens, running, held_tokens, held_micros, tat) "
            "values (?, 1, 0, 1, ?, ?, ?) on conflict (scope) do update set requests = requests + 1, "
            "running = running + 1, held_tokens = held_tokens + excluded.held_tokens, "
            "held_micros = held_micros + excluded.held_micros, tat = excluded.tat",
            (counter.scope, ask.tokens, ask.micros, counter.tat),
        )
        self._log(counter.scope, now, ask.id, 1, 0)
        self._db.execute(
            "insert into limit_held (id, scope, worker, at, tokens, micros) values (?, ?, ?, ?, ?, ?)",
            (ask.id, counter.scope, ask.worker, now, ask.tokens, ask.micros),
        )

    def _give_back(self, scope: str, tokens: int, micros: int, used: int = 0) -> None:
        """What was held, but for the tokens that were used of it."""
        self._db.execute(
            "update limit_counters set running = running - 1, held_tokens = held_tokens - ?, "
            "held_micros = held_micros - ?, tokens = tokens + ? where scope = ?",
            (tokens, micros, used, scope),
        )

    def _take_back(self, scope: str, at: float, request_id: str) -> None:
        """A request that no server got does not count. It may have left the window by itself."""
        gone = self._db.execute(
            "delete from limit_log where scope = ? and at = ? and id = ? and requests = 1", (scope, at, request_id)
        )
        if gone.rowcount:
            self._count_less(scope, 1, 0)

    def _log(self, scope: str, now: float, request_id: str, requests: int, tokens: int) -> None:
        self._db.execute(
            "insert into limit_log (scope, at, id, requests, tokens) values (?, ?, ?, ?, ?)",
            (scope, now, request_id, requests, tokens),
        )

    def _count_less(self, scope: str, requests: int, tokens: int) -> None:
        self._db.execute(
            "update limit_counters set requests = requests - ?, tokens = tokens - ? where scope = ?",
            (requests, tokens, scope),
        )

    def _book(self, settlement: Settlement, now: float) -> Iterator[LimitEvent]:
        """What was used, for budgets: with an event for each share of one that it passes."""
        tokens, micros = settlement.tokens or 0, settlement.micros or 0
        if not tokens and not micros:
            return
        at = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        limits = {rule.scope: rule.limits for rule in settlement.rules}
        for scope in settlement.scopes:
            for budget in limits.get(scope, Limits()).budgets:
                before = self._spent(scope, settlement.day, budget)
                after = before + (tokens if budget.unit == "tokens" else micros)
                for share in SHARES:
                    if before < share * budget.amount <= after:
                        yield LimitEvent(at, scope, budget.per, budget.unit, share, budget.amount, after)
            self._db.execute(
                "insert into spend_daily (scope, day, tokens, micros) values (?, ?, ?, ?) on conflict (scope, day) "
                "do update set tokens = tokens + excluded.tokens, micros = micros + excluded.micros",
                (scope, settlement.day, tokens, micros),
            )

    def _spent_of(self, counter: _Counter, day: str, budget: Budget) -> int:
        if budget not in counter.spent:
            counter.spent[budget] = self._spent(counter.scope, day, budget)
        return counter.spent[budget]

    def _spent(self, scope: str, day: str, budget: Budget) -> int:
        """In the period that `day` is in."""
        column = "tokens" if budget.unit == "tokens" else "micros"
        (spent,) = self._db.execute(
            f"select ifnull(sum({column}), 0) from spend_daily where scope = ? and day >= ? and day < ?",
            (scope, period_of(day, budget.per), _day_after(day, budget.per)),
        ).fetchone()
        return int(spent)

    def _requests_leave_s(self, scope: str, count: int, now: float) -> float:
        """Until `count` of the oldest requests have left the window."""
        (at,) = self._db.execute(
            "select at from limit_log where scope = ? and requests = 1 order by at limit 1 offset ?", (scope, count - 1)
        ).fetchone()
        return min(max(float(at) + WINDOW_S - now, 0.0), WINDOW_S)

    def _tokens_leave_s(self, scope: str, count: int, now: float) -> float:
        """Until `count` tokens have left the window. When those that are held stand in the way, nobody knows."""
        for at, tokens in self._db.execute(
            "select at, tokens from limit_log where scope = ? and tokens > 0 order by at", (scope,)
        ):
            count -= tokens
            if count <= 0:
                return min(max(float(at) + WINDOW_S - now, 0.0), WINDOW_S)
        return WINDOW_S

    def _standings(
        self, rules: Sequence[Rule], counters: dict[str, _Counter], day: str, now: float
    ) -> tuple[Standing, ...]:
        return tuple(each for rule in rules for each in self._of_rule(rule, counters[rule.scope], day, now))

    def _of_rule(self, rule: Rule, counter: _Counter, day: str, now: float) -> Iterator[Standing]:
        scope, limits = rule.scope, rule.limits
        if limits.concurrency is not None:
            yield Standing(scope, "concurrency", limits.concurrency, 0, counter.running)
        if limits.rps is not None:
            ahead_s = _pace(limits, counter, now) - now
            used = math.ceil(ahead_s * limits.rps - _TOLERANCE_S)
            yield Standing(scope, "rps", _burst(limits), used, reset_s=ahead_s)
        if limits.rpm is not None:
            yield Standing(
                scope, "rpm", limits.rpm, counter.requests, reset_s=self._last_leaves_s(scope, "requests", now)
            )
        if limits.tpm is not None:
            reset_s = self._last_leaves_s(scope, "tokens", now) if counter.tokens else 0.0
            yield Standing(scope, "tpm", limits.tpm, counter.tokens, counter.held_tokens, reset_s=reset_s)
        for budget in limits.budgets:
            end = period_end(day, budget.per)
            yield Standing(
                scope,
                "budget",
                budget.amount,
                self._spent_of(counter, day, budget),
                counter.held(budget),
                reset_s=max(end.timestamp() - now, 0.0) if end else None,
                per=budget.per,
                unit=budget.unit,
            )

    def _last_leaves_s(self, scope: str, column: str, now: float) -> float:
        """Until the newest entry has left the window."""
        row = self._db.execute(
            f"select at from limit_log where scope = ? and {column} > 0 order by at desc limit 1", (scope,)
        ).fetchone()
        return max(float(row[0]) + WINDOW_S - now, 0.0) if row else 0.0


def _is_of(standing: Standing, limit: str | Budget) -> bool:
    if isinstance(limit, Budget):
        return (standing.per, standing.unit) == (limit.per, limit.unit)
    return standing.limit == limit


def _burst(limits: Limits) -> int:
    return limits.burst if limits.burst is not None else max(1, math.ceil(limits.rps or 0))


def _pace_wait_s(limits: Limits, counter: _Counter, now: float) -> float | None:
    """GCRA: until one more fits within the burst. None: never."""
    burst = _burst(limits)
    if not limits.rps or not burst:
        return None
    interval = 1 / limits.rps
    return _pace(limits, counter, now) + interval - burst * interval - now


def _pace(limits: Limits, counter: _Counter, now: float) -> float:
    """When the next request would come. What was too far ahead is no more, under a limit that is not the one it was."""
    return min(max(counter.tat, now), now + _burst(limits) / limits.rps) if limits.rps else now


def _budget_wait_s(budget: Budget, spent: int, need: int, day: str, now: float) -> float | None:
    if need > budget.amount:
        return None
    if spent + need <= budget.amount:
        return MAY_END_S
    end = period_end(day, budget.per)
    return max(end.timestamp() - now, 0.0) if end else None


def _day(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).date().isoformat()


def _day_after(day: str, per: str) -> str:
    """The first day after the period that a day is in; later than all of them for `total`."""
    end = period_end(day, per)
    return end.date().isoformat() if end else "9999"
