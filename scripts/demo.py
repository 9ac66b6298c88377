"""scripts/serve --demo: two small real llama-servers, users with keys, and their traffic through the proxy.

`upstreams` starts the servers and writes the config. `traffic` is the command that plays the users once the proxy is
up: this file as a program. Nothing here is needed by the proxy itself.
"""

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from llama import LlamaServer, Model, start_server
from supervisor import Command, say

USERS = ("alice", "bob", "carol")
# Two servers: a model each, and one that both serve.
MODELS = {"gpu-1": ["tiny-chat", "tiny-shared"], "gpu-2": ["tiny-coder", "tiny-shared"]}
ALIASES = {"fast": "tiny-shared", "gpt-*": "tiny-chat"}
FALLBACKS = {"tiny-chat": ["tiny-shared"], "tiny-coder": ["tiny-shared"]}
# What gpu-2 serves takes time to read prompts and to write: 6 MB of random weights instead of 0.4.
SIZES = {"gpu-1": Model("demo-small"), "gpu-2": Model("demo-larger", layers=4, embd=256)}

BURST = 60  # requests at once after the start, so that there is something to see
PAUSE_S = 2.0  # between those that follow, as long as the demo runs
LONGEST_ANSWER = 120  # tokens
WATCH_S = 0.3
AWAY_S = 15.0  # for as long a server that was killed stays away: long enough to see it on the dashboard
PROMPT = "Tell me in plain words what happened to the old house at the end of the long road, and who was there. "


@contextmanager
def upstreams(folder: Path) -> Iterator[Path]:
    """Runs the two servers and yields the path of a config for them. The folder also takes its data (keys, usage)."""
    folder.mkdir(parents=True, exist_ok=True)
    say("Starting two small llama-servers with random weights: their answers are words, not sense.")
    with ExitStack() as exits:
        kept = {name: exits.enter_context(KeptServer(name, folder)) for name in MODELS}
        servers = [{"name": name, "url": kept[name].url, "models": models} for name, models in MODELS.items()]
        config = {"data": ".", "servers": servers, "aliases": ALIASES, "fallbacks": FALLBACKS}
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        yield path


class KeptServer:
    """A llama-server that is started again some time after somebody has killed it. Its pid is in FOLDER/NAME.pid."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self._folder = folder
        self._ending = threading.Event()
        self._server = self._start(0)
        self._port = self._server.port
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._server.stop()
        self._pid_path.unlink(missing_ok=True)

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def _pid_path(self) -> Path:
        return self._folder / f"{self._name}.pid"

    def _start(self, port: int) -> LlamaServer:
        server = start_server(self._folder / "models", SIZES[self._name], "--alias", MODELS[self._name][0], port=port)
        self._pid_path.write_text(f"{server.pid}\n")
        return server

    def _watch(self) -> None:
        while not self._ending.wait(WATCH_S):
            if self._server.process.poll() is None:
                continue
            say(f"{self._name} was killed: it is back in {AWAY_S:g} s. Requests go on with the other one meanwhile.")
            if self._ending.wait(AWAY_S):
                return
            self._server.kill()
            self._server = self._start(self._port)
            say(f"{self._name} is back.")


def traffic(config_path: Path, url: str) -> Command:
    argv = (sys.executable, str(Path(__file__)), str(config_path), url)
    return Command("the demo's traffic", argv, needed=False, restart=False)


def key_of(user: str, config_path: Path) -> str:
    """A key for the user: a new one, or the known user's, changed. Keys can't be read back."""
    for verb in ("create", "rotate"):
        command = [sys.executable, str(Path(__file__).with_name("keys.py")), verb, user]
        done = subprocess.run(
            [*command, "--config", str(config_path), "--json"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            key: str = json.loads(done.stdout)["key"]
            return key
    raise SystemExit(f"no key for {user}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Ask:
    """One kind of request. `leave_after`: the client hangs up after so many chunks; None: it reads to the end."""

    path: str
    body: Mapping[str, Any]
    leave_after: int | None = None


def chat(chance: random.Random, **more: Any) -> dict[str, Any]:
    """A chat body. Prompts begin alike, so that the servers find a part of them in their caches."""
    text = PROMPT * chance.randint(1, 12)
    model = chance.choice(["tiny-chat", "tiny-coder", "tiny-shared", "fast", "gpt-4o"])
    tokens = chance.randint(10, LONGEST_ANSWER)
    return {"model": model, "max_tokens": tokens, "messages": [{"role": "user", "content": text}]} | more


def asks(chance: random.Random) -> Iterator[Ask]:
    """What users ask, without end: mostly chats, now and then something that fails or is hung up on."""
    while True:
        yield Ask("/v1/chat/completions", chat(chance, stream=True))
        yield Ask("/v1/chat/completions", chat(chance))
        yield Ask("/v1/messages", chat(chance, stream=True))
        yield Ask("/v1/chat/completions", chat(chance, stream=True))
        yield Ask("/v1/completions", {"model": "tiny-coder", "prompt": PROMPT, "max_tokens": 40, "stream": True})
        yield Ask("/v1/chat/completions", chat(chance, stream=True, ignore_eos=True, max_tokens=2000), leave_after=5)
        yield Ask("/v1/responses", {"model": "fast", "input": PROMPT, "max_output_tokens": 60})
        yield Ask("/v1/chat/completions", chat(chance, model="gone-model"))  # 404: refused by the proxy
        yield Ask("/v1/messages", chat(chance))
        yield Ask("/v1/embeddings", {"model": "tiny-chat", "input": "this server makes none"})  # 501: the server's own


async def send(client: httpx.AsyncClient, key: str, ask: Ask) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    with suppress(httpx.HTTPError):  # the proxy is restarting or ending: the next one may pass
        async with client.stream("POST", ask.path, json=ask.body, headers=headers) as response:
            chunks = 0
            async for _ in response.aiter_raw():
                chunks += 1
                if chunks == ask.leave_after:
                    return


async def play(url: str, keys: Mapping[str, str]) -> None:
    """All users at once in a burst, then one request now and then."""
    chance = random.Random()
    names = list(keys)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        stream = asks(chance)
        at_once = asyncio.Semaphore(4)

        async def one(ask: Ask) -> None:
            async with at_once:
                await send(client, keys[chance.choice(names)], ask)

        await asyncio.gather(*(one(ask) for ask in itertools.islice(stream, BURST)))
        say(f"{BURST} requests of {', '.join(names)} are on the dashboard; one more follows every {PAUSE_S:g} s.")
        for ask in stream:
            await asyncio.sleep(PAUSE_S)
            await one(ask)


def invitation(url: str, key: str, folder: Path) -> str:
    body = '{"model": "fast", "stream": true, "max_tokens": 30, "messages": [{"role": "user", "content": "Hello"}]}'
    return (
        f"Try it:\n\ncurl -N {url}/v1/chat/completions \\\n  -H 'Authorization: Bearer {key}' \\\n  -d '{body}'\n\n"
        f"Kill a server, and see that requests go on (it is back after {AWAY_S:g} s):\n\n"
        f"kill -9 $(cat {shown(folder)}/gpu-2.pid)\n"
    )


def shown(path: Path) -> Path:
    """Shorter, when it is below where the command was given."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("url")
    options = parser.parse_args()
    keys = {user: key_of(user, options.config) for user in USERS}
    say(invitation(options.url, key_of("you", options.config), options.config.parent))
    asyncio.run(play(options.url, keys))


if __name__ == "__main__":
    main()
