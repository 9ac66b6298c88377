"""Asks servers, all the time: are they there, which models and slots do they have, are they llama.cpp?

Each server has a task of its own, and at most one thread: a server that hangs holds up nobody else. What was found is
noted on the event loop.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gateway.asking import LLAMA_CPP, Asker, Found, NoAnswer, Probe, Told, late
from gateway.servers import Server
from gateway.settings import Config
from gateway.settings import Health as HealthConfig
from gateway.settings import Server as ServerConfig
from gateway.threads import start_thread

log = logging.getLogger(__name__)

# Models come and go while a server stays up (a router's, an operator's): they are asked for again.
REFRESH_S = 30.0
# A server that will be back soon is asked more often: a model loads in seconds, a process restarts within one.
SOON_S = 0.5
# A new server gets its requests when it has told its models, or when this has passed.
INTRODUCTION_S = 2.0
# `ask_soon` may come with every request that fails.
MIN_GAP_S = 0.1


class Prober:
    """Keeps servers up to date, in the background of the event loop. Raises OSError when a CA file can't be used.

    `learn` is called when models have changed, `changed` after each round of asking one server.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        config: HealthConfig,
        learn: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self._learn = learn
        self._changed = changed
        self._config = config
        self._watches = {server: self._watch(server, server.config, config) for server in servers}
        self._asked_once = asyncio.Event()

    def start(self) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per question says nothing
        for watch in self._watches.values():
            watch.start()
        self._note_asked()  # there may be none to ask

    def stop(self) -> None:
        for watch in self._watches.values():
            watch.stop()

    def prepare(self, servers: Sequence[Server], config: Config) -> "dict[Server, Watch]":
        """What `reconfigure` needs for another config: watches that may stay, and new ones for all that differs.

        Blocks; changes nothing. A CA file that a server is known by may have other CAs now: it is read again.
        `servers`: those of `config.servers`, in its order. Raises OSError when a CA file can't be used.
        """

        def watch(server: Server, record: ServerConfig) -> Watch:
            kept = self._watches.get(server)
            if kept and (server.config, self._config) == (record, config.health) and not record.ca_file:
                return kept
            return self._watch(server, record, config.health)

        return {server: watch(server, record) for server, record in zip(servers, config.servers, strict=True)}

    async def introduce(self, watches: "Mapping[Server, Watch]") -> None:
        """Ask servers that are new for the first time, so that they are known when they get requests; not for long."""
        new = [watch for server, watch in watches.items() if server not in self._watches]
        for watch in new:
            watch.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(INTRODUCTION_S):
                for watch in new:
                    await watch.asked_once.wait()

    def drop(self, watches: "Mapping[Server, Watch]") -> None:
        """They were prepared in vain."""
        for server, watch in watches.items():
            if watch is not self._watches.get(server):
                watch.stop()

    def reconfigure(self, watches: "dict[Server, Watch]", config: HealthConfig) -> None:
        """Go over to what was prepared."""
        before, self._watches, self._config = self._watches, watches, config
        self.drop(before)
        self.start()

    def ask_soon(self, server: Server) -> None:
        """Something is wrong with a server: ask it now, unless it is none of ours any more."""
        if watch := self._watches.get(server):
            watch.ask_soon()

    async def asked_once(self) -> None:
        """Wait, briefly, until every server was asked for the first time."""
        if not self._asked_once.is_set():
            try:
                await asyncio.wait_for(self._asked_once.wait(), self._config.timeout_s + 1)
            except TimeoutError:
                log.warning("not all servers have been asked yet")

    def _watch(self, server: Server, record: ServerConfig, config: HealthConfig) -> "Watch":
        return Watch(server, Asker(record, config.timeout_s), config, self._learn, self._after_round)

    def _after_round(self) -> None:
        self._note_asked()
        self._changed()

    def _note_asked(self) -> None:
        if all(watch.asked_once.is_set() for watch in self._watches.values()):
            self._asked_once.set()


def next_in_s(interval_s: float, found: Found, state: str) -> float:
    """A server that is not up and answers at once, if only with a refusal, is asked more often than others."""
    answers_at_once = found.probe is Probe.LOADING or found.refuses
    return min(interval_s, SOON_S) if answers_at_once and state in ("loading", "down") else interval_s


