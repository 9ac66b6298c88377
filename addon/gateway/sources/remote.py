"""A source that takes its time, asked in threads: few at once, each key by one thread only, and nobody waits longer
than its `timeout_s`. What it answers is kept for a while, counted from before the question.

Keys that were good lately have threads of their own: whoever tries out unknown ones does not hold them up. Whatever a
driver raises ends here: the source has failed.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import datetime

from gateway.keys import Key
from gateway.records import utc_now
from gateway.sources.kept import Entry, GoodLately, Kept, Place
from gateway.sources.settings import Common
from gateway.sources.source import Answer, Asked, Source, SourceFailed
from gateway.threads import start_thread

# A source that hangs keeps so many threads, and no more.
MAX_THREADS = 8
# The same, for keys that were good lately.
MAX_GOOD_THREADS = 4
# Different keys that wait for an answer. Beyond, somebody tries out keys, and is refused without waiting.
MAX_WAITING = 1000


class Remote:
    """Asks `source`, on behalf of the event loop. `by_address`: its answers hold for the client's address only.
    `now`: a monotonic clock. `utc_now`: as UTC ISO 8601.
    """

    def __init__(
        self,
        source: Source,
        settings: Common,
        *,
        by_address: bool = False,
        now: Callable[[], float] = time.monotonic,
        utc_now: Callable[[], str] = utc_now,
    ) -> None:
        self._source = source
        self._settings = settings
        self._by_address = by_address
        self._now = now
        self._utc_now = utc_now
        self._yes, self._no = Kept(now), Kept(now)
        self._good = GoodLately(now)
        self._unknown_lane, self._good_lane = _Lane(MAX_THREADS), _Lane(MAX_GOOD_THREADS)
        self._asking: dict[Place, asyncio.Future[Answer]] = {}
        self._threads = 0
        self._is_over = False

    def renewed(self, source: Source) -> "Remote":
        """The same with another source, which was made of the same settings: what is known stays known."""
        remote = Remote(source, self._settings, by_address=self._by_address, now=self._now, utc_now=self._utc_now)
        remote._yes, remote._no, remote._good = self._yes, self._no, self._good
        return remote

    def start(self) -> None: ...

    def close(self) -> None:
        """Questions that are under way are answered first."""
        self._is_over = True
        self._close_if_idle()

    async def find(self, asked: Asked) -> Answer:
        """Raises SourceFailed."""
        place = Place(asked.sha256, asked.address if self._by_address else "")
        if kept := self._yes.get(place) or self._no.get(place):
            return kept.answer
        answer = self._asking.get(place)
        if answer is None:
            lane = self._good_lane if self._good.has(asked.sha256) else self._unknown_lane
            if lane.waiting >= MAX_WAITING:
                raise SourceFailed(f"has {MAX_WAITING} questions to answer already")
            answer = asyncio.ensure_future(self._ask(asked, place, lane))
            lane.waiting += 1
            self._asking[place] = answer
            answer.add_done_callback(lambda done: self._answered(done, place, lane))
        return await asyncio.shield(answer)  # who leaves takes nobody's answer along

    async def _ask(self, asked: Asked, place: Place, lane: "_Lane") -> Answer:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await lane.free.acquire()
                asked_at = self._now()
                work = self._start(asked, lane)
                answer = await asyncio.shield(work)  # a thread that hangs keeps its place until it ends
        except TimeoutError:
            raise SourceFailed(f"does not answer within {self._settings.timeout_s:g} s") from None
        self._keep(place, answer, asked_at)
        return answer

    def _start(self, asked: Asked, lane: "_Lane") -> asyncio.Future[Answer]:
        try:
            work = start_thread(lambda: self._find(asked), "key-source")
        except RuntimeError:
            lane.free.release()
            raise SourceFailed("can't be asked: this process can't start another thread") from None
        self._threads += 1
        work.add_done_callback(lambda done: self._thread_ended(done, lane))
        return work

    def _find(self, asked: Asked) -> Answer:
        try:
            return self._source.find(asked)
        except SourceFailed:
            raise
        except Exception as error:
            raise SourceFailed(f"can't be asked: its driver fails with {type(error).__name__}") from None

    def _thread_ended(self, work: asyncio.Future[Answer], lane: "_Lane") -> None:
        lane.free.release()
        self._threads -= 1
        work.exception()  # is told by who waits for it, if anybody still does
        self._close_if_idle()

    def _answered(self, done: asyncio.Future[Answer], place: Place, lane: "_Lane") -> None:
        if not done.cancelled():
            done.exception()  # the same
        lane.waiting -= 1
        del self._asking[place]
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._is_over and not self._asking and not self._threads:
            self._source.close()

    def _keep(self, place: Place, answer: Answer, asked_at: float) -> None:
        for_s = self._good_for_s(answer)
        self._good.note(place.sha256, is_good=for_s is not None)
        if for_s is None:
            self._no.keep(place, Entry(answer, asked_at + self._settings.negative_cache_s))
        else:
            self._yes.keep(place, Entry(answer, asked_at + for_s))

    def _good_for_s(self, answer: Answer) -> float | None:
        """None: it lets nobody in. One that ends meanwhile is then a no like any other."""
        now = self._utc_now()
        if not isinstance(answer, Key) or answer.state(now) != "active":
            return None
        if answer.expires_at is None:
            return self._settings.cache_s
        left = datetime.fromisoformat(answer.expires_at) - datetime.fromisoformat(now)
        return min(self._settings.cache_s, left.total_seconds() + self._settings.negative_cache_s)


class _Lane:
    """Threads for some of the questions, and how many of these wait for an answer."""

    def __init__(self, threads: int) -> None:
        self.free = asyncio.Semaphore(threads)
        self.waiting = 0
