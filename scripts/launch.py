"""mitmdump on uvloop: `launch.py [--reuse-port] MITMDUMP-ARGUMENTS`.

--reuse-port lets several workers listen on one port; the kernel deals new connections out among them.
"""

import asyncio
import functools
import sys
from asyncio import AbstractEventLoop
from typing import Any

from mitmproxy.tools.main import mitmdump

try:
    from uvloop import Loop as BaseLoop
except ImportError:  # not made for every platform; asyncio's own loop does the same, slower
    from asyncio import SelectorEventLoop as BaseLoop  # type: ignore[assignment]

# Connections that wait to be accepted: more clients than asyncio's 100 may come back at once after a restart.
BACKLOG = 1024


def eager_task(loop: AbstractEventLoop, coro: Any, *, eager_start: bool | None = None, **kwargs: Any) -> Any:
    """uvloop 0.23 hands eager_start to every task factory, but asyncio's own takes it only from Python 3.13.3 on."""
    return asyncio.eager_task_factory(loop, coro, **kwargs)


class Loop(BaseLoop):
    reuse_port = False

    def set_task_factory(self, factory: Any) -> None:
        replaced = factory is asyncio.eager_task_factory and sys.version_info < (3, 13, 3)
        super().set_task_factory(eager_task if replaced else factory)

    def get_task_factory(self) -> Any:
        """What was set: anyio's task groups look for asyncio's own factory, and break when they miss it."""
        factory: Any = super().get_task_factory()
        return asyncio.eager_task_factory if factory is eager_task else factory

    async def create_server(self, *args: Any, **kwargs: Any) -> Any:
        if self.reuse_port:
            kwargs["reuse_port"] = True
        return await super().create_server(*args, **{**kwargs, "backlog": BACKLOG})


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--reuse-port"]:
        Loop.reuse_port = True
        arguments = arguments[1:]
    # mitmproxy calls asyncio.run without a loop factory, and event loop policies end with Python 3.16.
    asyncio.run = functools.partial(asyncio.run, loop_factory=Loop)
    mitmdump(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
