"""Client connections: deadlines, and sockets that would be left behind.

A connection that says nothing, or never ends its request, is closed; one that waits for an answer never is.
mitmproxy leaks the socket of a client that is cut while its body arrives, until the garbage collector comes by: it
is closed here.
"""

import asyncio
import collections
import logging
import time
from collections.abc import Container
from typing import Any

from mitmproxy import connection, ctx, http
from mitmproxy.proxy import server_hooks

from gateway import upstream

log = logging.getLogger(__name__)

TICK_S = 1.0
# A client sends its head at once; a keep-alive client may come back (pools keep connections for a minute or two).
HEAD_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 150.0
# Silence within a body. Slow uploads are fine, stalled ones are not.
BODY_TIMEOUT_S = 60.0
# mitmproxy allows five connections per client and server: five streams at once for an HTTP/2 client.
SERVER_CONNECTIONS_PER_CLIENT = 1000


class _Client:
    """One connection: its flows, those of them whose body is still coming, and since when it has none."""

    def __init__(self, now: float) -> None:
        self.running: set[str] = set()
        self.bodies: set[str] = set()
        self.since = now
        self.is_new = True

    def is_overdue(self, now: float, silent_s: float) -> bool:
        """`silent_s`: how long nothing has come over it."""
        if not self.running:
            return now - self.since > (HEAD_TIMEOUT_S if self.is_new else IDLE_TIMEOUT_S)
        return self.bodies == self.running and silent_s > BODY_TIMEOUT_S


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
            client.is_new = False
            client.running.add(flow.id)
            client.bodies.add(flow.id)

    def request_ends(self, flow: http.HTTPFlow) -> None:
        if client := self._clients.get(flow.client_conn.id):
            client.bodies.discard(flow.id)

    def flow_ends(self, flow: http.HTTPFlow) -> None:
        if client := self._clients.get(flow.client_conn.id):
            client.bodies.discard(flow.id)
            client.running.discard(flow.id)
            client.since = time.monotonic()

    def retire(self, addresses: Container[tuple[str | None, int]]) -> None:
        """Connections to servers at these addresses are not used for another request."""
        for client_id in self._clients:
            if handler := _handler(client_id):
                for conn in handler.transports:
                    if isinstance(conn, connection.Server) and conn.address in addresses:
                        upstream.retire(conn)

    def close_server(self, flow: http.HTTPFlow) -> None:
        """Close the connection that a flow waits on: its stream then hears that the server closed it."""
        handler = _handler(flow.client_conn.id)
        if handler and flow.server_conn in handler.transports:
            handler.close_connection(flow.server_conn)

    def stop_connecting(self, flow: http.HTTPFlow, longer_than_s: float) -> None:
        """Give up on a connection to a flow's server that does not come about: it then counts as refused."""
        handler = _handler(flow.client_conn.id)
        if handler is None:
            return
        address = (flow.request.host, flow.request.port)
        for conn, io in list(handler.transports.items()):
            is_connecting = io.writer is None or (conn.tls and not conn.tls_established)
            is_late = conn.timestamp_start and time.time() - conn.timestamp_start > longer_than_s
            if is_connecting and is_late and io.handler and conn.address == address:
                io.handler.cancel("the server does not answer")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self._close_overdue()
            except Exception:
                log.exception("watching connections failed; it goes on")

    async def _close_overdue(self) -> None:
        for client_id, client in list(self._clients.items()):
            handler = _handler(client_id)
            if handler and client.is_overdue(time.monotonic(), time.time() - handler.timeout_watchdog.last_activity):
                await handler.on_timeout()


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
