"""The addon: when things happen. What happens is in the modules below it.

A request's way: `requestheaders` (who) -> `request` (what, where) -> `responseheaders` (choose the meter) -> the
relay -> `answer_ends` (settle, before the client has the end) or `error` (settle what was cut) -> the row.

mitmproxy lets a request pass when a hook fails. Here it can't: the mode points at nowhere, only `_dispatch` gives
a request a destination, and every hook stands behind a gate that refuses. Without a configured service everything
is refused.
"""

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate

from mitmproxy import connection, ctx, http, tls
from mitmproxy.addonmanager import Loader
from mitmproxy.proxy import mode_specs, server_hooks
from mitmproxy.proxy.layer import NextLayer

from gateway import headers, layers, networks, startup, stream, upstream_tls
from gateway.admin import api
from gateway.answers import relay_for
from gateway.auth import Caller
from gateway.exchange import Exchange
from gateway.lifecycle import Lifecycle
from gateway.records import utc_now, uuid7
from gateway.relay import Relay
from gateway.replies import Refusal, Reply
from gateway.service import Service
from gateway.tally import Tally

log = logging.getLogger(__name__)

DEFAULT_CONFIG = Path(__file__).parents[2] / "config.yaml"
OWN_ANSWER_WAITS_S = 1.0
# A body may take its time to come, and a key may have ended meanwhile.
KEY_HOLDS_S = 1.0


