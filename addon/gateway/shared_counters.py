"""The counters in Redis, for the event loop: a thread sends whatever waits as one round trip.

While Redis can't be reached nobody is admitted, at once and without asking it: only the thread goes on knocking. What
has ended meanwhile waits in memory and is settled afterwards; an admission whose answer got lost is taken back by its
id. A lease, renewed all the time, tells the other workers that what this one holds is still held.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable

import msgspec

from gateway import shared_calls
from gateway.limits import Rule
from gateway.quota import Ask, CountersUnavailable, Decision, LimitEvent, Settlement, Standing
from gateway.shared_accounts import CallFailed, Reply, SharedAccounts
from gateway.shared_calls import Call

log = logging.getLogger(__name__)

# A worker without a lease is dead. Three renewals fit into it.
LEASE_S = 15.0
RETRY_S = 0.25
# A round trip that has begun when one comes, and its own: each takes TIMEOUT_S of shared_accounts at most.
ANSWER_S = 2.0
MAX_BATCH = 500
# What waits for Redis: ends of requests that ran when it went away. No worker runs that many at once.
MAX_WAITING = 10_000
# What is left when the process ends is tried this often, then logged.
LAST_ATTEMPTS = 3
CLOSE_S = 10.0


class SharedCounters:
    """The counters of one worker. All but `close` is for the event loop. Raises ConfigError when `url` can't be one."""

    def __init__(self, url: str, worker: str, lease_s: float = LEASE_S) -> None:
        self.problem: str | None = None
        self._accounts = SharedAccounts(url)
        self._worker = worker
        self._lease_s = lease_s
        self._renewed: float | None = None
        self._held: set[str] = set()
        self._waiting: list[_Waiting] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="counters", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the counters answered when they were last asked."""
        return self.problem is None

    async def admit(self, ask: Ask) -> Decision:
        """Raises CountersUnavailable: the request must be refused. Whoever is cancelled meanwhile holds nothing."""
        asked = _Asked(shared_calls.admission(ask), shared_calls.decision)
        try:
            decision = await self._answer(asked)
        except BaseException:
            if asked.is_sent:
                self._take_back(ask)
            raise
        if decision.denial is None:
            self._held.add(ask.id)
        return decision

    def settle(self, settlement: Settlement) -> "asyncio.Future[list[LimitEvent]]":
        """The future is done once it is booked, however long that takes; it fails with OSError if it never can be.

        What holds nothing and used nothing is not sent: while nobody is admitted, that is every request.
        """
        if settlement.id not in self._held and not settlement.tokens and not settlement.micros:
            nothing: asyncio.Future[list[LimitEvent]] = asyncio.get_running_loop().create_future()
            nothing.set_result([])
            return nothing
        self._held.discard(settlement.id)
        asked = _Asked(shared_calls.settling(settlement), shared_calls.events, settlement)
        if not self._put(asked):
            asked.finish(CallFailed("the gateway stops" if self._closing else "too many wait"))
        return asked.future

    async def standings(self, rules: tuple[Rule, ...]) -> tuple[Standing, ...]:
        """Raises CountersUnavailable."""
        return await self._answer(_Asked(shared_calls.asking(rules, time.time()), shared_calls.standings))

    def close(self) -> None:
        """Settle what waits, give up the lease and stop. What can't be settled within a few retries is logged."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=CLOSE_S)

    async def _answer[T](self, asked: "_Asked[T]") -> T:
        if self.problem is not None:
            raise CountersUnavailable(self.problem)
        if not self._put(asked):
            raise CountersUnavailable("the gateway stops" if self._closing else "too many wait")
        try:
            async with asyncio.timeout(ANSWER_S):
                return await asked.future
        except TimeoutError:
            raise CountersUnavailable(f"no answer within {ANSWER_S:g} s") from None
        finally:
            self._forget(asked)

    def _forget(self, asked: "_Waiting") -> None:
        """Nobody waits for it any more: it isn't sent, if it hasn't been."""
        with self._wake:
            asked.is_given_up = True
            if not asked.is_sent and asked in self._waiting:
                self._waiting.remove(asked)

    def _take_back(self, ask: Ask) -> None:
        """An admission that nobody waits for any more may have happened, or may happen yet."""
        nothing = Settlement(id=ask.id, day=ask.day, scopes=(), was_served=False)
        self._put(_Waiting(shared_calls.settling(nothing), nothing))

    def _put(self, waiting: "_Waiting") -> bool:
        with self._wake:
            if self._closing or len(self._waiting) >= MAX_WAITING:
                return False
            self._waiting.append(waiting)
            self._wake.notify()
        return True

    def _run(self) -> None:
        last_attempts = LAST_ATTEMPTS
        while last_attempts and (batch := self._next_batch()) is not None:
            try:
                left = self._serve(batch)
            except BaseException as error:  # even SystemExit, which mitmproxy's log raises when it can't be written
                self.problem = "a fault of the gateway's own"
                left = _put_off(batch, error)
                with contextlib.suppress(BaseException):
                    log.exception("the shared counters failed; they try again")
            if self.healthy:
                continue
            with self._wake:
                self._waiting[:0] = left
            last_attempts -= self._closing
            time.sleep(RETRY_S)
        self._end()

    def _next_batch(self) -> "list[_Waiting] | None":
        """Whatever waits; waits for it, but not beyond the time when the lease is due. None: this is the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._closing or not self.healthy, self._renewal_due_s())
            if self._closing and not self._waiting:
                return None
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        return batch

    def _serve(self, batch: "list[_Waiting]") -> "list[_Waiting]":
        """Send a batch. Returns what has to be sent again later."""
        try:
            if not self.healthy or not self._renewal_due_s():
                self._renew()
            with self._wake:
                batch = [waiting for waiting in batch if not waiting.is_given_up]
                for waiting in batch:
                    waiting.is_sent = True
            replies = self._accounts.run([waiting.call for waiting in batch]) if batch else []
        except (CountersUnavailable, CallFailed) as error:
            self._now_has(str(error))
            return _put_off(batch, error)
        refusals = [reply for reply in replies if isinstance(reply, CountersUnavailable)]
        self._now_has(str(refusals[0]) if refusals else None)
        answers = list(zip(batch, replies, strict=True))
        left = [waiting for waiting, reply in answers if waiting.must_try_again_after(reply)]
        _tell([(waiting, reply) for waiting, reply in answers if not waiting.must_try_again_after(reply)])
        return left

    def _renewal_due_s(self) -> float:
        if self._renewed is None:
            return 0
        return max(self._renewed + self._lease_s / 3 - time.monotonic(), 0)

    def _renew(self) -> None:
        """Lengthen the lease, and give back what workers without one hold."""
        before, began = self._renewed, time.monotonic()
        lease = self._accounts.renew(self._worker, self._lease_s)
        self._renewed = began
        if before is not None and not lease.had:
            if time.monotonic() - before < self._lease_s:
                log.error("%s has lost the counters: all of them begin anew", self._accounts.address)
            else:
                log.warning("%s was out of reach for long: running requests hold nothing now", self._accounts.address)
        for worker in lease.dead:
            if count := self._accounts.give_back(worker):
                log.warning("what %d requests of a worker held that died was given back", count)

    def _now_has(self, problem: str | None) -> None:
        before, self.problem = self.problem, problem
        if problem == before:
            return
        if problem is None:
            log.warning("the counters in %s can be reached again", self._accounts.address)
        else:
            # An error that is logged while mitmproxy starts ends it.
            level = logging.WARNING if self._renewed is None else logging.ERROR
            where = self._accounts.address
            log.log(level, "limits.storage: %s: %s; requests are refused until it can be used", where, problem)

    def _end(self) -> None:
        with self._wake:
            left, self._waiting = self._waiting, []
        _tell([(waiting, CallFailed("the gateway stops")) for waiting in left])
        with contextlib.suppress(CountersUnavailable, CallFailed):  # then the lease runs out by itself
            self._accounts.leave(self._worker)
        self._accounts.close()


class _Waiting:
    """A call that waits for its turn. `settlement`: it is one, and tried until it is done."""

    def __init__(self, call: Call, settlement: Settlement | None = None) -> None:
        self.call = call
        self.settlement = settlement
        self.is_sent = False
        self.is_given_up = False

    def must_try_again_after(self, reply: Reply) -> bool:
        return self.settlement is not None and isinstance(reply, CountersUnavailable)

    def finish(self, reply: Reply) -> None:
        if isinstance(reply, Exception) and self.settlement and self.settlement.scopes:
            log.critical("LOST: can't be settled: %s: %s", reply, self.settlement)


class _Asked[T](_Waiting):
    """Somebody waits for the answer. Made on the event loop."""

    def __init__(self, call: Call, read: Callable[[bytes], T], settlement: Settlement | None = None) -> None:
        super().__init__(call, settlement)
        self._read = read
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def finish(self, reply: Reply) -> None:
        super().finish(reply)
        if self.future.done():  # nobody waits any more
            return
        if isinstance(reply, Exception):
            self.future.set_exception(OSError(str(reply)) if self.settlement else CountersUnavailable(str(reply)))
            return
        try:
            self.future.set_result(self._read(reply))
        except (CountersUnavailable, msgspec.MsgspecError) as error:
            self.future.set_exception(error)


def _put_off(batch: list[_Waiting], error: BaseException) -> list[_Waiting]:
    """Who can't wait is told. Returns what is tried again."""
    _tell([(waiting, CountersUnavailable(str(error))) for waiting in batch if not waiting.settlement])
    return [waiting for waiting in batch if waiting.settlement]


def _tell(answers: list[tuple[_Waiting, Reply]]) -> None:
    """Finish calls on their event loop, which is woken once for all of them."""
    loop = next((waiting.future.get_loop() for waiting, _ in answers if isinstance(waiting, _Asked)), None)

    def finish() -> None:
        for waiting, reply in answers:
            waiting.finish(reply)

    if loop is None:
        finish()
        return
    try:
        loop.call_soon_threadsafe(finish)
    except RuntimeError:  # the loop has ended: nobody waits any more, but what is lost has to be said
        for waiting, reply in answers:
            _Waiting.finish(waiting, reply)
