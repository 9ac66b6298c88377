"""The gateway's life: it starts with a config, goes over to others, sweeps while it runs, and drains before it ends."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from mitmproxy import ctx, http

from gateway import reloading, startup, stream, upstream_tls
from gateway.changes import ReloadReport
from gateway.config import ConfigError
from gateway.connections import Connections
from gateway.records import utc_now
from gateway.reloading import Reloader
from gateway.service import Service
from gateway.settings import Config
from gateway.watch import FileWatch

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
        self._reloader: Reloader | None = None
        self._sweeper: asyncio.Task[None] | None = None

    def configure(self, path: str | Path) -> None:
        """Build the service, once. An error that is logged now stops the start."""
        if self.service is not None:
            return
        try:
            file = FileWatch(Path(path))
            first = reloading.read_first(file.path)
            self.service = Service(first.config, self.reload)
            self.service.admin.reconfigure(first.declared)
            self._reloader = Reloader(file, first, self.service, self._applied)
        except (ConfigError, OSError) as error:
            log.error("%s", error)
        else:
            startup.set_options(self.service.config)

    def run(self) -> None:
        if self.service is None or self._reloader is None:
            return
        startup.on_hangup(self._reloader.hang_up)
        startup.trim_addons()
        startup.listen(self.service.config)
        self.service.prober.start()
        self.connections.start()
        self._reloader.start()
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def reload(self, reason: str) -> ReloadReport:
        """Read the config again."""
        if self._reloader is None or self.draining:
            return ReloadReport(utc_now(), False, "the gateway is shutting down")
        return await self._reloader.reload(reason)

    def _applied(self, before: Config, after: Config) -> None:
        self.connections.retire(upstream_tls.replace(before.servers, after.servers))
        if before.first_byte_timeout_s != after.first_byte_timeout_s:
            startup.set_timeout(after)

    def end(self) -> Coroutine[Any, Any, None] | None:
        """At mitmproxy's end: what it shall await. When only the script is reloaded: all is closed, None."""
        if ctx.master.should_exit.is_set() and self.service:
            return self._drain(self.service)
        self._close()
        return None

    def _close(self) -> None:
        if self._sweeper:
            self._sweeper.cancel()
        if self._reloader:
            self._reloader.stop()
        self.connections.stop()
        if self.service:
            service, self.service = self.service, None
            # After a reload, requests still run that the next Gateway settles: they must not pass for a dead worker's.
            service.close(still_running=bool(self.live))

    async def _drain(self, service: Service) -> None:
        """No new requests; running ones end, or are cut at `drain_s`, with their rows settled."""
        self.draining = True
        if self._reloader:
            self._reloader.stop()
        stop_now = startup.second_signal()
        startup.stop_listening()
        deadline = time.monotonic() + service.config.drain_s
        while self.live and time.monotonic() < deadline and not stop_now.is_set():
            await asyncio.sleep(DRAIN_POLL_S)
        for flow in list(self.live.values()):
            _interrupt(service, flow, "shutdown")
            if flow.killable:
                flow.kill()
        await asyncio.sleep(FLUSH_S)
        self._close()

    async def _sweep(self) -> None:
        """Requests whose server is silent for too long: their connection is closed, `upstream_failed` follows."""
        while self.service:
            await asyncio.sleep(SWEEP_S)
            try:
                self._close_overdue(self.service)
                self._open_rows(self.service)
                self._interrupt_left_behind(self.service)
            except Exception:
                log.exception("the sweep failed; it goes on")

    def _open_rows(self, service: Service) -> None:
        """Requests get their open row when they go to a server; those that take long before that get it here."""
        for flow in list(self.live.values()):
            exchange = stream.exchange_of(flow)
            if exchange and not exchange.is_open and not exchange.settling:
                exchange.is_open = True
                service.ledger.open(exchange.row("open"))

    def _interrupt_left_behind(self, service: Service) -> None:
        """Flows that have ended with a hook that failed: nobody else frees their server and settles their row."""
        for flow in [flow for flow in self.live.values() if not flow.live]:
            _interrupt(service, flow, "internal_error")
            self.live.pop(flow.id)

    def _close_overdue(self, service: Service) -> None:
        now, connect_s = time.monotonic(), min(CONNECT_TIMEOUT_S, service.config.first_byte_timeout_s)
        for flow in list(self.live.values()):
            exchange = stream.exchange_of(flow)
            if not exchange or exchange.sent is None or exchange.failure or exchange.settling or exchange.outcome:
                continue
            if service.attempts.is_overdue(exchange, now):
                exchange.timed_out = True
                self.connections.close_server(flow)
            if not exchange.is_answering:
                self.connections.stop_connecting(flow, longer_than_s=connect_s)


def _interrupt(service: Service, flow: http.HTTPFlow, error_code: str) -> None:
    """Free the server of a request that does not end by itself, and settle its row."""
    exchange = stream.exchange_of(flow)
    if exchange is None or exchange.settling:
        return
    exchange.client_left()
    if exchange.relay:
        exchange.relay.close()
    exchange.error_code = exchange.error_code or error_code
    service.settler.settle(exchange, exchange.outcome or "interrupted")
    exchange.settling = True
