"""Keys, teams and the audit as scripts/keys prints them: tables for people, lines of JSON for programs."""

import json
from collections.abc import Sequence

import msgspec

from gateway.audit import Difference, Entry
from gateway.keys import Key, Team
from gateway.limits import Limits

NOTHING = "-"


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heads. A column in which nobody has anything is left out."""
    columns = [
        column for column in zip(*rows, strict=True) if any(cell != NOTHING for cell in column[1:]) or not rows[1:]
    ]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def key_line(key: Key, now: str) -> str:
    """One line of JSON."""
    facts = {
        "id": key.id,
        "name": key.name,
        "hint": key.hint,
        "state": key.state(now),
        "models": key.models,
        "weight": key.weight,
        "priority": key.priority,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "not_before": key.not_before,
        "team": key.team,
        "limits": msgspec.to_builtins(key.limits),
        "endpoints": key.endpoints,
        "networks": key.networks,
        "old_until": key.old_until,
    }
    return json.dumps(facts)


def key_table(keys: Sequence[Key], now: str, currency: str) -> str:
    head = ("ID", "NAME", "KEY", "STATE", "EXPIRES", "TEAM", "LIMITS", "WEIGHT", "PRIORITY", "MODELS")
    rows = [
        (
            str(key.id),
            key.name,
            key.hint,
            key.state(now),
            short_time(key.expires_at) or "never",
            key.team or NOTHING,
            limits_text(key.limits, currency) or NOTHING,
            f"{key.weight:g}",
            key.priority,
            ", ".join(key.models) or "all",
        )
        for key in keys
    ]
    return table([head, *rows])


def key_text(key: Key, now: str, currency: str) -> str:
    """All there is to know of one key, a line for each fact."""
    facts = {
        "id": str(key.id),
        "name": key.name,
        "key": key.hint,
        "state": key.state(now),
        "created": short_time(key.created_at),
        "not before": short_time(key.not_before),
        "expires": short_time(key.expires_at) or "never",
        "old key": f"works until {short_time(key.old_until)}" if key.old_until and key.old_until > now else "",
        "team": key.team or "",
        "limits": limits_text(key.limits, currency) or "none of its own",
        "weight": f"{key.weight:g}",
        "priority": key.priority,
        "models": ", ".join(key.models) or "all",
        "endpoints": ", ".join(key.endpoints) or "all",
        "networks": ", ".join(key.networks) or "all",
    }
    return "\n".join(f"{name:<11} {fact}" for name, fact in facts.items() if fact)


class ShownTeam(msgspec.Struct, frozen=True):
    """A team, how many keys name it, and whether config.yaml declares it."""

    team: Team
    keys: int
    declared: bool


def team_line(shown: ShownTeam) -> str:
    facts = {
        "name": shown.team.name,
        "limits": msgspec.to_builtins(shown.team.limits),
        "keys": shown.keys,
        "declared": shown.declared,
        "created_at": shown.team.created_at or None,
    }
    return json.dumps(facts)


def team_table(teams: Sequence[ShownTeam], currency: str) -> str:
    rows = [
        (
            shown.team.name,
            str(shown.keys),
            "config.yaml" if shown.declared else "keys.db",
            limits_text(shown.team.limits, currency) or "none",
        )
        for shown in teams
    ]
    return table([("TEAM", "KEYS", "DECLARED IN", "LIMITS"), *rows])


def audit_line(entry: Entry) -> str:
    return msgspec.json.encode(entry).decode()


def audit_table(entries: Sequence[Entry], currency: str) -> str:
    rows = [
        (
            short_time(entry.at),
            entry.actor,
            f"{entry.action} {entry.kind} {entry.name}",
            _detail(entry.detail, currency) or NOTHING,
        )
        for entry in entries
    ]
    return table([("AT", "WHO", "WHAT", "CHANGES"), *rows])


def limits_text(limits: Limits, currency: str) -> str:
    """As in: 60 rpm, 4 at once, 5M tokens/month, 2.50 EUR/day. "" for none."""
    parts = []
    if limits.rpm is not None:
        parts.append(f"{_amount(limits.rpm)} rpm")
    if limits.rps is not None:
        parts.append(f"{limits.rps:g} rps" + (f" (burst {_amount(limits.burst)})" if limits.burst is not None else ""))
    if limits.tpm is not None:
        parts.append(f"{_amount(limits.tpm)} tpm")
    if limits.concurrency is not None:
        parts.append(f"{_amount(limits.concurrency)} at once")
    for budget in limits.budgets:
        amount = (
            f"{_amount(budget.tokens)} tokens" if budget.tokens is not None else _money(budget.money or 0, currency)
        )
        parts.append(f"{amount} in total" if budget.per == "total" else f"{amount}/{budget.per}")
    return ", ".join(parts)


def short_time(moment: str | None) -> str:
    """2027-02-01T00:00:00.000Z -> 2027-02-01 00:00Z. "" for none."""
    return f"{moment[:10]} {moment[11:16]}Z" if moment else ""


def _amount(number: int) -> str:
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if number and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


def _money(amount: float, currency: str) -> str:
    return f"{amount:.2f} {currency}" if round(amount, 2) == amount else f"{amount:g} {currency}"


def _detail(detail: dict[str, Difference], currency: str) -> str:
    """What was made or deleted is named by its row."""
    shown = []
    for field, pair in detail.items():
        old, new = (_value(field, value, currency) for value in (pair.old, pair.new))
        if pair.old is None and field not in ("id", "name"):
            shown.append(f"{field} {new}")
        elif pair.old is not None and (pair.new is not None or field not in ("id", "name")):
            shown.append(f"{field} {old} → {new}")
    return "; ".join(shown)


def _value(field: str, value: object, currency: str) -> str:
    if value is None:
        return "none"
    if field == "limits":
        return limits_text(msgspec.convert(value, Limits), currency) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "all"
    return value if isinstance(value, str) else json.dumps(value)
