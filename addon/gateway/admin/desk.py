"""What the admin API's handlers work with, and how the stores' complaints become refusals."""

import logging
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from gateway import made
from gateway.books import Books, BooksUnavailable, Fact
from gateway.changes import ReloadReport
from gateway.keystore import InUse, KeyNotFound, KeyProblem, KeyStore, NameTaken
from gateway.limits import Rule
from gateway.made import Merge
from gateway.quota import CountersUnavailable, Standing
from gateway.registry import Registry, merge
from gateway.replies import Refusal
from gateway.routing import Router
from gateway.settings import Config
from gateway.threads import in_thread
from gateway.yaml_text import ConfigError

log = logging.getLogger(__name__)

# keys.db answers in milliseconds; it waits for other writers for five seconds at most.
STORE_S = 10.0


class Standings(Protocol):
    async def standings(self, rules: Sequence[Rule], /) -> tuple[Standing, ...]: ...


type Reload = Callable[[str], Awaitable[ReloadReport]]


@dataclass
class Room:
    """What the gateway has for its administrators. `declared`: what the config file says, without what the API made.
    `report`: what became of the config that was read last. `reload`: read the file and what was made again, and apply
    them; its argument is the reason.
    """

    declared: Config
    keys_db: Path
    books: Books
    router: Router
    waiting: Callable[[], int]
    limiter: Standings
    report: Callable[[], ReloadReport]
    reload: Reload


@dataclass(frozen=True)
class Desk:
    """One call's view of it. `actor`: who calls, for the audit."""

    room: Room
    actor: str

    async def keys[T](self, work: Callable[[KeyStore], T], missing: str = "Key not found") -> T:
        """Work on keys and teams, in a thread. Raises Refusal."""

        def run() -> T:
            with closing(KeyStore(self.room.keys_db, create=False)) as store:
                return work(store)

        try:
            return await _away(run)
        except KeyNotFound as error:
            raise not_found(missing) from error
        except (NameTaken, InUse) as error:
            raise Refusal(409, "conflict", error.reason, param=error.field) from error
        except KeyProblem as error:
            raise Refusal(400, "invalid_request", str(error), param=error.field) from error

    async def registry[T](self, work: Callable[[Registry], T]) -> T:
        """Work on servers and aliases, in a thread. Raises Refusal."""

        def run() -> T:
            with closing(Registry(self.room.keys_db, create=False)) as registry:
                return work(registry)

        try:
            return await _away(run)
        except made.Missing as error:
            raise not_found(str(error)) from error
        except made.Taken as error:
            raise Refusal(409, "conflict", str(error)) from error
        except made.Wrong as error:
            raise Refusal(400, "invalid_request", str(error), param=error.field) from error

    async def ask(self, sql: str, values: Sequence[Fact] = ()) -> list[dict[str, Any]]:
        """The rows of usage.db. Raises Refusal."""
        try:
            return await self.room.books.ask(sql, values)
        except BooksUnavailable as error:
            raise unavailable("Use can't be read at the moment.") from error

    async def standings(self, rules: Sequence[Rule]) -> tuple[Standing, ...]:
        """Raises Refusal."""
        try:
            return await self.room.limiter.standings(rules)
        except CountersUnavailable as error:
            raise unavailable("Limits can't be read at the moment.") from error

    async def apply(self, changed: str) -> str | None:
        """Put in use what was made. Says what stands in the way: it is kept all the same. A bad file does not: what was
        made joins the one before it.
        """
        report = await self.room.reload(f"{self.actor} changed {changed}")
        return None if report.ok or report.changed else report.problem

    async def merge(self) -> Merge:
        """What the file and the API make together."""
        made = await self.registry(lambda registry: registry.made())
        try:
            return merge(self.room.declared, made)
        except ConfigError as error:
            return Merge(self.room.declared, (str(error),))


class Done(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """`warning`: it is kept, but not in use; this is why."""

    ok: bool
    warning: str | None = None


class Failure(msgspec.Struct, frozen=True):
    """`param`: the field or parameter at fault."""

    message: str
    type: str
    param: str | None
    code: str


class Problem(msgspec.Struct, frozen=True):
    """A refusal, as OpenAI's clients read it (`error`) and as smol-llm-proxy's do (`detail`): see `replies`."""

    error: Failure
    detail: str


def not_found(message: str) -> Refusal:
    return Refusal(404, "not_found", message)


def declared(what: str, where: str) -> Refusal:
    message = (
        f"{what} is declared in the config file ({where}): change it there. The file is read again when it changes."
    )
    return Refusal(409, "declared", message)


def unavailable(message: str) -> Refusal:
    return Refusal(503, "unavailable", message, headers={"retry-after": "5"})


async def _away[T](work: Callable[[], T]) -> T:
    try:
        return await in_thread(work, "admin", STORE_S)
    except (TimeoutError, OSError, sqlite3.Error) as error:
        log.error("keys.db can't be used: %s", str(error) or type(error).__name__)
        raise unavailable("keys.db can't be used at the moment.") from error
