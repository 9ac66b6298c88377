"""The counters behind limits and budgets, in Redis: exact over all workers of all machines that share it.

One script does all (`counters/*.lua`): each operation happens whole, or not at all. The time is Redis's, so that
machines agree; which day it is, for budgets, the asking machine says. Asking again for what may have happened already
is safe: a request is admitted and settled once by its id. A worker has a lease; what one without a lease holds is given
back.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gateway import shared_calls
from gateway.limits import Rule
from gateway.quota import Ask, CountersUnavailable, Decision, LimitEvent, Settlement, Standing
from gateway.shared_calls import Call, Lease
from gateway.yaml_text import ConfigError

if TYPE_CHECKING:
    from redis import Redis, RedisError

# A script takes a fraction of a millisecond. Whoever waits longer for an answer has lost the server, or it hangs.
TIMEOUT_S = 1.0

_SCRIPT = ("state.lua", "limits.lua", "operations.lua")


class CallFailed(Exception):
    """A call that can never succeed, whatever state the server is in."""


type Reply = bytes | CountersUnavailable | CallFailed


class SharedAccounts:
    """`quota.Accounts` on the Redis server of an URL, from any thread. Raises ConfigError when that can't be an URL.

    What it is asked raises CountersUnavailable when the server can't be reached or is in no state to answer.
    `clock`: what is taken for the time instead of Redis's own.
    """

    def __init__(self, url: str, clock: Callable[[], float] | None = None) -> None:
        self._redis = _client(url)
        self._clock = clock
        folder = Path(__file__).with_name("counters")
        self._script = "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPT)
        self._sha = hashlib.sha1(self._script.encode(), usedforsecurity=False).hexdigest()

    @property
    def address(self) -> str:
        """Where the server is, without the password."""
        settings = self._redis.connection_pool.connection_kwargs
        return str(settings.get("path") or f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}")

    def admit(self, ask: Ask, now: float) -> Decision:
        return shared_calls.decision(self._run(shared_calls.admission(ask)))

    def settle(self, settlement: Settlement, now: float) -> list[LimitEvent]:
        return shared_calls.events(self._run(shared_calls.settling(settlement)))

    def standings(self, rules: tuple[Rule, ...], now: float) -> tuple[Standing, ...]:
        return shared_calls.standings(self._run(shared_calls.asking(rules, now)))

    def renew(self, worker: str, keep_s: float) -> Lease:
        """Take or lengthen a worker's lease."""
        return shared_calls.lease(self._run(shared_calls.renewal(worker, keep_s)))

    def leave(self, worker: str) -> None:
        """Give up a worker's lease, and what it still holds."""
        self._run(shared_calls.leaving(worker))
        self.give_back(worker)

    def give_back(self, worker: str) -> int:
        """What a worker without a lease holds is given back. Returns for how many requests."""
        call = shared_calls.giving_back(worker)
        return sum(iter(lambda: shared_calls.count(self._run(call)), 0))

    def run(self, calls: Sequence[Call]) -> list[Reply]:
        """The answers, in their order: one round trip for all. Raises CountersUnavailable when there are none."""
        replies = self._send(calls)
        unknown = [index for index, reply in enumerate(replies) if reply is None]
        if unknown:  # the server is new, or its scripts were flushed
            self._load_script()
            again = self._send([calls[index] for index in unknown])
            for index, reply in zip(unknown, again, strict=True):
                replies[index] = reply
        return [CountersUnavailable("the script is gone") if reply is None else reply for reply in replies]

    def close(self) -> None:
        self._redis.close()

    def _run(self, call: Call) -> bytes:
        (reply,) = self.run([call])
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _send(self, calls: Sequence[Call]) -> list[Reply | None]:
        """None: the server does not know the script."""
        from redis import RedisError
        from redis.exceptions import NoScriptError

        now = "" if self._clock is None else repr(self._clock())
        pipeline = self._redis.pipeline(transaction=False)
        for call in calls:
            pipeline.execute_command("EVALSHA", self._sha, 0, call.operation, call.message, now)
        try:
            found: list[object] = pipeline.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            raise CountersUnavailable(_why(error)) from error
        replies: list[Reply | None] = []
        for reply in found:
            if isinstance(reply, NoScriptError):
                replies.append(None)
            elif isinstance(reply, RedisError):
                replies.append(CallFailed(str(reply)) if _is_final(reply) else CountersUnavailable(_why(reply)))
            else:
                assert isinstance(reply, bytes), f"the script answered {reply!r}"
                replies.append(reply)
        return replies

    def _load_script(self) -> None:
        from redis import RedisError

        try:
            self._redis.script_load(self._script)
        except (RedisError, OSError) as error:
            raise CountersUnavailable(_why(error)) from error


def _client(url: str) -> "Redis":
    try:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError:
        needs = "a redis:// URL needs redis, which is not installed: run scripts/extras"
        raise ConfigError(f"limits.storage: {needs}") from None
    try:
        # Who asks decides whether to ask again.
        once = Retry(NoBackoff(), 0)
        return Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=once, protocol=2)
    except ValueError:  # whose text may hold a part of the password
        hint = "in a password / # ? @ are written as %2F %23 %3F %40"
        raise ConfigError(f"limits.storage: expected a URL as in redis://:PASSWORD@HOST:6379/0; {hint}") from None


def _is_final(error: "RedisError") -> bool:
    """Whether it is about the call itself. Others pass: memory is full, the disk is, a password was changed."""
    from redis import ResponseError

    return type(error) is ResponseError and (error.status_code == "ERR" or str(error).startswith("WRONGTYPE"))


def _why(error: Exception) -> str:
    from redis.exceptions import AuthenticationError, InvalidResponse

    if isinstance(error, InvalidResponse):
        return f"what answers there is not Redis: {error}"
    if isinstance(error, AuthenticationError):
        return f"user or password are wrong: {error}"
    return str(error).rstrip(".") or type(error).__name__
