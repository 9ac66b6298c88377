"""Limits as administrators give them and see them used: by key, team, model and over all."""

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gateway.admin import callers
from gateway.admin.callers import CallerInfo
from gateway.admin.desk import Desk
from gateway.admin.routes import Nothing, Route, Routes, bad
from gateway.keystore import Key, Team
from gateway.limit_use import BudgetUse, LimitUse, budget_use, limit_use
from gateway.limits import MAX_AMOUNT, NONE, Budget, Limits, Rule, rules
from gateway.patterns import ByModel
from gateway.records import utc_now
from gateway.settings import Config

type Amount = Annotated[int, Meta(ge=0, le=MAX_AMOUNT)]
type Rate = Annotated[float, Meta(ge=0, le=MAX_AMOUNT)]


class LimitChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is left out stays. Null: no limit; 0: nothing is allowed. `rpm_limit`, `tpm_limit`: other names."""

    rpm_limit: Amount | UnsetType | None = UNSET
    tpm_limit: Amount | UnsetType | None = UNSET
    rpm: Amount | UnsetType | None = UNSET
    tpm: Amount | UnsetType | None = UNSET
    rps: Rate | UnsetType | None = UNSET
    burst: Amount | UnsetType | None = UNSET
    concurrency: Amount | UnsetType | None = UNSET
    budgets: tuple[Budget, ...] | UnsetType | None = UNSET


class LimitList(msgspec.Struct, frozen=True):
    """`limits`: of everybody, models, teams, keys of keys.db, and keys in the config file (named SOURCE/NAME).
    `callers`: all keys of other sources that are known; what limits them is their source's to say.
    """

    limits: list[LimitUse]
    callers: list[CallerInfo]


class BudgetList(msgspec.Struct, frozen=True):
    currency: str
    budgets: list[BudgetUse]


class Use(msgspec.Struct, frozen=True):
    """How much of everybody's limits is used now."""

    limits: list[LimitUse]
    budgets: list[BudgetUse]


def changed(limits: Limits, changes: LimitChanges) -> Limits:
    """Raises Refusal where nothing is given, or both names of a limit, and they differ."""
    if all(value is UNSET for value in msgspec.structs.astuple(changes)):
        raise bad("body", "No fields to update")
    return merged(limits, changes)


def merged(limits: Limits, changes: LimitChanges | None) -> Limits:
    """`changes` None: no limits any more. Raises Refusal where both names of a limit are given, and differ."""
    if changes is None:
        return NONE
    given = {name: value for name, value in msgspec.structs.asdict(changes).items() if value is not UNSET}
    for name in ("rpm", "tpm"):
        if f"{name}_limit" in given:
            value = given.pop(f"{name}_limit")
            if given.setdefault(name, value) != value:
                raise bad(name, f"is given as {name}_limit as well, and differs")
    if "budgets" in given:
        given["budgets"] = given["budgets"] or ()
    return msgspec.structs.replace(limits, **given)


async def use_of(desk: Desk) -> Use:
    """Of all keys of keys.db and of the config file, all teams, the models in use, and everybody together."""
    config = desk.room.declared
    keys, teams = await desk.keys(lambda store: (store.list(), store.teams.list()))
    standings = await desk.standings(tuple(_rules(config, keys, teams, list(desk.room.router.models()))))
    names = {f"key:{key.id}": key.name for key in keys}
    named = [(each, names.get(each.scope) or each.scope.partition(":")[2] or None) for each in standings]
    today = utc_now()[:10]
    return Use(
        [limit_use(each, name) for each, name in named if each.limit != "budget"],
        [budget_use(each, name, today) for each, name in named if each.limit == "budget"],
    )


def _rules(config: Config, keys: list[Key], teams: list[Team], models: list[str]) -> Iterator[Rule]:
    yield from rules(("all", config.limits.all))
    of_models = ByModel(config.limits.models)
    yield from rules(*((f"model:{model}", of_models.of(model) or NONE) for model in models))
    of_teams = {team.name: team.limits for team in teams} | config.teams
    yield from rules(*((f"team:{name}", limits) for name, limits in of_teams.items()))
    yield from rules(*((f"key:{key.id}", key.limits.over(config.limits.key)) for key in keys))
    declared = callers.declared(config)
    yield from rules(*((f"key:{source}/{key.name}", key.limits.over(config.limits.key)) for source, key in declared))


async def list_limits(desk: Desk, params: Nothing, body: Nothing) -> LimitList:
    return LimitList((await use_of(desk)).limits, await callers.list_callers(desk))


async def list_budgets(desk: Desk, params: Nothing, body: Nothing) -> BudgetList:
    return BudgetList(desk.room.declared.prices.currency, (await use_of(desk)).budgets)


ROUTES: Routes = (
    Route("GET", "/admin/limits", "How much of each limit is used", list_limits, Nothing, Nothing, LimitList),
    Route("GET", "/admin/budgets", "How much of each budget is used", list_budgets, Nothing, Nothing, BudgetList),
)
