"""A balancer to play with: its servers by name, and a clock that only the test moves."""

import asyncio
from typing import Any

import pytest

from gateway.auth import Caller
from gateway.balancer import Balancer, NoServer, Search
from gateway.routing import Router
from gateway.servers import Server
from gateway.settings import Config, Health, Routing
from gateway.settings import Server as ServerConfig
from gateway.strategies import Wanted


class Room:
    """A balancer, its servers by name, and a clock. Servers are "NAME SLOTS MODEL…", slots "-" for none told."""

    def __init__(self, *servers: str, strategy: str = "least-busy", up: bool = True, **more: Any) -> None:
        records = []
        for server in servers:
            name, slots, *models = server.split()
            size = None if slots == "-" else int(slots)
            records.append(ServerConfig(name, f"http://{name}:1", slots=size, models=tuple(models or ["m"])))
        health = Health(eject_after=1, eject_s=10, max_eject_s=10)
        config = Config(tuple(records), **{"health": health, "routing": Routing(strategy=strategy), **more})
        self.config = config
        self.now = 1000.0
        self.router = Router(config)
        self.balancer = Balancer(config, self.router, lambda: self.now)
        self.servers = {server.name: server for server in self.router.servers}
        if up:
            for each in self.router.servers:
                each.health.probe_ok(self.now)

    def __getitem__(self, name: str) -> Server:
        return self.servers[name]

    def take(self, search: Search) -> str:
        """The server's name; "" when there is none without a wait."""
        taken = self.balancer.take(search)
        assert taken == (search.claim is not None)
        return search.claim.server.name if search.claim else ""

    async def wait(self, search: Search) -> "asyncio.Task[None]":
        """It waits by the time that this returns, or has got what it wants."""
        task = asyncio.get_running_loop().create_task(self.balancer.wait(search))
        await rounds()
        return task

    async def wait_out(self, search: Search) -> None:
        await asyncio.wait_for(self.balancer.wait(search), 10)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Running, waiting for a slot of a certain server, waiting."""
        servers = self.servers.values()
        return sum(s.running for s in servers), sum(s.waiting for s in servers), self.balancer.waiting


async def rounds() -> None:
    """Let everybody go on who can."""
    for _ in range(5):
        await asyncio.sleep(0)


def search(key: int = 1, model: str | None = "m", *, may_fall_back: bool = False, **caller: Any) -> Search:
    """`caller`: its weight, its priority."""
    return Search(Caller(key, f"key {key}", (), **caller), Wanted(model, None), may_fall_back)


def got(found: Search) -> str:
    """Which server it has."""
    return found.claim.server.name if found.claim else ""


def refused(room: Room, wanted: Search) -> NoServer:
    with pytest.raises(NoServer) as caught:
        room.balancer.take(wanted)
    assert (caught.value.status, caught.value.code) == (503, "no_server_available")
    return caught.value
