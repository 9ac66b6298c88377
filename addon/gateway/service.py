"""What a config makes: keys, router, ledger, and the decisions that need several of them. Knows no mitmproxy."""

import functools
import logging
import time
from collections import Counter
from typing import Any
from urllib.parse import unquote

from gateway import endpoints, wire
from gateway.attempts import Attempts
from gateway.auth import Authenticator
from gateway.balancer import Balancer
from gateway.config import Config
from gateway.discovery import Prober
from gateway.exchange import Exchange
from gateway.keystore import KeyReader
from gateway.ledger import Ledger
from gateway.records import ServerEvent, utc_now
from gateway.replies import Refusal, Reply, answer
from gateway.routing import Router
from gateway.servers import Server
from gateway.usage import FORMATS
from gateway.wire import Asked

log = logging.getLogger(__name__)


class Service:
    """Everything behind the hooks. Raises OSError when its files can't be opened."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.max_body_bytes = int(config.max_body_mb * 1_000_000)
        self.router = Router(config)
        self.balancer = Balancer(config, self.router, time.monotonic)
        self.prober = Prober(self.router.servers, config.health, self.router.learn, self.balancer.changed)
        self.attempts = Attempts(config, self.balancer, self.prober)
        self.ledger = Ledger(config.data / "usage.db")
        self._keys = KeyReader(config.data / "keys.db")
        self.authenticator = Authenticator(self._keys, utc_now)
        self._outcomes: Counter[str] = Counter()
        self._addresses = {(server.host, server.port) for server in self.router.servers}
        for server in self.router.servers:
            server.health.on_change = functools.partial(self._server_changed, server)

    def close(self, *, still_running: bool = False) -> None:
        """`still_running`: requests of this process go on, and another service settles them."""
        self.prober.stop()
        self.ledger.close(keep_lock=still_running)
        self._keys.close()

    def is_server(self, address: Any) -> bool:
        """Whether an address (host, port) is one of the config's servers."""
        return address is not None and tuple(address[:2]) in self._addresses

    def count(self, outcome: str) -> None:
        self._outcomes[outcome] += 1

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
            return self._health(draining)
        if path == "/metrics" and method in ("GET", "HEAD"):
            return Reply(200, self._metrics().encode(), {"content-type": "text/plain; version=0.0.4"})
        return None

    def answer(self, method: str, exchange: Exchange) -> Reply | None:
        """Answers of our own to a caller. None: the request goes to a server. Raises Refusal."""
        path = exchange.endpoint
        if path in ("/v1/models", "/models") and method in ("GET", "HEAD"):
            return answer(200, {"object": "list", "data": [_described(name) for name in self._models_for(exchange)]})
        if path.startswith("/v1/models/") and method in ("GET", "HEAD"):
            return self._model(exchange, unquote(path.removeprefix("/v1/models/")))
        if endpoints.is_reserved(path):
            raise Refusal(404, "not_found", f"There is nothing at {path[:200]}.")
        if endpoints.is_private(path):
            raise Refusal(
                403, "endpoint_not_allowed", f"{path[:200]} belongs to all users of a server and is not open to keys."
            )
        return None

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
        if not caller.may_use(*names):
            wanted = repr(names[0][:200]) if names else "a server without naming a model"
            raise Refusal(403, "model_not_allowed", f"This API key may not use {wanted}.", param="model")
        if not self.ledger.healthy:
            raise self.unbooked()
        exchange.served_model = model
        exchange.fill_in_model = asked is None and self.config.default_model is not None
        if caller.models and exchange.body and asked is None and exchange.asked.kind != "json":
            # We can't see which model it names, and the server might.
            raise Refusal(403, "model_not_allowed", "This API key may only send bodies that name their model.")
        self.attempts.begin(exchange)

    def _server_changed(self, server: Server, before: str, now: str, why: str | None) -> None:
        told = log.info if before == "unknown" and now == "up" else log.warning
        told("server %s is %s%s", server.name, now, f" ({why})" if why else "")
        event = ServerEvent(utc_now(), server.name, now, before, why, self.ledger.worker)
        self.ledger.note(event)

    def _health(self, draining: bool) -> Reply:
        problem = "draining" if draining else None if self.ledger.healthy else "rows can't be written"
        states = {server.name: server.health.state for server in self.router.servers}
        body = {
            "status": problem or "ok",
            "servers": {"total": len(states), "up": [*states.values()].count("up"), "states": states},
            "running": sum(server.running for server in self.router.servers),
            "waiting": self.balancer.waiting,
        }
        return answer(503 if problem else 200, body)

    def _metrics(self) -> str:
        lines = ["# TYPE llmproxy_requests_total counter"]
        lines += [
            f'llmproxy_requests_total{{outcome="{name}"}} {count}' for name, count in sorted(self._outcomes.items())
        ]
        lines.append("# TYPE llmproxy_running gauge")
        lines += [
            f"llmproxy_running{{server={_label(server.name)}}} {server.running}" for server in self.router.servers
        ]
        lines.append("# TYPE llmproxy_server_up gauge")
        lines += [
            f"llmproxy_server_up{{server={_label(server.name)}}} {int(server.health.state == 'up')}"
            for server in self.router.servers
        ]
        lines.append("# TYPE llmproxy_waiting gauge")
        lines.append(f"llmproxy_waiting {self.balancer.waiting}")
        lines.append("# TYPE llmproxy_ledger_healthy gauge")
        lines.append(f"llmproxy_ledger_healthy {int(self.ledger.healthy)}")
        return "\n".join(lines) + "\n"


def _described(model: str) -> dict[str, object]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "llmproxy"}


def _label(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
