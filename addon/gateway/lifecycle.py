"""The gateway's life: it starts with a config, sweeps while it runs, and drains before it ends."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from mitmproxy import ctx, http

from gateway import config, layers, startup
from gateway.connections import Connections
from gateway.service import Service

log = logging.getLogger(__name__)

SWEEP_S = 1.0
# A server on the local network answers in milliseconds; the kernel would try for two minutes.
CONNECT_TIMEOUT_S = 10.0
DRAIN_POLL_S = 0.05
# For last bytes to leave the sockets' buffers.
FLUSH_S = 0.1


class Lifecycle:
    """What lives as long as the gateway does. Without a service, everything is refused."""

    def __init__(self) -> None:
        self.service: Service | None = None
        self.connections = Connections()
        self.live: dict[str, http.HTTPFlow] = {}  # flows with an exchange that is not settled
        self.draining = False
        self._sweeper: asyncio.Task[None] | None = None

    def configure(self, path: str | Path) -> None:
        """Build the service, once: a changed config takes a restart. An error that is logged now stops the start."""
        if self.service is not None:
            return
        try:
            self.service = Service(config.load(path))
        except (config.ConfigError, OSError) as error:
            log.error("%s", error)
        else:
            startup.set_options(self.service.config)

    def run(self) -> None:
        if self.service is None:
            return
        startup.survive_hangup()
        startup.trim_addons()
        startup.listen(self.service.config)
        self.service.discovery.start()
        self.connections.start()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    def end(self) -> Coroutine[Any, Any, None] | None:
        """At mitmproxy's end: what it shall await. When only the script is reloaded: all is closed, None."""
        if ctx.master.should_exit.is_set() and self.service:
            return self._drain(self.service)
        self._close()
        return None

    def _close(self) -> None:
        if self._sweeper:
            self._sweeper.cancel()
        self.connections.stop()
        if self.service:
            service, self.service = self.service, None
            # After a reload, requests still run that the next Gateway settles: they must not pass for a dead worker's.
            service.close(still_running=bool(self.live))

    async def _drain(self, service: Service) -> None:
        """No new requests; running ones end, or are cut at `drain_s`, with their rows settled."""
        self.draining = True
        stop_now = startup.second_signal()
        startup.stop_listening()
        deadline = time.monotonic() + service.config.drain_s
        while self.live and time.monotonic() < deadline and not stop_now.is_set():
            await asyncio.sleep(DRAIN_POLL_S)
        for flow in list(self.live.values()):
            exchange = layers.exchange_of(flow)
            if exchange and not exchange.settling:
                exchange.settling = True
                exchange.release()
                if exchange.relay:
                    exchange.relay.close()
                exchange.error_code = exchange.error_code or "shutdown"
                service.ledger.settle(exchange.row("interrupted", time.monotonic()))
            if flow.killable:
                flow.kill()
        await asyncio.sleep(FLUSH_S)
        self._close()

    async def _sweep(self) -> None:
        """Requests whose server has not said a byte in time: their connection is closed, `upstream_failed` follows."""
        while self.service:
            await asyncio.sleep(SWEEP_S)
            try:
                self._close_overdue(self.service.config.first_byte_timeout_s)
                self._open_rows(self.service)
            except Exception:
                log.exception("the sweep failed; it goes on")

    def _open_rows(self, service: Service) -> None:
        """Requests get their open row when they go to a server; those whose body takes long get it here."""
        for flow in list(self.live.values()):
            exchange = layers.exchange_of(flow)
            if exchange and not exchange.is_open and not exchange.settling:
                exchange.is_open = True
                service.ledger.open(exchange.row("open"))

    def _close_overdue(self, first_byte_timeout_s: float) -> None:
        for flow in list(self.live.values()):
            exchange = layers.exchange_of(flow)
            if not exchange or exchange.sent is None or flow.response is not None:
                continue
            if time.monotonic() - exchange.sent > first_byte_timeout_s:
                exchange.timed_out = True
                self.connections.close_server(flow)
            limit = min(CONNECT_TIMEOUT_S, first_byte_timeout_s)
            self.connections.stop_connecting(flow, longer_than_s=limit)
