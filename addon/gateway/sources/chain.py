"""Several sources as one: the first that knows a key decides, or all of them must let it in.

What fails refuses, unless the config lets the next one decide; and somebody must have decided.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from gateway.keys import Key
from gateway.sources.settings import Common
from gateway.sources.source import Answer, Asked, Refused, SourceFailed

log = logging.getLogger(__name__)

# A source that is down fails each request: a line for each would say nothing new.
TELL_AGAIN_S = 10.0


class Asking(Protocol):
    """A source that the event loop may ask: it answers at once, or is waited for."""

    def find(self, asked: Asked) -> Awaitable[Answer]: ...

    def start(self) -> None:
        """From here on, it is used. May be called again."""

    def close(self) -> None: ...


class Link(msgspec.Struct, frozen=True):
    """A source by its name, with what the config says of it."""

    name: str
    settings: Common
    source: Asking


class Grant(msgspec.Struct, frozen=True):
    """A key that a source knows. It may still be disabled, expired or used from elsewhere."""

    source: str
    key: Key


class _Told(msgspec.Struct, frozen=True):
    problem: str
    at: float


class Chain:
    """`mode`: one of settings.MODES. `now`: a monotonic clock."""

    def __init__(self, links: tuple[Link, ...], mode: str, now: Callable[[], float] = time.monotonic) -> None:
        self.links = links
        self._all_decide = mode == "all"
        self._now = now
        self._told: dict[str, _Told] = {}
        self._questions = 0
        self._leaving: tuple[Asking, ...] | None = None

    def start(self) -> None:
        for link in self.links:
            link.source.start()

    async def find(self, asked: Asked) -> tuple[Grant, ...] | Refused:
        """Who knows the key; nobody: (). With `first_match`, one at most. Raises SourceFailed, also when all fail."""
        self._questions += 1
        try:
            return await self._find(asked)
        finally:
            self._questions -= 1
            self._close_if_idle()

    async def _find(self, asked: Asked) -> tuple[Grant, ...] | Refused:
        grants: list[Grant] = []
        failures: list[SourceFailed] = []
        for link in self.links:
            try:
                answer = await link.source.find(asked)
            except SourceFailed as error:
                self._tell(link.name, str(error))
                if link.settings.on_error == "next":
                    failures.append(error)
                    continue
                raise
            if isinstance(answer, Refused):
                return answer
            if answer is not None:
                grants.append(Grant(link.name, answer))
            if (answer is None) == self._all_decide:
                return () if answer is None else tuple(grants)
        if failures and len(failures) == len(self.links):
            raise failures[-1]
        return tuple(grants)

    def _tell(self, name: str, problem: str) -> None:
        """Each problem of a source at once, and again every TELL_AGAIN_S while it lasts."""
        told = self._told.get(name)
        if told is None or told.problem != problem or self._now() >= told.at + TELL_AGAIN_S:
            self._told[name] = _Told(problem, self._now())
            log.error("key source %s %s", name, problem)

    def close(self, *, but: "Chain | None" = None) -> None:
        """Once its questions are answered. `but`: goes on with some of the sources."""
        kept = {id(link.source) for link in but.links} if but else set()
        self._leaving = tuple(link.source for link in self.links if id(link.source) not in kept)
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._leaving is not None and not self._questions:
            for source in self._leaving:
                source.close()
            self._leaving = ()
