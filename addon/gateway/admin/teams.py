"""Teams: limits that several keys share. Those of the config file are shown, and win over those of keys.db."""

import msgspec
from msgspec import UNSET, UnsetType

from gateway.admin import callers, cautions
from gateway.admin.desk import Desk, Done, declared, not_found
from gateway.admin.limits import LimitChanges, changed, merged
from gateway.admin.routes import Nothing, Route, Routes
from gateway.limits import NONE, Limits
from gateway.replies import Refusal

MISSING = "Team not found"


class TeamInfo(msgspec.Struct, frozen=True):
    """`keys`: the names of those that belong to it, of keys.db and, as SOURCE/NAME, of the config file; what other
    sources have is not known. `declared`: in the config file; `id` and `created_at` are null. `warning`: what will not
    be as one may expect.
    """

    id: int | None
    name: str
    limits: Limits
    declared: bool
    created_at: str | None
    keys: list[str]
    warning: str | UnsetType = UNSET


class NewTeam(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    limits: Limits = NONE


class TeamChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`limits`: those that are left out stay, null takes one away. Null in the place of all of them takes all away."""

    limits: LimitChanges | None


class TeamName(msgspec.Struct, frozen=True):
    name: str


async def list_teams(desk: Desk, params: Nothing, body: Nothing) -> list[TeamInfo]:
    keys, teams = await desk.keys(lambda store: (store.list(), store.teams.list()))
    members: dict[str, list[str]] = {}
    for key in keys:
        members.setdefault(key.team or "", []).append(key.name)
    for source, static in callers.declared(desk.room.declared):
        members.setdefault(static.team or "", []).append(f"{source}/{static.name}")
    named = desk.room.declared.teams
    found = [TeamInfo(None, name, limits, True, None, members.get(name, [])) for name, limits in named.items()]
    found += [
        TeamInfo(team.id, team.name, team.limits, False, team.created_at, members.get(team.name, []))
        for team in teams
        if team.name not in named
    ]
    return sorted(found, key=lambda team: team.name)


async def get_team(desk: Desk, params: TeamName, body: Nothing) -> TeamInfo:
    found = next((team for team in await list_teams(desk, Nothing(), body) if team.name == params.name), None)
    if found is None:
        raise not_found(MISSING)
    return found


async def create_team(desk: Desk, params: Nothing, body: NewTeam) -> TeamInfo:
    if body.name in desk.room.declared.teams:
        raise Refusal(409, "conflict", "Team with this name already exists", param="name")
    await desk.keys(lambda store: store.teams.create(body.name, body.limits, actor=desk.actor))
    return await _told(desk, body.name)


async def change_team(desk: Desk, params: TeamName, body: TeamChanges) -> TeamInfo:
    _check_changeable(desk, params.name)

    def change(limits: Limits) -> Limits:
        return merged(limits, body.limits)

    await desk.keys(lambda store: store.teams.change(params.name, change, actor=desk.actor), MISSING)
    return await _told(desk, params.name)


async def limit_team(desk: Desk, params: TeamName, body: LimitChanges) -> TeamInfo:
    _check_changeable(desk, params.name)

    def limit(limits: Limits) -> Limits:
        return changed(limits, body)

    await desk.keys(lambda store: store.teams.change(params.name, limit, actor=desk.actor), MISSING)
    return await _told(desk, params.name)


async def _told(desk: Desk, name: str) -> TeamInfo:
    team = await get_team(desk, TeamName(name), Nothing())
    return msgspec.structs.replace(team, warning=cautions.told(cautions.of_limits(desk.room.declared, team.limits)))


async def delete_team(desk: Desk, params: TeamName, body: Nothing) -> Done:
    _check_changeable(desk, params.name)
    await desk.keys(lambda store: store.teams.delete(params.name, actor=desk.actor), MISSING)
    return Done(ok=True)


def _check_changeable(desk: Desk, name: str) -> None:
    if name in desk.room.declared.teams:
        raise declared(f"The team {name!r}", "teams")


_ONE = "/admin/teams/{name}"
ROUTES: Routes = (
    Route("GET", "/admin/teams", "List teams", list_teams, Nothing, Nothing, list[TeamInfo]),
    Route("POST", "/admin/teams", "Make a team", create_team, Nothing, NewTeam, TeamInfo, (409,)),
    Route("GET", _ONE, "Show a team", get_team, TeamName, Nothing, TeamInfo, (404,)),
    Route(
        "PATCH",
        _ONE,
        "Change a team's limits, field by field",
        change_team,
        TeamName,
        TeamChanges,
        TeamInfo,
        (404, 409),
    ),
    Route("DELETE", _ONE, "Delete a team without keys", delete_team, TeamName, Nothing, Done, (404, 409)),
    Route(
        "PUT",
        f"{_ONE}/limits",
        "Change a team's limits, field by field",
        limit_team,
        TeamName,
        LimitChanges,
        TeamInfo,
        (404, 409),
    ),
)
