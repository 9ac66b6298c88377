"""Wait for something to become true: by polling with a deadline, never by sleeping for as long as it might take."""

import time
from collections.abc import Callable

POLL_S = 0.005


def eventually[T](look: Callable[[], T], what: str = "it", within_s: float = 10) -> T:
    """Poll until `look()` is true, and return it. Raises AssertionError with what it last was."""
    deadline = time.monotonic() + within_s
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {within_s} s: {seen!r}")
        time.sleep(POLL_S)
    return seen
