"""What is kept as it was asked for, and yet will not do what somebody may expect of it."""

from msgspec import UNSET, UnsetType

from gateway.limits import Limits
from gateway.settings import Config
from gateway.sources.settings import Local


def of_limits(config: Config, limits: Limits) -> list[str]:
    if any(budget.unit == "money" for budget in limits.budgets) and not config.prices.models:
        return ["a budget of money stops nobody: the config has no prices, so nothing costs anything"]
    return []


def of_team(config: Config, team: str | None, known: bool) -> list[str]:
    """`known`: keys.db has the team."""
    if team is None or known or team in config.teams:
        return []
    return [f"the team {team!r} is neither in the config nor in keys.db: nothing limits it until it is made"]


def of_sources(config: Config) -> list[str]:
    if any(isinstance(source, Local) for source in config.auth.sources):
        return []
    return ["no key of keys.db holds: auth.sources in the config has no source of type local"]


def told(cautions: list[str]) -> str | UnsetType:
    """All of them in a line; left out of the answer where there are none."""
    return "; ".join(cautions) or UNSET
