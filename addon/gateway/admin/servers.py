"""Servers: those that the API made can be changed here, those that the config file declares are shown."""

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gateway.admin.desk import Desk, Done, declared, not_found
from gateway.admin.routes import MAX_INT, Nothing, Route, Routes, bad
from gateway.made import MadeServer
from gateway.registry import Registry, taken
from gateway.replies import Refusal
from gateway.secret import hint
from gateway.servers import Server as Running
from gateway.settings import Secret, Server

# What smol-llm-proxy takes for yes.
YES = ("1", "true", "yes")


class ServerInfo(msgspec.Struct, frozen=True):
    """`api_key`: its hint. `models` None: asked from the server. `declared`: in the config file. `state`: as its probes
    find it; None: it is not in use, because it is not active, or because of `problem`.
    A server that is up has a problem where it does not tell its models.
    """

    id: int
    name: str
    url: str
    api_key: str
    active: int
    declared: bool
    models: tuple[str, ...] | None
    offered_models: tuple[str, ...]
    state: str | None
    weight: float
    type: str | None
    slots: int | None
    verify_tls: bool
    created_at: str | None
    problem: str | None


class NewServer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    url: str
    api_key: str | None = None
    active: bool | Annotated[int, Meta(ge=0, le=1)] = True
    models: tuple[str, ...] | None = None
    weight: float = 1
    type: str | None = None
    slots: int | None = None
    verify_tls: bool = True


class ServerChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is left out stays. `models` null: asked from the server."""

    url: str | UnsetType = UNSET
    api_key: str | UnsetType | None = UNSET
    active: bool | Annotated[int, Meta(ge=0, le=1)] | UnsetType = UNSET
    models: tuple[str, ...] | UnsetType | None = UNSET
    weight: float | UnsetType = UNSET
    type: str | UnsetType | None = UNSET
    slots: int | UnsetType | None = UNSET
    verify_tls: bool | UnsetType = UNSET


class ServerMade(Done, frozen=True, kw_only=True):
    id: int


class ServerId(msgspec.Struct, frozen=True):
    server_id: Annotated[int, Meta(ge=1, le=MAX_INT)]


class ModelAssignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model_name: str


class AssignParams(ServerId, frozen=True):
    """`reassign`, `share` (1, true or yes): where another server has the model, move it, or have it on both."""

    reassign: str = ""
    share: str = ""


class UnassignParams(ServerId, frozen=True):
    model_name: str


class Known(msgspec.Struct, frozen=True):
    """A server, in use or not. `created_at` None: the config file declares it."""

    id: int
    server: Server
    active: bool = True
    created_at: str | None = None


async def find(desk: Desk, server_id: int) -> Known:
    """Raises Refusal."""
    found = next((each for each in await everyone(desk) if each.id == server_id), None)
    if found is None:
        raise not_found("Server not found")
    return found


async def everyone(desk: Desk) -> list[Known]:
    """Declared and made ones, by id. A made one whose name the file declares as well waits, unseen."""
    servers = {server.name: server for server in desk.room.declared.servers}
    ids, made = await desk.registry(lambda registry: (registry.server_ids(servers), registry.made().servers))
    found = [Known(ids[name], server) for name, server in servers.items()]
    found += [
        Known(each.id, each.server, each.active, each.created_at) for each in made if each.server.name not in servers
    ]
    return sorted(found, key=lambda each: each.id)


async def _changeable(desk: Desk, server_id: int) -> Known:
    found = await find(desk, server_id)
    if found.created_at is None:
        raise declared(f"The server {found.server.name!r}", "servers")
    return found


async def list_servers(desk: Desk, params: Nothing, body: Nothing) -> list[ServerInfo]:
    return [_info(desk, each) for each in await everyone(desk)]


async def get_server(desk: Desk, params: ServerId, body: Nothing) -> ServerInfo:
    return _info(desk, await find(desk, params.server_id))


def _info(desk: Desk, known: Known) -> ServerInfo:
    server = known.server
    running = next((each for each in desk.room.router.servers if each.name == server.name and known.active), None)
    return ServerInfo(
        id=known.id,
        name=server.name,
        url=server.url,
        api_key=hint(server.api_key),
        active=int(known.active),
        declared=known.created_at is None,
        models=server.models,
        offered_models=running.models if running else (),
        state=running.health.state if running else None,
        weight=server.weight,
        type=running.type if running else server.type,
        slots=running.slots if running else server.slots,
        verify_tls=server.verify_tls,
        created_at=known.created_at,
        problem=_problem(running) if running else None,
    )


def _problem(server: Running) -> str | None:
    if server.health.state != "up":
        return server.health.reason
    if not server.models and server.config.models is None:
        return f"tells no models at {server.path_prefix}/v1/models: list them in its `models`, or nothing is sent to it"
    return None


async def create_server(desk: Desk, params: Nothing, body: NewServer) -> ServerMade:
    if any(server.name == body.name for server in desk.room.declared.servers):
        raise Refusal(409, "conflict", "Server with this name already exists", param="name")
    server = Server(
        name=body.name,
        url=body.url,
        api_key=Secret(body.api_key or ""),
        models=body.models,
        weight=body.weight,
        type=body.type,
        slots=body.slots,
        verify_tls=body.verify_tls,
    )
    names = [each.name for each in desk.room.declared.servers]

    def create(registry: Registry) -> int:
        registry.server_ids(names)  # the file's come first
        return registry.create_server(server, active=bool(body.active), actor=desk.actor)

    server_id = await desk.registry(create)
    return ServerMade(ok=True, id=server_id, warning=await desk.apply(f"the server {body.name!r}"))


async def change_server(desk: Desk, params: ServerId, body: ServerChanges) -> Done:
    found = await _changeable(desk, params.server_id)
    given = {name: value for name, value in msgspec.structs.asdict(body).items() if value is not UNSET}
    if not given:
        raise bad("body", "No fields to update")
    active = given.pop("active", UNSET)
    if "api_key" in given:
        given["api_key"] = Secret(given["api_key"] or "")

    def change(made: MadeServer) -> MadeServer:
        server = msgspec.structs.replace(made.server, **given)
        return msgspec.structs.replace(made, server=server, active=made.active if active is UNSET else bool(active))

    await desk.registry(lambda registry: registry.change_server(found.id, change, actor=desk.actor))
    return Done(ok=True, warning=await desk.apply(f"the server {found.server.name!r}"))


async def delete_server(desk: Desk, params: ServerId, body: Nothing) -> Done:
    found = await _changeable(desk, params.server_id)
    await desk.registry(lambda registry: registry.delete_server(found.id, actor=desk.actor))
    return Done(ok=True, warning=await desk.apply(f"the server {found.server.name!r}"))


async def assign_model(desk: Desk, params: AssignParams, body: ModelAssignment) -> Done:
    found = await _changeable(desk, params.server_id)
    move, share = (text.strip().lower() in YES for text in (params.reassign, params.share))
    if move and share:
        raise bad("share", "a model is either moved or shared")
    name = body.model_name
    holder = next((server for server in desk.room.declared.servers if name in (server.models or ())), None)
    if holder and not share:
        if move:
            raise declared(f"The model {name[:200]!r} of the server {holder.name!r}", "servers")
        ids = await desk.registry(lambda registry: registry.server_ids([holder.name]))
        raise Refusal(409, "conflict", taken(name, holder.name, ids[holder.name]), param="model_name")

    def assign(registry: Registry) -> None:
        registry.assign(found.id, name, move=move, share=share, actor=desk.actor)

    await desk.registry(assign)
    return Done(ok=True, warning=await desk.apply(f"the server {found.server.name!r}"))


async def unassign_model(desk: Desk, params: UnassignParams, body: Nothing) -> Done:
    found = await _changeable(desk, params.server_id)
    await desk.registry(lambda registry: registry.unassign(found.id, params.model_name, actor=desk.actor))
    return Done(ok=True, warning=await desk.apply(f"the server {found.server.name!r}"))


_ONE = "/admin/servers/{server_id}"
ROUTES: Routes = (
    Route("GET", "/admin/servers", "List servers", list_servers, Nothing, Nothing, list[ServerInfo]),
    Route("POST", "/admin/servers", "Add a server", create_server, Nothing, NewServer, ServerMade, (409,)),
    Route("GET", _ONE, "Show a server", get_server, ServerId, Nothing, ServerInfo, (404,)),
    Route("PATCH", _ONE, "Change a server", change_server, ServerId, ServerChanges, Done, (404, 409)),
    Route("DELETE", _ONE, "Remove a server", delete_server, ServerId, Nothing, Done, (404, 409)),
    Route(
        "POST",
        f"{_ONE}/models",
        "Say that a server has a model",
        assign_model,
        AssignParams,
        ModelAssignment,
        Done,
        (404, 409),
    ),
    Route(
        "DELETE",
        f"{_ONE}/models/{{model_name}}",
        "Say that a server does not have a model",
        unassign_model,
        UnassignParams,
        Nothing,
        Done,
        (404, 409),
    ),
)
