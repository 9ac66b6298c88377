"""A scripted llama-server with slots: it works on so many requests at once, and the rest waits in order of arrival.

As with llama-server nothing at all is sent to who waits. With a slot come the head and the first text at once; the rest
comes when the request's time is over, `max_tokens` times TOKEN_S. It needs next to no CPU, so that waiting is all that
is measured. It ends when its standard input does.
"""

import argparse
import asyncio
import contextlib
import re
import sys
from collections.abc import Callable
from typing import Protocol

import uvloop

from benchmark import shapes

TOKEN_S = 0.001
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_tokens": *(\d+)')
_FRAMES = shapes.frames(2, include_usage=True)


class Writer(Protocol):
    def write(self, data: bytes) -> None: ...


class SlotServer:
    def __init__(self, slots: int) -> None:
        self._free = asyncio.Semaphore(slots)  # hands out in order of arrival
        self._fixed: dict[bytes, Callable[[], bytes]] = {
            b"GET /health": shapes.health,
            b"GET /v1/models": shapes.models,
            b"GET /props": lambda: shapes.reply("200 OK", {"total_slots": slots, "model_alias": shapes.MODEL}),
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection. Like llama-server's, it ends after a stream."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = _LENGTH.search(head)
                body = await reader.readexactly(int(length[1])) if length else b""
                if head.startswith(b"POST " + shapes.PATH.encode()):
                    await self.work(body, writer)
                    break
                asked = b" ".join(head.split(b" ", 2)[:2]).partition(b"?")[0]
                writer.write(self._fixed.get(asked, shapes.not_found)())
        writer.close()

    async def work(self, body: bytes, writer: Writer) -> None:
        """One chat, answered once it has had a slot for its time."""
        tokens = _TOKENS.search(body)
        async with self._free:
            writer.write(shapes.STREAM_HEAD + _FRAMES[0])
            await asyncio.sleep(int(tokens[1]) * TOKEN_S if tokens else 0)
        writer.write(b"".join(_FRAMES[1:]))


async def serve(port: int, slots: int) -> None:
    await asyncio.start_server(SlotServer(slots).serve, "127.0.0.1", port, backlog=1024)
    print(f"READY http://127.0.0.1:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def main() -> None:
    options = argparse.ArgumentParser(description="A scripted llama-server with slots.")
    options.add_argument("port", type=int)
    options.add_argument("--slots", type=int, default=4)
    chosen = options.parse_args()
    uvloop.run(serve(chosen.port, chosen.slots))


if __name__ == "__main__":
    main()
