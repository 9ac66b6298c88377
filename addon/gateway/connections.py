"""Client connections: deadlines, and sockets that would be left behind.

A connection that says nothing, or never ends its request, is closed; one that waits for an answer never is.
mitmproxy leaks the socket of a client that is cut while its body arrives, until the garbage collector comes by: it
is closed here.
"""

import asyncio
import collections
import time
from typing import Any

from mitmproxy import connection, ctx, http
from mitmproxy.proxy import server_hooks

TICK_S = 1.0
# A client sends its head at once; a keep-alive client may come back (pools keep connections for a minute or two).
HEAD_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 150.0
# Silence within a body. Slow uploads are fine, stalled ones are not.
BODY_TIMEOUT_S = 60.0
# mitmproxy allows five connections per client and server: five streams at once for an HTTP/2 client.
SERVER_CONNECTIONS_PER_CLIENT = 1000


class _Client:
    """Of one connection: what it is waiting for, and since when."""

    __slots__ = ("phase", "running", "since")

    def __init__(self, now: float) -> None:
        self.phase = "head"
        self.since = now
        self.running = 0


class Connections:
    """Watches mitmproxy's connection handlers. All methods are for the event loop."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        if self._task:
            self._task.cancel()

    def connected(self, client: connection.Client) -> None:
        self._clients[client.id] = _Client(time.monotonic())
        if handler := _handler(client.id):
            handler.max_conns = collections.defaultdict(lambda: asyncio.Semaphore(SERVER_CONNECTIONS_PER_CLIENT))

    def disconnected(self, client: connection.Client) -> None:
        if self._clients.pop(client.id, None):
            _close_socket(client, client)

    def server_disconnected(self, data: server_hooks.ServerConnectionHookData) -> None:
        _close_socket(data.client, data.server)

    def request_begins(self, flow: http.HTTPFlow) -> None:
        if client := self._clients.get(flow.client_conn.id):
            client.running += 1
            client.phase = "body"

    def request_ends(self, flow: http.HTTPFlow) -> None:
        if client := self._clients.get(flow.client_conn.id):
            client.phase = "answer"

    def flow_ends(self, flow: http.HTTPFlow) -> None:
        if client := self._clients.get(flow.client_conn.id):
            client.running = max(0, client.running - 1)
            if not client.running:
                client.phase, client.since = "idle", time.monotonic()

    def close_server(self, flow: http.HTTPFlow) -> None:
        """Close the connection that a flow waits on: its stream then hears that the server closed it."""
        handler = _handler(flow.client_conn.id)
        if handler and flow.server_conn in handler.transports:
            handler.close_connection(flow.server_conn)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            for client_id, client in list(self._clients.items()):
                handler = _handler(client_id)
                if handler and _is_overdue(client, now, handler.timeout_watchdog.last_activity):
                    await handler.on_timeout()


def _is_overdue(client: _Client, now: float, last_activity: float) -> bool:
    """`last_activity`: wall-clock seconds of the last byte, as mitmproxy's watchdog keeps it."""
    if client.phase == "head":
        return now - client.since > HEAD_TIMEOUT_S
    if client.phase == "idle":
        return now - client.since > IDLE_TIMEOUT_S
    return client.phase == "body" and time.time() - last_activity > BODY_TIMEOUT_S


def _handler(client_id: str) -> Any:
    """mitmproxy's handler of a client connection, or None when that is gone."""
    proxyserver = ctx.master.addons.get("proxyserver")
    return proxyserver.connections.get(client_id) if proxyserver else None


def _close_socket(client: connection.Client, conn: connection.Connection) -> None:
    handler = _handler(client.id)
    io = handler.transports.get(conn) if handler else None
    if io and io.writer and not io.writer.is_closing():
        handler.transports.pop(conn)
        io.writer.transport.abort()
