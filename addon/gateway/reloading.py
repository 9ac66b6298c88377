"""Reads the config again: when asked to, when its file has changed, when another worker's admin API has made something.

All that can be wrong with a file is found before anything is changed, and then it changes nothing. What is right is
taken over in one step. The admin API's servers and aliases join those of the file that was good last.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from gateway import config as config_file
from gateway import upstream_tls
from gateway.changes import ReloadReport, changes, keeping, needs_restart, told
from gateway.config import ConfigError
from gateway.made import Made
from gateway.records import utc_now
from gateway.registry import merge, read_made, record_reload
from gateway.service import Service
from gateway.settings import Config
from gateway.threads import in_thread, start_thread
from gateway.watch import FileWatch

log = logging.getLogger(__name__)

POLL_S = 0.5
# Reading files and making TLS settings of them takes a blink; a file system may hang.
READ_TIMEOUT_S = 30.0

FILE_CHANGED = "its file has changed"


class Read(msgspec.Struct, frozen=True):
    """`declared`: what the file says, or said when it was good last. `config`: with what the admin API made.

    `problem`: with the file, which is of `written_at`.
    """

    declared: Config
    config: Config
    made: Made
    problem: str | None = None
    written_at: str | None = None
    needs_restart: tuple[str, ...] = ()


def read_first(path: Path) -> Read:
    """To start with. Blocks. Raises ConfigError and OSError."""
    declared = _read_file(path)
    made = read_made(declared.data / "keys.db", create=True)
    try:
        return Read(declared, _merged(declared, made), made)
    except ConfigError as error:  # what was made once and is wrong now is no reason not to start
        log.warning("what the admin API made is left out: %s", error)
        return Read(declared, declared, made)


def _read_file(path: Path) -> Config:
    declared = config_file.load(path)
    try:
        upstream_tls.check(declared.servers)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return declared


def _merged(declared: Config, made: Made) -> Config:
    config = merge(declared, made).config
    if config != declared:
        upstream_tls.check(config.servers)
    return config


class Reloader:
    """One config file and the service that it makes. All methods are for the event loop."""

    def __init__(
        self, file: FileWatch, first: Read, service: Service, applied: Callable[[Config, Config], None]
    ) -> None:
        """`file`: watched since before it was read. `applied` is told the config before and after."""
        self._file = file
        self._path = file.path
        self._declared = first.declared
        self._made = first.made
        self._service = service
        self._applied = applied
        self._keys_version: int | None = None
        self._hung_up = asyncio.Event()
        self._turn = asyncio.Lock()
        self._asked = self._answered = 0
        self._watcher: asyncio.Task[None] | None = None
        self._reading: asyncio.Future[Read] | None = None
        self._look: asyncio.Future[str | None] | None = None
        self._look_problem: str | None = None

    def start(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        if self._watcher:
            self._watcher.cancel()

    def hang_up(self) -> None:
        """SIGHUP has come."""
        self._hung_up.set()

    async def reload(self, reason: str) -> ReloadReport:
        """Read the file and what was made, and go over to it. One at a time: who asks while one runs gets the next."""
        self._asked += 1
        mine = self._asked
        async with self._turn:
            if self._answered < mine:
                self._answered = self._asked
                self._service.reloaded(await self._reload(reason))
            return self._service.report

    async def _reload(self, reason: str) -> ReloadReport:
        before = self._service.config
        try:
            read = await self._read_away()
            if not read.problem or read.config != before:  # what is as it was may still name files that are not
                await self._service.reload(read.config, lambda: self._applied(before, read.config))
        except (ConfigError, OSError) as error:
            return self._failed(reason, str(error) or type(error).__name__)
        except Exception:
            log.exception("a fault while the config is read again")
            return self._failed(reason, "the gateway failed; its log says how")
        declared, self._declared, self._made = self._declared, read.declared, read.made
        self._service.admin.reconfigure(read.declared)
        changed = changes(before, read.config)
        if of_the_file := changes(declared, read.declared):
            await self._record(reason, read.written_at, of_the_file)
        if read.problem:
            return self._failed(reason, read.problem, changed)
        said = "; ".join(told(changed)) or "nothing is different"
        if read.needs_restart:
            said += f". Changed, and takes a restart: {', '.join(read.needs_restart)}"
        log.warning("%s was read again (%s): %s", self._path.name, reason, said)
        return ReloadReport(utc_now(), True, None, changed, read.needs_restart)

    def _failed(self, reason: str, problem: str, changed: tuple[str, ...] = ()) -> ReloadReport:
        for path in (str(self._path), f"{self._path.absolute().parent}/"):  # folders are nobody's concern
            problem = problem.replace(path, self._path.name if path == str(self._path) else "")
        rest = f"; by the admin API: {'; '.join(told(changed))}" if changed else ""
        log.warning("%s was read again (%s) and not taken over: %s%s", self._path.name, reason, problem, rest)
        return ReloadReport(utc_now(), False, problem, changed)

    async def _record(self, reason: str, written_at: str | None, changed: tuple[str, ...]) -> None:
        path = self._service.config.data / "keys.db"
        try:
            await in_thread(lambda: record_reload(path, reason, written_at, changed), "audit", READ_TIMEOUT_S)
        except OSError as error:
            log.error("the audit does not tell of this change of the config: %s", str(error) or type(error).__name__)

    async def _read_away(self) -> Read:
        """Raises ConfigError, OSError."""
        if self._reading and not self._reading.done():
            raise OSError("the reading before this one has not come to an end: a file system hangs")
        self._reading = start_thread(self._read, "config")
        return await asyncio.wait_for(asyncio.shield(self._reading), READ_TIMEOUT_S)

    def _read(self) -> Read:
        """In a thread. Raises ConfigError, OSError."""
        running = self._service.config
        made = read_made(running.data / "keys.db")
        self._file.take()
        problem, wanted = None, self._declared
        try:
            wanted = _read_file(self._path)
        except ConfigError as error:
            problem = str(error)
        declared = keeping(running, wanted)
        merged = _merged(declared, made)
        return Read(declared, merged, made, problem, self._file.written_at, needs_restart(running, wanted))

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hung_up.wait(), POLL_S)
            try:
                if reason := await self._reason():
                    await self.reload(reason)
            except Exception:
                log.exception("watching the config failed; it goes on")

    async def _reason(self) -> str | None:
        """Why the config is to be read again now, if it is."""
        if self._hung_up.is_set():
            self._hung_up.clear()
            return "SIGHUP"
        # On a file system that hangs one look hangs, and no more are begun.
        if self._look is None:
            self._look = self._begin_look()
        await asyncio.wait([self._look], timeout=POLL_S)
        if not self._look.done():
            return None
        look, self._look = self._look, None
        try:
            reason, self._look_problem = look.result(), None
        except (ConfigError, OSError) as error:
            if isinstance(error, OSError):
                self._keys_version = None  # what can't be read now may be readable later, and be the same
            if str(error) != self._look_problem:
                self._look_problem = str(error)
                log.error("what the admin API made stays as it is: %s", error)
            return None
        if reason == FILE_CHANGED:
            self._keys_version = None  # what was made has not been looked at
        return reason

    def _begin_look(self) -> asyncio.Future[str | None]:
        version = self._service.keys_version()
        is_new = version is not None and version != self._keys_version
        if is_new:
            self._keys_version = version

        def look() -> str | None:
            if self._file.has_changed():
                return FILE_CHANGED
            if is_new and read_made(self._service.config.data / "keys.db") != self._made:
                return "what the admin API made has changed"
            return None

        return start_thread(look, "config")
