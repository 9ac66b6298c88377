"""What a key and a team must hold, whoever gives it: the command, the admin API, or the file as it was found."""

import ipaddress
from collections.abc import Iterable

from gateway import limits
from gateway.keys import PRIORITIES, Key, KeyProblem
from gateway.limits import Limits
from gateway.patterns import Pattern

MAX_NAME = 200

# What scripts/keys takes for no team.
NO_TEAMS = ("none", "any")

# A thousand to one starves the others, or oneself, for every use but a mistake.
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000


def check_key(key: Key) -> None:
    """Raises KeyProblem naming the field."""
    check_name(key.name)
    if key.team is not None:
        check_name(key.team, "team")
    check_patterns("models", key.models)
    check_endpoints(key.endpoints)
    check_networks(key.networks)
    check_place(key.weight, key.priority)
    check_limits(key.limits)
    if key.expires_at is not None and key.not_before is not None and key.expires_at <= key.not_before:
        raise KeyProblem(f"expected a time after not_before ({key.not_before}), got {key.expires_at}", "expires_at")


def check_name(name: str, field: str = "name") -> None:
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise KeyProblem(f"{name!r} is no name: expected 1 to {MAX_NAME} printable characters", field)


def check_new_name(name: str, field: str = "name") -> None:
    """Of what is made or renamed now: a name that looks like another one is refused."""
    check_name(name, field)
    if name != name.strip():
        raise KeyProblem(f"{name!r} begins or ends with a space", field)


def check_new_team(name: str) -> None:
    check_new_name(name)
    if name.lower() in NO_TEAMS:
        raise KeyProblem(f"{name!r} is no name for a team: in commands it means that there is none", "name")


def check_patterns(field: str, patterns: Iterable[str]) -> None:
    for index, text in enumerate(patterns):
        if not text or not text.isprintable():
            raise KeyProblem(f"expected a name or a pattern of printable characters, got {text!r}", f"{field}[{index}]")
        try:
            Pattern(text)
        except ValueError as error:
            raise KeyProblem(str(error), f"{field}[{index}]") from None


def check_endpoints(endpoints: Iterable[str]) -> None:
    """Paths as `endpoints.canonical` gives them, with wildcards. A regular expression would look like a path."""
    for index, path in enumerate(endpoints):
        is_plain = path.startswith("/") and (path == "/" or not path.endswith("/"))
        if not is_plain or path != path.lower() or not path.isprintable():
            raise KeyProblem(
                f"expected a path in lower case without a / at its end (/v1/embeddings, /v1/audio/*), got {path!r}",
                f"endpoints[{index}]",
            )


def check_networks(networks: Iterable[str]) -> None:
    for index, text in enumerate(networks):
        try:
            ipaddress.ip_network(text)
        except ValueError as error:
            raise KeyProblem(
                f"expected a network (10.0.0.0/8, 2001:db8::/32) or an address, got {text!r}: {error}",
                f"networks[{index}]",
            ) from None


def check_place(weight: object, priority: object) -> None:
    """Among those that wait."""
    if not isinstance(weight, int | float) or not MIN_WEIGHT <= weight <= MAX_WEIGHT:  # not a number is not either
        raise KeyProblem(f"expected a number from {MIN_WEIGHT} to {MAX_WEIGHT}, got {weight!r}", "weight")
    if priority not in PRIORITIES:
        raise KeyProblem(f"expected one of {', '.join(PRIORITIES)}, got {priority!r}", "priority")


def check_limits(given: Limits) -> None:
    try:
        limits.check(given)
    except limits.Problem as problem:
        raise KeyProblem(str(problem).removeprefix(f"{problem.field}: "), f"limits.{problem.field}") from None
