"""A server's live check: does it list its models, does each answer the smallest real request, and how fast?

The server is asked directly, beside the routing: nothing is claimed, nobody is charged, its health stays as it is. Each
model is asked in a thread of its own, with a deadline.
"""

import asyncio
import time

import msgspec

from gateway.admin.desk import Desk
from gateway.admin.routes import Nothing, Route, Routes
from gateway.admin.servers import ServerId, find
from gateway.asking import Asker, Said, Told, late
from gateway.settings import Server
from gateway.threads import in_thread

# A model may have to be loaded first; somebody waits for the answer.
CHECK_S = 30.0
# All of them together: a server with many models, each of which is silent.
ALL_S = 90.0
# More at once would be a load, not a check.
AT_ONCE = 4
MAX_MODELS = 100
# The smallest requests that there are. A server that is not for the first is asked the next.
SMALLEST: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/embeddings": {"input": "a"},
}


class ModelCheck(msgspec.Struct, frozen=True):
    """`ok`: the model answered at `endpoint`. `status`: of HTTP; null: none came. `problem`: what it said."""

    model: str
    endpoint: str
    ok: bool
    status: int | None
    latency_ms: float
    problem: str | None


class ServerCheck(msgspec.Struct, frozen=True):
    """`ok`: it lists its models, and each of those that are asked of it answers. `lists`: null: it does not tell."""

    id: int
    name: str
    ok: bool
    type: str | None
    latency_ms: float
    problem: str | None
    lists: tuple[str, ...] | None
    models: list[ModelCheck]


async def check_server(desk: Desk, params: ServerId, body: Nothing) -> ServerCheck:
    known = await find(desk, params.server_id)
    server = known.server
    told, took_ms = await _list(server)
    names = (server.models if server.models is not None else told.models or ())[:MAX_MODELS]
    gate = asyncio.Semaphore(AT_ONCE)
    # Without an answer to the first question, more of them would tell nothing else.
    asked = names if told.models is not None or told.type is not None else ()
    until = time.monotonic() + ALL_S
    models = list(await asyncio.gather(*(_ask(server, name, gate, until) for name in asked)))
    return ServerCheck(
        id=known.id,
        name=server.name,
        ok=told.problem is None and bool(models) and all(each.ok for each in models),
        type=told.type,
        latency_ms=took_ms,
        problem=told.problem,
        lists=told.models,
        models=models,
    )


async def _list(server: Server) -> tuple[Told, float]:
    began = time.monotonic()
    try:
        told = await in_thread(lambda: Asker(server, CHECK_S).models(), "check", CHECK_S)
    except TimeoutError:
        told = Told(problem=late("/v1/models", CHECK_S))
    except OSError as error:
        told = Told(problem=f"has a ca_file that can't be used: {error.strerror or error}")
    return told, _since(began)


async def _ask(server: Server, model: str, gate: asyncio.Semaphore, until: float) -> ModelCheck:
    """At the first endpoint that it is for; otherwise what it said at the first of all."""
    async with gate:
        checks: list[ModelCheck] = []
        for endpoint, body in SMALLEST.items():
            if time.monotonic() > until:
                checks.append(ModelCheck(model, endpoint, False, None, 0.0, "was not asked: the others took too long"))
                break
            checks.append(await _try(server, model, endpoint, {"model": model, **body}))
            if checks[-1].ok:
                return checks[-1]
            if checks[-1].status is None:
                break
    return checks[0]


async def _try(server: Server, model: str, endpoint: str, body: dict[str, object]) -> ModelCheck:
    began = time.monotonic()
    try:
        said = await in_thread(lambda: Asker(server, CHECK_S).post(endpoint, body), "check", CHECK_S)
    except TimeoutError:
        said = Said(None, late(endpoint, CHECK_S))
    return ModelCheck(model, endpoint, said.problem is None, said.status, _since(began), said.problem)


def _since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 1)


ROUTES: Routes = (
    Route(
        "POST",
        "/admin/servers/{server_id}/check",
        "Ask a server for its models, and each model for a token",
        check_server,
        ServerId,
        Nothing,
        ServerCheck,
        (404,),
    ),
)
