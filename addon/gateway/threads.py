"""Work that blocks, away from the event loop."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable


def start_thread[T](work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Not a ThreadPoolExecutor's, which Python waits for at its end, however long the work hangs."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(settle: Callable[[], None]) -> None:
        if not done.done():  # nobody waits any more
            settle()

    def run() -> None:
        try:
            settle = functools.partial(done.set_result, work())
        except Exception as error:
            settle = functools.partial(done.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(finish, settle)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


async def in_thread[T](work: Callable[[], T], name: str, timeout_s: float) -> T:
    """Raises TimeoutError when the work takes longer: its thread goes on alone."""
    return await asyncio.wait_for(start_thread(work, name), timeout_s)
