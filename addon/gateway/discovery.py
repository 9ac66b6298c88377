"""Asks servers what they are: whether they answer, which models they have, whether they are llama.cpp.

Only /v1/models is asked: it needs no slot and does not wake a sleeping llama-server. The asking is done in
threads, what was told is noted on the event loop.
"""

import asyncio
import logging
import time

import httpx
import msgspec

from gateway.config import Server as ServerConfig
from gateway.routing import Router, Server

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
# A server that is down or has not told its models is asked often; one that has is asked whether that still holds.
RETRY_S = 2.0
REFRESH_S = 30.0


class Told(msgspec.Struct, frozen=True):
    """What a server told. `problem`: why there is no list of models. None: not told."""

    up: bool
    type: str | None = None
    models: tuple[str, ...] | None = None
    problem: str | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model] = []


def ask(client: httpx.Client, server: ServerConfig) -> Told:
    """GET /v1/models. Blocks up to TIMEOUT_S."""
    headers = {"authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    try:
        response = client.get(f"{server.url.rstrip('/')}/v1/models", headers=headers)
    except httpx.HTTPError as error:
        return Told(up=False, problem=f"does not answer: {error or type(error).__name__}")
    kind = "llama.cpp" if response.headers.get("server") == "llama.cpp" else "openai"
    if response.status_code != 200:
        return Told(up=True, type=kind, problem=f"answers /v1/models with HTTP {response.status_code}")
    try:
        models = msgspec.json.decode(response.content, type=_Models)
    except msgspec.DecodeError as error:
        return Told(up=True, type=kind, problem=f"tells its models in a way that is not understood: {error}")
    return Told(up=True, type=kind, models=tuple(dict.fromkeys(model.id for model in models.data)))


def note(server: Server, told: Told) -> None:
    """Enter what was told. What the config says, and what was not told this time, stays as it was."""
    wants_models = server.config.models is None
    if told.problem and (server.up is not told.up) and (not told.up or wants_models):
        log.warning("server %s %s", server.name, told.problem)
    elif told.up and server.up is False:
        log.warning("server %s answers again", server.name)
    server.up = told.up
    if server.config.type is None:
        server.type = told.type or server.type
    if wants_models and told.models is not None:
        server.models = told.models


class Discovery:
    """Keeps a router's servers up to date, in the background of the event loop."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._task: asyncio.Task[None] | None = None
        self._asked_once = asyncio.Event()
        self._due = dict.fromkeys(router.servers, 0.0)
        if all(server.config.models is not None for server in router.servers):
            self._asked_once.set()  # the config says it all: nobody has to wait for an answer

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        if self._task:
            self._task.cancel()

    def ask_soon(self, server: Server) -> None:
        """Something is wrong with a server: ask it at the next occasion."""
        self._due[server] = 0.0

    async def asked_once(self) -> None:
        """Wait, briefly, until every server was asked for the first time."""
        if not self._asked_once.is_set():
            try:
                await asyncio.wait_for(self._asked_once.wait(), TIMEOUT_S)
            except TimeoutError:
                log.warning("not all servers have told their models yet")

    async def _run(self) -> None:
        with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client:
            while True:
                now = time.monotonic()
                due = [server for server, due_at in self._due.items() if due_at <= now]
                await asyncio.gather(*(self._ask(client, server) for server in due))
                self._router.learn()
                self._asked_once.set()
                await asyncio.sleep(RETRY_S)

    async def _ask(self, client: httpx.Client, server: Server) -> None:
        try:
            note(server, await asyncio.to_thread(ask, client, server.config))
        except Exception:
            log.exception("asking server %s failed", server.name)
        known = server.up and server.models and server.type
        self._due[server] = time.monotonic() + (REFRESH_S if known else 0)
