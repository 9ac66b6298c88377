"""Keeps child processes running, and ends every one of them with itself, however it ends.

Children get a process group of their own, so that Ctrl-C reaches the supervisor alone and each child gets one signal:
to a worker that drains, a second one means "leave now".
"""

import asyncio
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

# A child that dies is started again after this pause, which doubles each time up to the longest.
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
# Who has lived this long is no longer one that fails at start: its next pause is the first one again.
HEALTHY_AFTER_S = 60.0
# mitmproxy is imported in about a second; a small busy machine may take many times as long.
READY_WITHIN_S = 60.0
POLL_S = 0.1

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StartFailedError(Exception):
    """Something that is needed can't start. What it said itself stands above on stderr."""


@dataclass(frozen=True)
class Command:
    name: str
    argv: Sequence[str]
    stop_within_s: float = 5.0  # after SIGTERM; then it is killed
    needed: bool = True  # if it can't start, nothing starts
    restart: bool = True
    quiet: bool = False  # only its stderr is shown


class Child:
    """One command, started again whenever it ends, until stop()."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.settled = not command.needed  # before, an end means that it can't start; after, it is repaired
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> asyncio.Task[None]:
        """Returns the task that watches it. The task raises StartFailedError if the child ends before it is settled."""
        process = await self._spawn()
        self._watcher = asyncio.create_task(self._watch(process))
        return self._watcher

    async def stop(self) -> bool:
        """SIGTERM, and SIGKILL after stop_within_s. True if that was not needed."""
        self._stopping = True
        by_itself = True
        if self._process is not None:
            self.signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), self.command.stop_within_s)
            except TimeoutError:
                by_itself = False
                self.kill()
                await self._process.wait()
        if self._watcher is not None:
            self._watcher.cancel()
        return by_itself

    def kill(self) -> None:
        self._stopping = True
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            *self.command.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL if self.command.quiet else None,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # what a child logs shall be seen now, also in a file
            process_group=0,
            preexec_fn=before_program(),
        )
        return self._process

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            born = time.monotonic()
            end = describe(await process.wait())
            if self._stopping or not self.command.restart:
                return
            if not self.settled:
                raise StartFailedError(f"{self.command.name} can't start: it ended with {end}")
            if time.monotonic() - born >= HEALTHY_AFTER_S:
                pause_s = FIRST_PAUSE_S
            say(f"{self.command.name} ended with {end}: starting it again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            process = await self._spawn()


async def start_all(children: Sequence[Child], host: str | None = None, port: int = 0) -> None:
    """Start them and wait until HOST:PORT answers. Raises StartFailedError if one that is needed ends before that."""
    watchers = [await child.start() for child in children]
    if host is not None:
        ready = asyncio.create_task(answers(host, port))
        done, _ = await asyncio.wait((ready, *watchers), timeout=READY_WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        for watcher in done - {ready}:
            watcher.result()  # raises
        if not done and any(child.command.needed for child in children):
            names = ", ".join(child.command.name for child in children)
            raise StartFailedError(f"{names}: no answer on {host} port {port} within {READY_WITHIN_S:g} s")
    for child in children:
        child.settled = True


async def stop_in_order(groups: Sequence[Sequence[Child]]) -> bool:
    """Group after group, those of one group at once. True if all ended by themselves."""
    by_themselves = [await asyncio.gather(*(child.stop() for child in group)) for group in groups]
    return all(all(group) for group in by_themselves)


async def answers(host: str, port: int) -> None:
    """Returns when something answers HTTP there, with whatever status."""
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if await reader.read(1):
                    return
            finally:
                writer.close()
        await asyncio.sleep(POLL_S)


def say(text: str) -> None:
    """Print at once, also into a pipe. A terminal that was closed must not end what was started from it."""
    with suppress(OSError):
        print(text, flush=True)


def describe(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def before_program() -> Callable[[], None]:
    """What a child runs before its program. A SIGHUP asks for a reload: who can't do that yet shall not die of it."""
    bind = die_with_parent()

    def in_child() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if bind:
            bind()

    return in_child


def die_with_parent() -> Callable[[], None] | None:
    """What a child runs before its program to be killed when the supervisor dies, be it by kill -9. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return in_child
