"""Connections that threads share: each is used by one at a time, and a broken or outdated one is never used again."""

import contextlib
import threading
from collections.abc import Callable, Iterator


class Pool[T]:
    """`make` opens another one where none is free; `end` closes one. As many are kept as were in use at once."""

    def __init__(self, make: Callable[[], T], end: Callable[[T], None]) -> None:
        self._make = make
        self._end = end
        self._lock = threading.Lock()
        self._free: list[T] = []
        self._generation = 0
        self._closed = False

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    @contextlib.contextmanager
    def one(self) -> Iterator[T]:
        """Whatever is raised within, the connection is closed; so is one that was taken before `clear`."""
        with self._lock:
            generation = self._generation
            free = self._free.pop() if self._free else None
        connection = self._make() if free is None else free
        is_good = False
        try:
            yield connection
            is_good = True
        finally:
            with self._lock:
                is_kept = is_good and not self._closed and generation == self._generation
                if is_kept:
                    self._free.append(connection)
            if not is_kept:
                self._end(connection)

    def clear(self) -> None:
        """No connection that was made before is used again: those in use end when they come back."""
        with self._lock:
            self._generation += 1
            ended, self._free = self._free, []
        for connection in ended:
            self._end(connection)

    def close(self) -> None:
        self._closed = True
        self.clear()
