"""The counters as simply as they can be said: lists that are searched. What the real ones are compared with."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime

from gateway.limits import Budget, Limits, Rule, period_end, period_of
from gateway.quota import Ask, Decision, Denial, LimitEvent, Settlement, Standing

WINDOW_S = 60
TOLERANCE_S = 1e-4


@dataclass
class Scope:
    running: dict[str, Ask] = field(default_factory=dict)
    requests: list[tuple[float, str]] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)
    spend: list[tuple[str, int, int]] = field(default_factory=list)  # day, tokens, micros
    pace: float = 0.0

    def requests_at(self, now: float) -> list[float]:
        return sorted(at for at, _ in self.requests if now - at < WINDOW_S)

    def tokens_at(self, now: float) -> list[tuple[float, int]]:
        return sorted((at, amount) for at, amount in self.tokens if now - at < WINDOW_S)

    def held(self, unit: str) -> int:
        return sum(ask.tokens if unit == "tokens" else ask.micros for ask in self.running.values())

    def spent(self, day: str, budget: Budget) -> int:
        period = period_of(day, budget.per)
        return sum(
            tokens if budget.unit == "tokens" else micros
            for each, tokens, micros in self.spend
            if period_of(each, budget.per) == period
        )


class Model:
    def __init__(self) -> None:
        self._scopes: defaultdict[str, Scope] = defaultdict(Scope)

    def admit(self, ask: Ask, now: float) -> Decision:
        denials = []
        for rule in ask.rules:
            found = self._of_rule(rule, ask.day, now)
            for standing, (is_denied, wait_s) in zip(found, self._waits(rule, ask, now), strict=True):
                if is_denied:
                    denials.append(Denial(standing, wait_s))
        if denials:
            longest = max(denials, key=lambda denial: math.inf if denial.wait_s is None else denial.wait_s)
            return Decision(longest, self._of(ask.rules, ask.day, now))
        for rule in ask.rules:
            scope = self._scopes[rule.scope]
            scope.running[ask.id] = ask
            scope.requests.append((now, ask.id))
            if rule.limits.rps:
                scope.pace = pace_at(rule.limits, scope, now) + 1 / rule.limits.rps
        return Decision(None, self._of(ask.rules, ask.day, now))

    def settle(self, settlement: Settlement, now: float) -> list[LimitEvent]:
        for scope in self._scopes.values():
            if scope.running.pop(settlement.id, None) is None:
                continue
            if not settlement.was_served:
                scope.requests = [entry for entry in scope.requests if entry[1] != settlement.id]
            if settlement.tokens:
                scope.tokens.append((now, settlement.tokens))
        tokens, micros = settlement.tokens or 0, settlement.micros or 0
        at = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        found = []
        for rule in settlement.rules:
            for budget in rule.limits.budgets if rule.scope in settlement.scopes else ():
                before = self._scopes[rule.scope].spent(settlement.day, budget)
                after = before + (tokens if budget.unit == "tokens" else micros)
                found += [
                    LimitEvent(at, rule.scope, budget.per, budget.unit, share, budget.amount, after)
                    for share in (0.8, 1.0)
                    if before < share * budget.amount <= after
                ]
        for name in settlement.scopes:
            self._scopes[name].spend.append((settlement.day, tokens, micros))
        return found

    def standings(self, rules: tuple[Rule, ...], now: float) -> tuple[Standing, ...]:
        return self._of(rules, datetime.fromtimestamp(now, UTC).date().isoformat(), now)

    def give_back(self, worker: str) -> None:
        for scope in self._scopes.values():
            scope.running = {key: ask for key, ask in scope.running.items() if ask.worker != worker}

    def _of(self, rules: tuple[Rule, ...], day: str, now: float) -> tuple[Standing, ...]:
        return tuple(standing for rule in rules for standing in self._of_rule(rule, day, now))

    def _of_rule(self, rule: Rule, day: str, now: float) -> list[Standing]:
        name, limits, scope = rule.scope, rule.limits, self._scopes[rule.scope]
        requests, tokens = scope.requests_at(now), scope.tokens_at(now)
        found = []
        if limits.concurrency is not None:
            found.append(Standing(name, "concurrency", limits.concurrency, 0, len(scope.running)))
        if limits.rps is not None:
            ahead_s = pace_at(limits, scope, now) - now
            used = math.ceil(ahead_s * limits.rps - TOLERANCE_S)
            found.append(Standing(name, "rps", burst_of(limits), used, 0, ahead_s))
        if limits.rpm is not None:
            reset_s = requests[-1] + WINDOW_S - now if requests else 0
            found.append(Standing(name, "rpm", limits.rpm, len(requests), 0, reset_s))
        if limits.tpm is not None:
            reset_s = tokens[-1][0] + WINDOW_S - now if tokens else 0
            used = sum(amount for _, amount in tokens)
            found.append(Standing(name, "tpm", limits.tpm, used, scope.held("tokens"), reset_s))
        for budget in limits.budgets:
            spent, held = scope.spent(day, budget), scope.held(budget.unit)
            ends_in = ends_in_s(budget, day, now)
            found.append(Standing(name, "budget", budget.amount, spent, held, ends_in, budget.per, budget.unit))
        return found

    def _waits(self, rule: Rule, ask: Ask, now: float) -> list[tuple[bool, float | None]]:
        """Of each limit, in order: whether it stands in the way, and until when (None: for ever)."""
        limits, scope = rule.limits, self._scopes[rule.scope]
        found: list[tuple[bool, float | None]] = []
        if limits.concurrency is not None:
            found.append((len(scope.running) >= limits.concurrency, 1.0 if limits.concurrency else None))
        if limits.rps is not None:
            found.append(pace_wait(limits, pace_at(limits, scope, now), now))
        if limits.rpm is not None:
            requests = scope.requests_at(now)
            surplus = len(requests) + 1 - limits.rpm
            wait_s = requests[surplus - 1] + WINDOW_S - now if surplus > 0 and limits.rpm else None
            found.append((surplus > 0, wait_s))
        if limits.tpm is not None:
            need = max(ask.tokens, 1) if ask.is_bound else max(min(ask.tokens, limits.tpm), 1)
            found.append(tokens_wait(limits.tpm - scope.held("tokens") - need, need, limits.tpm, scope, now))
        for budget in limits.budgets:
            asked = ask.tokens if budget.unit == "tokens" else ask.micros
            need = max(asked, 1) if ask.is_bound else 1
            spent = scope.spent(ask.day, budget)
            is_denied = spent + scope.held(budget.unit) + need > budget.amount
            if need > budget.amount:
                found.append((is_denied, None))
            else:
                fits = spent + need <= budget.amount
                found.append((is_denied, 1.0 if fits else ends_in_s(budget, ask.day, now)))
        return found


def burst_of(limits: Limits) -> int:
    return limits.burst if limits.burst is not None else max(1, math.ceil(limits.rps or 0))


def pace_at(limits: Limits, scope: Scope, now: float) -> float:
    """When the next request would come; no later than after a burst."""
    return min(max(scope.pace, now), now + burst_of(limits) / limits.rps) if limits.rps else now


def pace_wait(limits: Limits, base: float, now: float) -> tuple[bool, float | None]:
    if not limits.rps or not burst_of(limits):
        return True, None
    interval = 1 / limits.rps
    wait_s = base + interval - burst_of(limits) * interval - now
    return wait_s > TOLERANCE_S, wait_s


def tokens_wait(room: int, need: int, tpm: int, scope: Scope, now: float) -> tuple[bool, float | None]:
    """`room`: what the window may hold for the request to fit."""
    log = scope.tokens_at(now)
    if sum(amount for _, amount in log) <= room:
        return False, None
    if need > tpm:
        return True, None
    for gone in range(1, len(log) + 1):
        if sum(amount for _, amount in log[gone:]) <= room:
            return True, log[gone - 1][0] + WINDOW_S - now
    return True, float(WINDOW_S)


def ends_in_s(budget: Budget, day: str, now: float) -> float | None:
    end = period_end(day, budget.per)
    return None if end is None else max(end.timestamp() - now, 0)
