"""mitmproxy's HTTP layer, put in by the addon's `next_layer`: which streams, and which connections to servers.

llama-server closes its connection after every streamed answer without saying so: it is not used again.
"""

from typing import Any

from mitmproxy import http
from mitmproxy.connection import Server
from mitmproxy.net.tls import starts_like_tls_record
from mitmproxy.proxy import commands, events, tunnel
from mitmproxy.proxy.layer import CommandGenerator, NextLayer
from mitmproxy.proxy.layers import ClientTLSLayer, HttpLayer, modes
from mitmproxy.proxy.layers.http import GetHttpConnection, HTTPMode

from gateway.http1 import BoundedHttp1Server
from gateway.stream import GatewayStream
from gateway.upstream import ServerConnections, Sink, is_retired


class GatewayLayer(HttpLayer):
    """A client connection and its connections to servers."""

    def __init__(self, context: Any, mode: HTTPMode) -> None:
        super().__init__(context, mode)
        self._servers = ServerConnections(self.connections)
        self._handle_event = self._begin  # type: ignore[method-assign]

    def _begin(self, event: events.Event) -> CommandGenerator[None]:
        """The first event. A generator of ours around each later one would cost more than what it adds."""
        if self.context.client.alpn in (None, b"http/1.1"):
            # The base class sets this by setdefault, too.
            self.connections.setdefault(self.context.client, BoundedHttp1Server(self.context.fork()))
        del self._handle_event
        yield from super()._handle_event(event)

    def make_stream(self, stream_id: int) -> CommandGenerator[None]:
        self.streams[stream_id] = stream = GatewayStream(self.context.fork(), stream_id, self._servers)
        yield from self.event_to_child(stream, events.Start())

    def get_connection(self, event: GetHttpConnection, *, reuse: bool = True) -> CommandGenerator[None]:
        in_use = {stream.context.server for stream in self.streams.values()}
        self._servers.spent.update(c for c in self.connections if is_retired(c) and c not in in_use)
        # The base class remembers a failed connection for as long as the client stays, and would never try that server
        # again; it also keeps closed ones.
        for connection in [c for c in self.connections if isinstance(c, Server) and self._is_over(c)]:
            old = self.connections.pop(connection)
            self._servers.used.discard(connection)
            if connection in self._servers.spent:
                self._servers.spent.discard(connection)
                if connection.connected:
                    self.connections[connection] = Sink(old.context)
                    yield commands.CloseConnection(connection)
        yield from super().get_connection(event, reuse=reuse)

    def _is_over(self, connection: Server) -> bool:
        if connection in self.waiting_for_establishment:
            return False
        over = connection.error is not None or connection.timestamp_end is not None
        return over or (connection in self._servers.spent and not self._is_busy(connection))

    def _is_busy(self, connection: Server) -> bool:
        """Whether a stream of another request still runs over it (HTTP/2 clients)."""
        return any(
            stream.context.server is connection and isinstance(stream, GatewayStream) and stream.is_answered
            for stream in self.streams.values()
        )


def is_ours(flow: http.HTTPFlow) -> bool:
    """Whether a flow runs through our layers. Without them, an answer's end would not wait for its row."""
    return vars(flow.client_conn).get("speaks_to_gateway_layer") is True


def install(next_layer: NextLayer) -> None:
    """To be called from the addon's `next_layer` hook: puts our HTTP layer under a reverse proxy's connections."""
    context = next_layer.context
    if next_layer.layer is None and len(context.layers) == 1 and isinstance(context.layers[0], modes.ReverseProxy):
        data = next_layer.data_client()
        if not data:
            return
        stack = tunnel.LayerStack()
        if starts_like_tls_record(data):
            stack /= ClientTLSLayer(context)
        stack /= GatewayLayer(context, HTTPMode.transparent)
        next_layer.layer = stack[0]
        vars(context.client)["speaks_to_gateway_layer"] = True
