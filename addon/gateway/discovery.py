"""Asks servers what they are: their models (when the config leaves them out), whether they answer, whether they are llama.cpp.

Only /v1/models is asked: it needs no slot and does not wake a sleeping llama-server.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

import httpx
import msgspec

from gateway.routing import Router, Server

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
# A server that is down or has not told its models is asked often; one that has is asked whether that still holds.
RETRY_S = 2.0
REFRESH_S = 30.0


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model] = []


class Discovery:
    """Keeps a router's servers up to date, in the background of the event loop."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._task: asyncio.Task[None] | None = None
        self._asked_once = asyncio.Event()
        self._due = dict.fromkeys(router.servers, 0.0)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        if self._task:
            self._task.cancel()

    async def asked_once(self) -> None:
        """Wait, briefly, until every server was asked for the first time."""
        if not self._asked_once.is_set():
            try:
                await asyncio.wait_for(self._asked_once.wait(), TIMEOUT_S)
            except TimeoutError:
                log.warning("not all servers have told their models yet")

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
            while True:
                now = time.monotonic()
                await self._ask_all(client, [server for server, due in self._due.items() if due <= now])
                self._asked_once.set()
                await asyncio.sleep(RETRY_S)

    async def _ask_all(self, client: httpx.AsyncClient, servers: Sequence[Server]) -> None:
        for server, result in zip(
            servers, await asyncio.gather(*(ask(client, server) for server in servers), return_exceptions=True), strict=True
        ):
            if isinstance(result, Exception):
                log.error("asking server %s failed: %r", server.name, result)
            settled = server.up and server.models and server.type
            self._due[server] = time.monotonic() + (REFRESH_S if settled else 0)
        self._router.learn()


async def ask(client: httpx.AsyncClient, server: Server) -> None:
    """GET /v1/models, and note what it tells in `server`. What it does not tell stays as it was."""
    key = server.config.api_key
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        response = await client.get(f"{server.config.url.rstrip('/')}/v1/models", headers=headers)
    except httpx.HTTPError as error:
        if server.up is not False:
            log.warning("server %s does not answer: %s", server.name, error or type(error).__name__)
        server.up = False
        return
    if server.up is False:
        log.warning("server %s answers again", server.name)
    server.up = True
    if server.config.type is None:
        server.type = "llama.cpp" if response.headers.get("server") == "llama.cpp" else "openai"
    if server.config.models is None and response.status_code == 200:
        try:
            models = msgspec.json.decode(response.content, type=_Models)
        except msgspec.DecodeError as error:
            log.error("server %s: /v1/models is not understood: %s", server.name, error)
        else:
            server.models = tuple(dict.fromkeys(model.id for model in models.data))
    elif server.config.models is None and response.status_code in (401, 403):
        log.error("server %s refuses its api_key (HTTP %d)", server.name, response.status_code)
