"""Aliases: those that the API made can be changed here, those that the config file declares are shown."""

import msgspec

from gateway.admin.desk import Desk, Done, declared
from gateway.admin.routes import Nothing, Route, Routes
from gateway.replies import Refusal


class AliasInfo(msgspec.Struct, frozen=True):
    """`alias_name`: a name or a pattern. `declared`: in the config file. `problem`: why it is not in use."""

    id: int
    alias_name: str
    real_model_name: str
    declared: bool
    created_at: str | None
    problem: str | None


class NewAlias(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    alias_name: str
    real_model_name: str


class AliasChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    real_model_name: str


class AliasName(msgspec.Struct, frozen=True):
    alias_name: str


async def list_aliases(desk: Desk, params: Nothing, body: Nothing) -> list[AliasInfo]:
    named = desk.room.declared.aliases
    ids, made = await desk.registry(lambda registry: (registry.alias_ids(named), registry.made().aliases))
    used = (await desk.merge()).config.aliases
    found = [AliasInfo(ids[name], name, model, True, None, None) for name, model in named.items()]
    for each in made:
        if each.name not in named:
            problem = None if each.name in used else f"{each.model!r} is no server's model"
            found.append(AliasInfo(each.id, each.name, each.model, False, each.created_at, problem))
    return sorted(found, key=lambda each: each.id)


async def create_alias(desk: Desk, params: Nothing, body: NewAlias) -> Done:
    if body.alias_name in desk.room.declared.aliases:
        raise Refusal(409, "conflict", "Alias already exists", param="alias_name")
    await desk.registry(lambda registry: registry.create_alias(body.alias_name, body.real_model_name, actor=desk.actor))
    return await _applied(desk, body.alias_name)


async def change_alias(desk: Desk, params: AliasName, body: AliasChange) -> Done:
    _check_changeable(desk, params.alias_name)
    await desk.registry(
        lambda registry: registry.change_alias(params.alias_name, body.real_model_name, actor=desk.actor)
    )
    return await _applied(desk, params.alias_name)


async def delete_alias(desk: Desk, params: AliasName, body: Nothing) -> Done:
    _check_changeable(desk, params.alias_name)
    await desk.registry(lambda registry: registry.delete_alias(params.alias_name, actor=desk.actor))
    return Done(ok=True, warning=await desk.apply(f"the alias {params.alias_name!r}"))


async def _applied(desk: Desk, name: str) -> Done:
    problem = await desk.apply(f"the alias {name!r}")
    left_out = next((each for each in (await desk.merge()).problems if each.startswith(f"aliases.{name}: ")), None)
    return Done(ok=True, warning=problem or left_out)


def _check_changeable(desk: Desk, name: str) -> None:
    if name in desk.room.declared.aliases:
        raise declared(f"The alias {name!r}", "aliases")


_ONE = "/admin/aliases/{alias_name}"
ROUTES: Routes = (
    Route("GET", "/admin/aliases", "List aliases", list_aliases, Nothing, Nothing, list[AliasInfo]),
    Route("POST", "/admin/aliases", "Add an alias", create_alias, Nothing, NewAlias, Done, (409,)),
    Route(
        "PATCH", _ONE, "Let an alias stand for another model", change_alias, AliasName, AliasChange, Done, (404, 409)
    ),
    Route("DELETE", _ONE, "Remove an alias", delete_alias, AliasName, Nothing, Done, (409,)),
)
