"""HTTP/2 by hand, as rawhttp is HTTP/1.1: many requests on one connection, and a RST_STREAM when a test wants one.

The proxy speaks it over TLS, with a certificate that mitmproxy makes for itself.
"""

import json
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)

from proxy import Key
from rawhttp import Answer, Fields

WINDOW = 1 << 24  # far above any answer here, so that nobody waits for room
FRAME = 1 << 14  # the largest that every peer takes


@dataclass
class _Stream:
    status: int = 0
    headers: Fields = field(default_factory=list)
    body: bytes = b""
    complete: bool = False
    over: bool = False


class Http2:
    """One connection to a port of this machine."""

    def __init__(self, port: int, timeout_s: float = 20) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        self.sock = context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=timeout_s))
        assert self.sock.selected_alpn_protocol() == "h2"
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding="latin-1"))
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(WINDOW)
        self._streams: dict[int, _Stream] = {}
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def post(self, target: str, key: Key, body: object, headers: Iterable[str] = ()) -> int:
        """Send a request; gives its stream's number. `headers`: `name: value`."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        stream = self._h2.get_next_available_stream_id()
        fields = [(":method", "POST"), (":scheme", "https"), (":authority", "proxy.test"), (":path", target)]
        fields += [("authorization", f"Bearer {key.key}"), ("content-length", str(len(data)))]
        fields += [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in headers)]
        self._h2.send_headers(stream, fields)
        self._h2.increment_flow_control_window(WINDOW, stream)
        self._streams[stream] = _Stream()
        for start in range(0, len(data), FRAME):
            self._h2.send_data(stream, data[start : start + FRAME])  # the default window takes what tests send
        self._h2.end_stream(stream)
        self._flush()
        return stream

    def reset(self, stream: int) -> None:
        """The client does not want this answer any more, and keeps the connection."""
        self._h2.reset_stream(stream, ErrorCodes.CANCEL)
        self._flush()

    def wait_for(self, stream: int, what: bytes) -> None:
        """Read until the answer's body holds this."""
        state = self._streams[stream]
        while what not in state.body:
            assert not state.over and self._more(), f"{what!r} did not come: {state}"

    def answer(self, stream: int) -> Answer:
        """Read the answer to its end, in whatever way it ends."""
        state = self._streams[stream]
        while not state.over and self._more():
            pass
        assert state.status, "no head came"
        return Answer(state.status, state.headers, state.body, state.complete)

    def is_silent(self, for_s: float) -> bool:
        """Whether nothing of any answer comes for this long."""
        had = sum(len(state.body) for state in self._streams.values())
        self.sock.settimeout(for_s)
        try:
            while self._more():
                if any(state.over for state in self._streams.values()):
                    return False
                if sum(len(state.body) for state in self._streams.values()) > had:
                    return False
        except TimeoutError:
            return True
        return False

    def _more(self) -> bool:
        try:
            data = self.sock.recv(1 << 16)
        except ConnectionError:
            data = b""
        for event in self._h2.receive_data(data) if data else []:
            self._note(event)
        if not data:
            self._all_over()
        self._flush()
        return bool(data)

    def _note(self, event: Event) -> None:
        match event:
            case ResponseReceived(stream_id=int(stream), headers=headers):
                fields = [(_text(name), _text(value)) for name, value in headers or []]
                self._streams[stream].status = int(next(value for name, value in fields if name == ":status"))
                self._streams[stream].headers = [pair for pair in fields if not pair[0].startswith(":")]
            case DataReceived(stream_id=int(stream), data=bytes(data)):
                self._streams[stream].body += data
            case StreamEnded(stream_id=int(stream)):
                self._streams[stream].complete = self._streams[stream].over = True
            case StreamReset(stream_id=int(stream)):
                self._streams[stream].over = True
            case ConnectionTerminated():
                self._all_over()

    def _all_over(self) -> None:
        for state in self._streams.values():
            state.over = True

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            try:
                self.sock.sendall(data)
            except OSError:
                self._all_over()


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def post(port: int, target: str, key: Key, body: object, headers: Iterable[str] = ()) -> Answer:
    """One request on a connection of its own."""
    with Http2(port) as connection:
        return connection.answer(connection.post(target, key, body, headers))
