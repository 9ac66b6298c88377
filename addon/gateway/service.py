"""What a config makes: keys, router, ledger, and the decisions that need several of them. Knows no mitmproxy."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import unquote

from gateway import endpoints, wire
from gateway.admin.api import Admin
from gateway.admin.desk import Room
from gateway.attempts import Attempts
from gateway.auth import Authenticator, Caller
from gateway.balancer import Balancer
from gateway.books import Books
from gateway.changes import ReloadReport
from gateway.discovery import Prober
from gateway.exchange import Exchange
from gateway.keys import KeysUnavailable
from gateway.keystore import KeyReader
from gateway.ledger import Ledger
from gateway.limiter import Limiter
from gateway.limits import Rule
from gateway.pages.serving import Pages
from gateway.prices import Prices
from gateway.records import ServerEvent, utc_now
from gateway.replies import Refusal, Reply, answer
from gateway.routing import Router
from gateway.self_service import SelfService
from gateway.servers import Server
from gateway.settings import Config
from gateway.settling import Settler
from gateway.shared_counters import SharedCounters
from gateway.threads import in_thread
from gateway.usage import FORMATS
from gateway.vitals import Vitals
from gateway.wire import Asked

log = logging.getLogger(__name__)

# For reading CA files, and what key sources need.
PREPARE_TIMEOUT_S = 30.0


class Service:
    """Everything behind the hooks. `reload`: what the admin API asks to have its changes taken over. Raises OSError
    when its files can't be opened.
    """

    def __init__(self, config: Config, reload: Callable[[str], Awaitable[ReloadReport]]) -> None:
        self.config = config
        self.max_body_bytes = int(config.max_body_mb * 1_000_000)
        self.router = Router(config)
        self.balancer = Balancer(config, self.router, time.monotonic)
        self.prober = Prober(self.router.servers, config.health, self.router.learn, self.balancer.changed)
        self.attempts = Attempts(config, self.balancer, self.prober)
        self.ledger = Ledger(config.data / "usage.db")
        self.books = Books(config.data / "usage.db")
        self._pages = Pages()
        self._keys = KeyReader(config.data / "keys.db")
        self.authenticator = Authenticator(config, self._keys, utc_now)
        storage, worker = config.limits.storage, self.ledger.worker
        self._shared = None if storage == "local" else SharedCounters(storage, worker)
        self.limiter = Limiter(config, self._shared or self.ledger, worker)
        self._self_service = SelfService(self.books, self.limiter, utc_now)
        self.settler = Settler(self.attempts, self.limiter, self.ledger, self._shared)
        self.vitals = Vitals(self.router, self.balancer, self.ledger, self._shared)
        self.admin = Admin(
            Room(
                declared=config,
                keys_db=config.data / "keys.db",
                books=self.books,
                router=self.router,
                waiting=lambda: self.balancer.waiting,
                limiter=self.limiter,
                report=lambda: self.report,
                reload=reload,
            )
        )
        self.report = ReloadReport(utc_now(), True)
        self._loaded_at = self.report.at
        for server in self.router.servers:
            self._listen_to(server)

    def close(self, *, still_running: bool = False) -> None:
        """`still_running`: requests of this process go on, and another service settles them."""
        self.prober.stop()
        if self._shared:
            self._shared.close()
        self.ledger.close(keep_lock=still_running)
        self.authenticator.close()
        self._keys.close()

    def is_server(self, address: Any) -> bool:
        """Whether an address (host, port) is one of the config's servers, or something still runs there."""
        return address is not None and tuple(address[:2]) in ((each.host, each.port) for each in self.router.known())

    def keys_version(self) -> int | None:
        """Another number after each change of keys.db. None: it can't be read now."""
        with contextlib.suppress(KeysUnavailable):
            return self._keys.version
        return None

    async def reload(self, config: Config, applied: Callable[[], None]) -> None:
        """Go over to another config, which has been checked. All that can fail comes first, and then changes nothing;
        the rest is one step, and `applied` is called in it. Raises ConfigError, OSError and TimeoutError.
        """
        servers = self.router.successors(config)
        for server in servers:
            self._listen_to(server)
        watches = await in_thread(lambda: self.prober.prepare(servers, config), "config", PREPARE_TIMEOUT_S)
        sources = await in_thread(lambda: self.authenticator.prepare(config), "config", PREPARE_TIMEOUT_S)
        try:
            await self.prober.introduce(watches)
        except asyncio.CancelledError:
            self.prober.drop(watches)
            raise
        self.authenticator.apply(config, sources)
        gone = [server for server in self.router.servers if server not in servers]
        self.config, self.max_body_bytes = config, int(config.max_body_mb * 1_000_000)
        self.router.reconfigure(config, servers)
        self.prober.reconfigure(watches, config.health)
        self.attempts.reconfigure(config)
        self.limiter.reconfigure(config)
        for server in gone:
            self._server_is_gone(server)
        self.balancer.reconfigure(config, gone)
        applied()

    def reloaded(self, report: ReloadReport) -> None:
        """What became of the config that was read last."""
        self.report = report
        if report.ok:
            self._loaded_at = report.at

    def _listen_to(self, server: Server) -> None:
        server.health.on_change = functools.partial(self._server_changed, server)

    def _server_is_gone(self, server: Server) -> None:
        """What becomes of its last requests is no news of a server any more. Its name may go on at another place."""
        server.health.on_change = lambda before, now, why: None
        if server.name not in (each.name for each in self.router.servers):
            before, why = server.health.state, "the config has it no more"
            self.ledger.note(ServerEvent(utc_now(), server.name, "removed", before, why, self.ledger.worker))

    def too_large(self) -> Refusal:
        return Refusal(
            413, "request_too_large", f"The request body is over {self.config.max_body_mb:g} MB.", param="body"
        )

    def unbooked(self) -> Refusal:
        return Refusal(503, "ledger_unavailable", "Use can't be recorded at the moment.", headers={"retry-after": "5"})

    def read(self, endpoint: str, body: bytes, content_type: str) -> Asked:
        """What a body asks for. On paths that we know it must be readable, on others JSON must. Raises Refusal."""
        # What looks like JSON is JSON, whatever its type is called: servers don't look at the type either.
        if body.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").startswith(b"{"):
            return wire.read_json(body)
        if content_type.lower().startswith("multipart/form-data"):
            return wire.read_multipart(body, content_type)
        if body and endpoints.canonical(endpoint) in FORMATS:
            return wire.read_json(body)
        return Asked()

    def answer_public(self, method: str, path: str, *, draining: bool) -> Reply | None:
        """Answers that need no key."""
        if path in ("/health", "/v1/health") and method in ("GET", "HEAD"):
            return self.vitals.health(self.report, self._loaded_at, draining=draining)
        if path == "/metrics" and method in ("GET", "HEAD"):
            return Reply(200, self.vitals.metrics().encode(), {"content-type": "text/plain; version=0.0.4"})
        return self._pages.page(method, path, has_admin=bool(self.config.admin_key))

    async def answer(self, method: str, exchange: Exchange) -> Reply | None:
        """Answers of our own to a caller. None: the request goes to a server. Raises Refusal."""
        path = exchange.endpoint
        if path in ("/v1/models", "/models") and method in ("GET", "HEAD"):
            return answer(200, {"object": "list", "data": [_described(name) for name in self._models_for(exchange)]})
        if path.startswith("/v1/models/") and method in ("GET", "HEAD"):
            return self._model(exchange, unquote(path.removeprefix("/v1/models/")))
        if path == "/v1/usage":
            if method not in ("GET", "HEAD"):
                raise Refusal(405, "method_not_allowed", "/v1/usage takes GET.", headers={"allow": "GET, HEAD"})
            query = exchange.path.partition("?")[2]
            prices = Prices(self.config.prices.currency, self.config.prices.models)
            rules = self._rules_of(exchange.caller)
            usage = await self._self_service.usage(exchange.caller, rules, query, prices)
            return answer(200, usage, {"cache-control": "no-store"})
        if endpoints.is_reserved(path):
            raise Refusal(404, "not_found", f"There is nothing at {path[:200]}.")
        if endpoints.is_private(path):
            raise Refusal(
                403, "endpoint_not_allowed", f"{path[:200]} belongs to all users of a server and is not open to keys."
            )
        return None

    def _rules_of(self, caller: Caller) -> Sequence[Rule]:
        """All that limits a caller, whatever model it asks for."""
        models = {model for name, model in self.router.visible() if caller.may_use(name, model)}
        return list(
            dict.fromkeys(rule for model in (None, *sorted(models)) for rule in self.limiter.rules_of(caller, model))
        )

    def _models_for(self, exchange: Exchange) -> list[str]:
        return [name for name, model in self.router.visible() if exchange.caller.may_use(name, model)]

    def _model(self, exchange: Exchange, name: str) -> Reply:
        if name not in self._models_for(exchange):
            raise Refusal(404, "model_not_found", f"There is no model {name[:200]!r} for this API key.", param="model")
        return answer(200, _described(name))

    def allow(self, exchange: Exchange) -> None:
        """Model and permission: what is wanted is known from here on. Raises Refusal."""
        asked = exchange.asked.model
        model = self.router.resolve(asked)
        names = [name for name in (asked, model) if name is not None]
        caller = exchange.caller
        if endpoints.is_unclear(exchange.endpoint):
            raise Refusal(400, "invalid_request", "The request's path must not hold . or .. segments, \\, # or NUL.")
        if not all(caller.may_call(reading) for reading in endpoints.readings(exchange.endpoint)):
            message = f"This API key may not use {exchange.endpoint[:200]}."
            raise Refusal(403, "endpoint_not_allowed", message)
        if not caller.may_use(*names):
            wanted = repr(names[0][:200]) if names else "a server without naming a model"
            raise Refusal(403, "model_not_allowed", f"This API key may not use {wanted}.", param="model")
        if not self.ledger.healthy:
            raise self.unbooked()
        exchange.served_model = model
        exchange.fill_in_model = asked is None and self.config.default_model is not None
        if not caller.may_use_all and exchange.body and asked is None and exchange.asked.kind != "json":
            # We can't see which model it names, and the server might.
            raise Refusal(403, "model_not_allowed", "This API key may only send bodies that name their model.")
        self.attempts.begin(exchange)

    def _server_changed(self, server: Server, before: str, now: str, why: str | None) -> None:
        told = log.info if before == "unknown" and now == "up" else log.warning
        told("server %s is %s%s", server.name, now, f" ({why})" if why else "")
        event = ServerEvent(utc_now(), server.name, now, before, why, self.ledger.worker)
        self.ledger.note(event)


def _described(model: str) -> dict[str, object]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "llmproxy"}
