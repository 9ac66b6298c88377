"""What scripts/keys is told about a key or a team: options, and the changes that they mean."""

import argparse
from collections.abc import Callable

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from gateway.keys import PRIORITIES, KeyProblem
from gateway.keystore import Changes
from gateway.limits import Budget, Limits

# Takes a rule away: of an option with one value, and of one that lists what is allowed.
NONE, ANY = "none", "any"

# Options are named for one value, records for what they hold.
OPTIONS = {
    "expires_at": "expires",
    "models": "model",
    "endpoints": "endpoint",
    "networks": "network",
    "budgets": "budget",
    "overlap_s": "overlap",
}


def explained(problem: KeyProblem) -> str:
    """A problem, with the option's name where one is at fault."""
    field = (problem.field or "").removeprefix("limits.").partition("[")[0]
    if field in ("", "name", "id"):
        return problem.reason
    return f"--{OPTIONS.get(field, field).replace('_', '-')}: {problem.reason}"


def add_key_options(command: argparse.ArgumentParser) -> None:
    lists = {
        "--model": ("PATTERN", "a model it may use: a name, a wildcard (gpt-*) or a regular expression (/gpt-[34]/)"),
        "--endpoint": ("PATH", "an endpoint it may call (/v1/embeddings, /v1/audio/*)"),
        "--network": ("CIDR", "a network or address it may be used from (10.0.0.0/8)"),
    }
    for option, (metavar, text) in lists.items():
        command.add_argument(
            option, action="append", metavar=metavar, help=f"{text}; can be repeated; {ANY}: all, as without it"
        )
    command.add_argument(
        "--expires", default=UNSET, metavar="WHEN", help="2027-01-31 (through that day, UTC) or 90d, 12h, 30m; none"
    )
    command.add_argument("--not-before", default=UNSET, metavar="WHEN", help="it is not valid before this time; none")
    command.add_argument("--team", default=UNSET, metavar="NAME", help="whose limits it shares with other keys; none")
    command.add_argument(
        "--weight",
        type=float,
        default=UNSET,
        metavar="W",
        help="when keys wait for a server: this one's share relative to the others' (1 is the usual one)",
    )
    command.add_argument(
        "--priority",
        choices=tuple(PRIORITIES),
        default=UNSET,
        help="when keys wait for a server: all of a higher class go first",
    )
    add_limits(command)


def add_limits(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("limits", "0: nothing is allowed; none: no limit")
    for option, text in {
        "--rpm": "requests in any 60 seconds",
        "--tpm": "tokens in any 60 seconds, of prompts and answers",
        "--concurrency": "requests at once",
        "--burst": "requests at once, of those that --rps allows (default: a second's)",
    }.items():
        group.add_argument(option, type=_or_none(int, "a whole number"), default=UNSET, metavar="N", help=text)
    group.add_argument(
        "--rps", type=_or_none(float, "a number"), default=UNSET, metavar="N", help="requests a second, evenly"
    )
    group.add_argument(
        "--budget",
        action="append",
        type=_budget,
        metavar="PER:UNIT:AMOUNT",
        help="month:tokens:5000000 or day:money:2.50; per day, week, month or total; can be repeated; "
        "an AMOUNT of none takes one away, none alone all",
    )


def changes_of(arguments: argparse.Namespace, limits: Limits) -> Changes:
    """What the options say of a key that has these limits."""
    return Changes(
        models=_allowed("models", arguments.model),
        endpoints=_allowed("endpoints", arguments.endpoint),
        networks=_allowed("networks", arguments.network),
        expires_at=_unless_none(arguments.expires),
        not_before=_unless_none(arguments.not_before),
        team=_unless_none(arguments.team),
        weight=arguments.weight,
        priority=arguments.priority,
        limits=limits_of(arguments, limits) if is_limited(arguments) else UNSET,
    )


def is_limited(arguments: argparse.Namespace) -> bool:
    """Whether one of the options of `add_limits` was given."""
    numbers = (arguments.rpm, arguments.tpm, arguments.concurrency, arguments.burst, arguments.rps)
    return arguments.budget is not None or any(number is not UNSET for number in numbers)


def limits_of(arguments: argparse.Namespace, limits: Limits) -> Limits:
    """These limits with what the options say in place of theirs."""
    names = ("rpm", "tpm", "concurrency", "burst", "rps")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not UNSET}
    if given.get("rps", UNSET) is None:
        given.setdefault("burst", None)
    budgets = {(budget.per, budget.unit): budget for budget in limits.budgets}
    for change in arguments.budget or ():
        change(budgets)
    return replace(limits, **given, budgets=tuple(budgets.values()))


def _or_none[T](kind: Callable[[str], T], expected: str) -> Callable[[str], T | None]:
    def parse(text: str) -> T | None:
        try:
            return None if text == NONE else kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected} or {NONE}, got {text!r}") from None

    return parse


type _Budgets = dict[tuple[str, str], Budget]


def _budget(text: str) -> Callable[[_Budgets], object]:
    """What it does to the budgets there are."""
    if text == NONE:
        return lambda budgets: budgets.clear()
    per, _, rest = text.partition(":")
    unit, _, amount = rest.partition(":")
    try:
        if amount == NONE and unit in ("tokens", "money"):
            return lambda budgets: budgets.pop((per, unit), None)
        budget = {"tokens": _tokens, "money": _money}[unit](per, amount)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"expected PER:UNIT:AMOUNT such as month:tokens:5000000 or day:money:2.50, got {text!r}"
        ) from None
    return lambda budgets: budgets.update({(per, unit): budget})


def _tokens(per: str, amount: str) -> Budget:
    return Budget(per, tokens=int(amount))


def _money(per: str, amount: str) -> Budget:
    return Budget(per, money=float(amount))


def _allowed(field: str, given: list[str] | None) -> tuple[str, ...] | UnsetType:
    if given is None:
        return UNSET
    if ANY in given and len(given) > 1:
        raise KeyProblem(f"{ANY} stands alone", field)
    return () if given == [ANY] else tuple(given)


def _unless_none(given: str | UnsetType) -> str | UnsetType | None:
    return None if given == NONE else given
