"""A stream's other side: its client's connections to servers, and what comes from them while the addon is asked."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mitmproxy.connection import Connection
from mitmproxy.proxy import events, layer
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http import (
    RequestProtocolError,
    ResponseData,
    ResponseEndOfMessage,
    ResponseHeaders,
    ResponseProtocolError,
    ResponseTrailers,
)


@dataclass
class ServerConnections:
    """A client's connections to servers: all, those that a request was sent over, and those the server will close."""

    layers: dict[Connection, layer.Layer]
    used: set[Connection] = field(default_factory=set)
    spent: set[Connection] = field(default_factory=set)


def retire(connection: Connection) -> None:
    """A connection to a server shall not be used for another request."""
    vars(connection)["is_retired"] = True


def is_retired(connection: Connection) -> bool:
    return "is_retired" in vars(connection)


class Sink(layer.Layer):
    """Takes over a connection that nobody listens to any more."""

    def _handle_event(self, event: events.Event) -> CommandGenerator[None]:
        yield from ()


_FROM_SERVER = (ResponseHeaders, ResponseData, ResponseTrailers, ResponseEndOfMessage, ResponseProtocolError)


class PausedEvents(deque[events.Event]):
    """What comes while a hook is awaited. That the client leaves must be known at once: it may wait for a server."""

    def __init__(self, client_left: Callable[[], None]) -> None:
        super().__init__()
        self._client_left = client_left

    def append(self, event: events.Event) -> None:
        super().append(event)
        if isinstance(event, RequestProtocolError):
            self._client_left()

    def drop_from_server(self) -> None:
        kept = [event for event in self if not isinstance(event, _FROM_SERVER)]
        self.clear()
        self.extend(kept)