class Watch:
    """One server's task."""

    def __init__(
        self,
        server: Server,
        asker: Asker,
        config: HealthConfig,
        learn: Callable[[], None],
        after_round: Callable[[], None],
    ) -> None:
        self.asked_once = asyncio.Event()
        self._server = server
        self._config = config
        self._learn = learn
        self._after_round = after_round
        self._asker = asker
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._thread: asyncio.Future[Any] | None = None
        # Counts the times that it came up, or may have: what it told in an earlier life may not hold any more.
        self._life = 1
        self._models_of_life = self._slots_of_life = 0  # the life in which they were told last
        self._models_asked_at = self._slots_asked_at = 0.0
        self._problem: str | None = None

    def start(self) -> None:
        self._task = self._task or asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        if self._task:
            self._task.cancel()
        if self._thread:  # nobody wants to know any more what comes of it
            self._thread.cancel()

    def ask_soon(self) -> None:
        self._life += 1
        self._wake.set()

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            self._wake.clear()
            interval_s = self._config.interval_s
            try:
                interval_s = await self._round()
            except Exception:
                log.exception("asking server %s failed", self._server.name)
            self.asked_once.set()
            try:
                self._after_round()
            except Exception:
                log.exception("what comes after asking server %s failed", self._server.name)
            await self._rest(began, interval_s)

    async def _rest(self, began: float, interval_s: float) -> None:
        await asyncio.sleep(began + MIN_GAP_S - time.monotonic())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), max(0.0, began + interval_s - time.monotonic()))

    async def _round(self) -> float:
        """Ask once, and note what was said. Gives the seconds until it shall be asked again."""
        found = await self._probe()
        if found.is_llama and self._server.config.type is None:
            self._server.type = LLAMA_CPP
        if found.probe is Probe.OK:
            # Before it counts as up: who waits for it shall know its models and slots.
            found = await self._ask_what_it_is(found)
        if found.probe is not Probe.OK:
            self._life += 1
        self._note(found)
        return next_in_s(self._config.interval_s, found, self._server.health.state)

    async def _probe(self) -> Found:
        path, is_llama = self._config.path, self._server.type == LLAMA_CPP
        try:
            return await self._in_thread(lambda: self._asker.probe(path, is_llama=is_llama))
        except TimeoutError:
            return Found(Probe.FAILED, late(path, self._config.timeout_s))

    def _note(self, found: Found) -> None:
        health, now = self._server.health, time.monotonic()
        if found.probe is Probe.OK:
            health.probe_ok(now)
        elif found.probe is Probe.LOADING:
            health.probe_loading(now, found.reason)
        else:
            health.probe_failed(now, found.reason, refuses=found.refuses)

    async def _ask_what_it_is(self, found: Found) -> Found:
        """All that the config leaves open, when it came up; later what may have changed, or was not told.

        Gives what was found, which is a failure if it refuses the gateway's key. Its health path may need none.
        """
        try:
            if self._models_are_due():
                told = await self._ask_models()
                if told.is_refusal:
                    return Found(Probe.FAILED, told.problem or "", is_llama=found.is_llama)
            if self._slots_are_due():
                await self._ask_slots()
        except Exception:  # it is there all the same
            log.exception("asking server %s what it is failed", self._server.name)
        return found

    def _models_are_due(self) -> bool:
        """Those that the config names are asked for as well: to see that the server takes the gateway's key."""
        server = self._server
        not_told = server.type is None if server.config.models is not None else not server.models
        refresh = time.monotonic() - self._models_asked_at >= REFRESH_S
        return not_told or refresh or self._models_of_life != self._life

    def _slots_are_due(self) -> bool:
        server = self._server
        if server.config.slots is not None or server.type != LLAMA_CPP:
            return False
        refresh = server.slots is None and time.monotonic() - self._slots_asked_at >= REFRESH_S
        return refresh or self._slots_of_life != self._life

    async def _ask_models(self) -> Told:
        life, self._models_asked_at = self._life, time.monotonic()
        told = await self._models()
        self._note_models(told)
        if told.models is not None or self._server.config.models is not None:
            self._models_of_life = life
        return told

    async def _ask_slots(self) -> None:
        life, self._slots_asked_at = self._life, time.monotonic()
        with contextlib.suppress(TimeoutError, NoAnswer):  # then the next round asks again
            self._server.slots = await self._in_thread(self._asker.slots) or self._server.slots
            self._slots_of_life = life

    async def _models(self) -> Told:
        try:
            return await self._in_thread(self._asker.models)
        except TimeoutError:
            return Told(problem=late("/v1/models", self._config.timeout_s))

    def _note_models(self, told: Told) -> None:
        """What the config says, and what was not told this time, stays as it was."""
        server = self._server
        if server.config.type is None:
            server.type = told.type or server.type
        if server.config.models is not None:
            return
        if told.problem and not told.is_refusal and told.problem != self._problem:
            log.warning("server %s %s", server.name, told.problem)
        self._problem = told.problem
        if told.models is not None and told.models != server.models:
            server.models = told.models
            self._learn()

    async def _in_thread[T](self, work: Callable[[], T]) -> T:
        """Raises TimeoutError when the work takes too long: its thread goes on, and the next work waits for its end."""
        if self._thread and not self._thread.done():
            await asyncio.wait({self._thread}, timeout=self._config.timeout_s)
            if not self._thread.done():
                raise TimeoutError
        self._thread = thread = start_thread(work, "asking")
        return await asyncio.wait_for(asyncio.shield(thread), self._config.timeout_s)