def _gate[**P](hook: Callable[Concatenate["Gateway", http.HTTPFlow, P], Any]) -> Callable[..., Any]:
    """A bug on the way to a decision refuses the request: it has no destination until `_dispatch` has given it one."""

    @functools.wraps(hook)
    def gated(self: "Gateway", flow: http.HTTPFlow, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            hook(self, flow, *args, **kwargs)
        except Exception as error:
            self._refuse(flow, _refusal(error, hook.__name__))

    @functools.wraps(hook)
    async def awaited(self: "Gateway", flow: http.HTTPFlow, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            await hook(self, flow, *args, **kwargs)
        except Exception as error:
            self._refuse(flow, _refusal(error, hook.__name__))

    return awaited if inspect.iscoroutinefunction(hook) else gated


def _refusal(error: Exception, where: str) -> Refusal:
    if isinstance(error, Refusal):
        return error
    log.error("a fault in %s: the request is refused", where, exc_info=error)
    return Refusal(500, "internal_error", "The gateway failed. The request was not sent.")


def _address_of(flow: http.HTTPFlow, service: Service) -> str:
    """Where the client is, as far as proxies that are trusted say so."""
    forwarded_for = flow.request.headers.get_all("x-forwarded-for")
    return networks.client_address(flow.client_conn.peername[0], forwarded_for, service.config.trusted_proxies)


class Gateway:
    """The one addon."""

    def __init__(self) -> None:
        self.life = Lifecycle()
        self.connections = self.life.connections

    def load(self, loader: Loader) -> None:
        loader.add_option("llmproxy_config", str, str(DEFAULT_CONFIG), "llmproxy: path of the config file.")
        startup.prepare()

    def configure(self, updated: set[str]) -> None:
        self.life.configure(ctx.options.llmproxy_config)

    def running(self) -> None:
        self.life.run()

    def done(self) -> Any:
        """Returns what mitmproxy shall await at its end. Not `async def`: a reload calls it synchronously."""
        return self.life.end()

    def next_layer(self, next_layer: NextLayer) -> None:
        layers.install(next_layer)

    def client_connected(self, client: connection.Client) -> None:
        if not isinstance(client.proxy_mode, mode_specs.ReverseMode):
            client.error = "llmproxy serves as a reverse proxy only"
            return
        self.connections.connected(client)

    def client_disconnected(self, client: connection.Client) -> None:
        self.connections.disconnected(client)

    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        if not self.life.service or not self.life.service.is_server(data.server.address):
            data.server.error = "no server of this gateway"

    def tls_start_server(self, data: tls.TlsData) -> None:
        upstream_tls.start(data, self.life.service.router.known() if self.life.service else ())

    def server_disconnected(self, data: server_hooks.ServerConnectionHookData) -> None:
        self.connections.server_disconnected(data)

    @_gate
    async def requestheaders(self, flow: http.HTTPFlow) -> None:
        """Who is asking? From here on there is an exchange, or a refusal."""
        if flow.error:
            return  # mitmproxy refuses it already
        self.connections.request_begins(flow)
        request = flow.request
        request.authority = ""  # a proxy's absolute target is no host of ours
        path = request.path.partition("?")[0]
        service = self._ready_service()
        if not layers.is_ours(flow):
            raise Refusal(500, "internal_error", "The gateway failed. The request was not sent.")
        headers.check(request.method, request.data.path, request.headers.fields)
        spoken = ("HTTP/2.0",) if flow.client_conn.alpn == b"h2" else ("HTTP/1.0", "HTTP/1.1")
        if request.http_version not in spoken:
            raise Refusal(400, "invalid_request", "This version of HTTP is not spoken here.")
        if public := service.answer_public(request.method, path, draining=self.life.draining):
            self._reply(flow, public)
            return
        if self.life.draining:
            raise Refusal(503, "shutting_down", "The gateway is shutting down.", headers={"retry-after": "5"})
        length = request.headers.get("content-length", "0")
        body_bytes = int(length) if length.isdigit() else 0
        if api.is_admin(path):
            service.admin.authorize(request.headers.fields)
            if body_bytes > api.MAX_BODY_BYTES:
                raise api.too_large()
            stream.take_body(flow, api.MAX_BODY_BYTES)
            return
        caller = await self._caller_of(flow, service)
        if service.ledger.is_full:  # nobody is let in whose row there is no room for
            raise service.unbooked()
        exchange = Exchange(
            id=uuid7(),
            caller=caller,
            endpoint=path,
            path=request.path,
            started_at=utc_now(),
            started=time.monotonic(),
            worker=service.ledger.worker,
            max_body_bytes=service.max_body_bytes,
            client_request_id=request.headers.get("x-request-id"),
            close_client="close" in request.headers.get("connection", "").lower(),
            http10=request.http_version == "HTTP/1.0",
        )
        stream.open_exchange(flow, exchange)
        self.life.live[flow.id] = flow
        if body_bytes > exchange.max_body_bytes:
            raise service.too_large()

    @_gate
    async def request(self, flow: http.HTTPFlow) -> None:
        """What is wanted, and where does it go?"""
        exchange = stream.exchange_of(flow)
        self.connections.request_ends(flow)
        if flow.response:
            return
        if exchange is None:
            await self._administer(flow)
            return
        service = self._ready_service()
        if time.monotonic() - exchange.started > KEY_HOLDS_S:
            exchange.caller = await self._caller_of(flow, service)
        exchange.fields = flow.request.headers.fields
        exchange.body = flow.request.raw_content or b""
        exchange.request_bytes = len(exchange.body)
        if exchange.request_bytes > exchange.max_body_bytes:
            raise service.too_large()
        content_type = flow.request.headers.get("content-type", "")
        exchange.asked = service.read(exchange.endpoint, exchange.body, content_type)
        await service.prober.asked_once()
        if local := await service.answer(flow.request.method, exchange):
            self._reply(flow, local)
            return
        service.allow(exchange)
        await service.limiter.admit(exchange)
        if await service.attempts.find(exchange):
            await service.limiter.admit_fallback(exchange)
            self._dispatch(flow, exchange)

    async def _caller_of(self, flow: http.HTTPFlow, service: Service) -> Caller:
        """Raises Refusal."""
        keys = headers.keys_in(flow.request.headers.fields)
        return await service.authenticator.authenticate(keys, _address_of(flow, service))

    async def _administer(self, flow: http.HTTPFlow) -> None:
        """A request without an exchange is an administrator's, or there is a fault."""
        service, request = self._ready_service(), flow.request
        if not api.is_admin(request.path.partition("?")[0]):
            raise Refusal(500, "internal_error", "The gateway failed. The request was not sent.")
        service.admin.authorize(request.headers.fields)
        address = _address_of(flow, service)
        self._reply(flow, await service.admin.answer(request.method, request.path, request.raw_content or b"", address))

    def _dispatch(self, flow: http.HTTPFlow, exchange: Exchange) -> None:
        """Give the request its destination: the only place that does."""
        service, server = self._ready_service(), exchange.server
        assert server
        request = flow.request
        body = exchange.body_for(server, request.headers.get("content-type", ""))
        has_body = bool(body) or "content-length" in request.headers
        request.headers.fields = tuple(
            headers.to_server(exchange.fields, len(body) if has_body else None, server.authority, server.config.api_key)
        )
        if exchange.client_request_id is None:
            request.headers["x-request-id"] = exchange.id
        request.raw_content = body
        request.http_version = "HTTP/1.1" if exchange.http10 else request.http_version
        request.path = server.path_prefix + exchange.path
        request.data.scheme, request.data.host, request.data.port = server.scheme.encode(), server.host, server.port
        exchange.begin_attempt()
        exchange.is_open = True
        service.ledger.open(exchange.row("open"))

    @_gate
    async def upstream_failed(self, flow: http.HTTPFlow) -> None:
        """Nothing of an answer has reached the client: once more, on the same server or another one, or a refusal."""
        exchange, service = stream.exchange_of(flow), self._ready_service()
        assert exchange
        try:
            if await service.attempts.find_again(exchange):
                await service.limiter.admit_fallback(exchange)
                self._dispatch(flow, exchange)
        except Refusal as refusal:
            if exchange.has_answer and refusal.status != 500:  # the stream goes on with what there is
                return
            exchange.outcome = "unreachable"
            raise

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        exchange, response = stream.exchange_of(flow), flow.response
        assert response
        try:
            self._begin_answer(flow, exchange, response)
        except Exception:
            log.exception("a fault at an answer's head: it goes on unmetered")
            if exchange and exchange.sent and exchange.outcome is None:
                length = response.headers.get("content-length", "")
                response.stream = exchange.relay = Relay(
                    None, Tally(), time.monotonic, content_length=int(length) if length.isdigit() else None
                )

    def _begin_answer(self, flow: http.HTTPFlow, exchange: Exchange | None, response: http.Response) -> None:
        if exchange is None or exchange.outcome or not exchange.sent:  # an answer of our own
            return
        exchange.status = response.status_code
        response.headers.fields = tuple(headers.to_client(response.headers.fields))
        self._label(response, exchange)
        relay = relay_for(exchange, response.headers)
        if relay.changes_length:
            response.headers.pop("content-length", None)
            response.headers["transfer-encoding"] = "chunked"
        if exchange.http10:
            response.headers.pop("transfer-encoding", None)
        if exchange.http10 or exchange.close_client or self.life.draining:
            response.headers["connection"] = "close"
        response.stream = exchange.relay = relay
        self._ready_service().attempts.began(exchange)

    def answer_continues(self, flow: http.HTTPFlow) -> None:
        """Another server goes on where no event had come yet: what was passed on so far were comments."""
        exchange = stream.exchange_of(flow)
        assert exchange and flow.response and exchange.relay
        try:
            relay = relay_for(exchange, exchange.next_head)
            relay.response_bytes = exchange.relay.response_bytes
            flow.response.stream = exchange.relay = relay
        except Exception:
            log.exception("a fault as an answer goes on: it goes on unmetered")

    async def answer_ends(self, flow: http.HTTPFlow) -> None:
        """The server's answer is complete, the client has not seen its end."""
        exchange = stream.exchange_of(flow)
        if exchange:
            await self._settle(flow, exchange, exchange.final_outcome())

    async def response(self, flow: http.HTTPFlow) -> None:
        """Everything that has an answer comes by here, refusals and answers without a body too."""
        self.connections.flow_ends(flow)
        exchange = stream.exchange_of(flow)
        if exchange is None or exchange.settled:
            return
        assert flow.response
        if exchange.relay is None:  # an answer of our own, or one without a body
            exchange.status = flow.response.status_code
            exchange.response_bytes = len(flow.response.raw_content or b"")
        try:
            await self._settle(flow, exchange, exchange.final_outcome())
        except Exception:
            log.exception("a request can't be settled: it is cut")
            if flow.killable:
                flow.kill()

    async def error(self, flow: http.HTTPFlow) -> None:
        """The client left, the server broke off, or we cut it: `response` will not come."""
        self.connections.flow_ends(flow)
        exchange = stream.exchange_of(flow)
        if exchange is None or exchange.settled:
            return
        if exchange.cut_by is None and flow.error and flow.error.msg != flow.error.KILLED_MESSAGE:
            exchange.cut_by = "client"  # it left while a hook was awaited; a server's end is noted when it comes
        try:
            if exchange.cut_by == "server" and self.life.service:
                self.life.service.attempts.broke_off(exchange)
            if exchange.relay:
                exchange.relay.close()
        except Exception:
            log.exception("a fault at the end of what was cut: its row comes all the same")
        await self._settle(flow, exchange, exchange.cut_outcome())

    async def _settle(self, flow: http.HTTPFlow, exchange: Exchange, outcome: str) -> None:
        """Once, wherever it ends: give back what was claimed, write the row, wait until it is on disk."""
        if exchange.settling:
            return
        exchange.settling = True
        try:
            service = self._ready_service()
            committed = service.settler.settle(exchange, outcome)
        except Exception:
            exchange.settling = False  # it is tried again: by `error`, or by the sweep
            raise
        try:
            if exchange.outcome is None:
                await committed
            elif service.ledger.healthy:
                # An answer of our own waits as long as a busy disk may take, not until a broken one is back.
                await asyncio.wait({committed}, timeout=OWN_ANSWER_WAITS_S)
            exchange.settled = True
            service.vitals.count(outcome)
        finally:
            self.life.live.pop(flow.id, None)

    def _refuse(self, flow: http.HTTPFlow, refusal: Refusal) -> None:
        exchange = stream.exchange_of(flow)
        if exchange:
            exchange.outcome = exchange.outcome or "refused"
            exchange.error_code = refusal.code
        stream.set_response(flow, refusal)
        self._finish_reply(flow, exchange)

    def _reply(self, flow: http.HTTPFlow, reply: Reply) -> None:
        exchange = stream.exchange_of(flow)
        if exchange:
            exchange.outcome = "ok"
        body = b"" if flow.request.method == "HEAD" else reply.body
        flow.response = http.Response.make(reply.status, body, reply.headers)
        self._finish_reply(flow, exchange)

    def _finish_reply(self, flow: http.HTTPFlow, exchange: Exchange | None) -> None:
        assert flow.response
        if exchange:
            self._label(flow.response, exchange)
        if self.life.draining or (exchange and (exchange.close_client or exchange.http10)):
            flow.response.headers["connection"] = "close"

    def _label(self, response: http.Response, exchange: Exchange) -> None:
        """Say in an answer's head which request it was, who answered, and why that server."""
        response.headers["x-request-id"] = exchange.id
        if exchange.limit_headers:  # a server's own are about what the gateway may use of it
            for name in [name for name in response.headers if name.lower().startswith("x-ratelimit-")]:
                del response.headers[name]
            response.headers.update(exchange.limit_headers)
        if exchange.server:
            response.headers["x-llmproxy-server"] = exchange.server.name
            response.headers["x-llmproxy-route"] = exchange.route or ""
        if exchange.fallback_from:
            response.headers["x-llmproxy-fallback"] = exchange.fallback_from

    def _ready_service(self) -> Service:
        if self.life.service is None:
            raise Refusal(503, "not_ready", "The gateway is not configured.")
        return self.life.service
