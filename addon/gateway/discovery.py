"""Asks servers, all the time: are they there, which models and slots do they have, are they llama.cpp?

Each server has a task of its own, and at most one thread: a server that hangs holds up nobody else. What was found is
noted on the event loop.
"""

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from gateway.asking import LLAMA_CPP, Asker, Found, NoAnswer, Probe, Told, late
from gateway.config import Health as HealthConfig
from gateway.servers import Server

log = logging.getLogger(__name__)

# Models come and go while a server stays up (a router's, an operator's): they are asked for again.
REFRESH_S = 30.0
# A server that will be back soon is asked more often: a model loads in seconds, a process restarts within one.
SOON_S = 0.5
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
        self._changed = changed
        self._give_up_s = config.timeout_s + 1
        self._watches = {server: _Watch(server, config, learn, self._after_round) for server in servers}
        self._tasks: list[asyncio.Task[None]] = []
        self._asked_once = asyncio.Event()

    def start(self) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per question says nothing
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(watch.run()) for watch in self._watches.values()]

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def ask_soon(self, server: Server) -> None:
        """Something is wrong with a server: ask it now."""
        self._watches[server].ask_soon()

    async def asked_once(self) -> None:
        """Wait, briefly, until every server was asked for the first time."""
        if not self._asked_once.is_set():
            try:
                await asyncio.wait_for(self._asked_once.wait(), self._give_up_s)
            except TimeoutError:
                log.warning("not all servers have been asked yet")

    def _after_round(self) -> None:
        if all(watch.asked_once for watch in self._watches.values()):
            self._asked_once.set()
        self._changed()


def next_in_s(interval_s: float, found: Found, state: str) -> float:
    """A server that is not up and answers at once, if only with a refusal, is asked more often than others."""
    answers_at_once = found.probe is Probe.LOADING or found.refuses
    return min(interval_s, SOON_S) if answers_at_once and state in ("loading", "down") else interval_s


class _Watch:
    """One server's task."""

    def __init__(
        self, server: Server, config: HealthConfig, learn: Callable[[], None], after_round: Callable[[], None]
    ) -> None:
        self.asked_once = False
        self._server = server
        self._config = config
        self._learn = learn
        self._after_round = after_round
        self._asker = Asker(server.config, config.timeout_s)
        self._wake = asyncio.Event()
        self._thread: asyncio.Future[Any] | None = None
        # Counts the times that it came up, or may have: what it told in an earlier life may not hold any more.
        self._life = 1
        self._models_of_life = self._slots_of_life = 0  # the life in which they were told last
        self._models_asked_at = self._slots_asked_at = 0.0
        self._problem: str | None = None

    def ask_soon(self) -> None:
        self._life += 1
        self._wake.set()

    async def run(self) -> None:
        while True:
            began = time.monotonic()
            self._wake.clear()
            interval_s = self._config.interval_s
            try:
                interval_s = await self._round()
            except Exception:
                log.exception("asking server %s failed", self._server.name)
            self.asked_once = True
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
        self._thread = thread = _start_thread(work)
        return await asyncio.wait_for(asyncio.shield(thread), self._config.timeout_s)


def _start_thread[T](work: Callable[[], T]) -> asyncio.Future[T]:
    """Not a ThreadPoolExecutor's, which Python waits for at its end, however long a server hangs."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            settle = functools.partial(done.set_result, work())
        except Exception as error:
            settle = functools.partial(done.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle)

    threading.Thread(target=run, name="asking", daemon=True).start()
    return done
