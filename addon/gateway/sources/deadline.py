"""A moment after which a thread reads no more, whatever trickles in: with a timeout of each read alone, a server that
sends a byte now and then would keep the thread for ever.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpcore

# So many times its timeout: the driver's own come first.
CUT = 2


@contextlib.contextmanager
def cut_off(seconds: float, cut: Callable[[], None]) -> Iterator[None]:
    """Where a driver knows no deadline: `cut`, called in another thread each so many seconds until the work within has
    ended, takes its connection away.
    """
    has_ended = threading.Event()

    def watch() -> None:
        while not has_ended.wait(seconds):
            cut()

    threading.Thread(target=watch, name="key-source-deadline", daemon=True).start()
    try:
        yield
    finally:
        has_ended.set()


class Deadline:
    """Of each thread that uses it, its own."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        self._of_thread.at = time.monotonic() + seconds
        try:
            yield
        finally:
            del self._of_thread.at

    def left_s(self) -> float:
        """Raises TimeoutError when it is over."""
        left = float(self._of_thread.at) - time.monotonic()
        if left <= 0:
            raise TimeoutError("its time is over")
        return left


class Backend(httpcore.SyncBackend):
    """Connections of httpcore that keep to a deadline, from their opening on."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        timeout = self._deadline.left_s()
        return _Stream(super().connect_tcp(host, port, timeout, local_address, socket_options), self._deadline)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left_s())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> "_Stream":
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, self._deadline.left_s()), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
