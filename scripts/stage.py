"""A gateway to look at: the real proxy over two small real llama-servers, a month of invented use, live requests."""

import json
import secrets
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from gateway import config
from gateway.keystore import KeyStore
from gateway.limits import Budget, Limits
from generate_rows import PEOPLE, generate
from llama import Model, start_server
from stack import Plan, worker_command

START_S = 30.0
USERS = PEOPLE[:8]  # the books know them by these names, numbered in this order
TEAM, RESEARCHERS = "research", PEOPLE[:3]
BUDGETS = (Budget("month", tokens=8_000_000), Budget("day", money=0.5))
PRICES = {
    "qwen3-8b": {"prompt": 0.1, "cached": 0.01, "completion": 0.4},
    "qwen3-coder-30b": {"prompt": 0.2, "cached": 0.02, "completion": 0.8},
    "gpt-oss-120b": {"prompt": 0.5, "cached": 0.05, "completion": 2.0},
}
# The first answers at once; the second takes its time.
SERVERS = {
    "gpu-1": (Model("stage-small"), ["qwen3-8b", "bge-m3"]),
    "gpu-2": (Model("stage-larger", layers=4, embd=256, mean_len=0), ["qwen3-coder-30b"]),
}
ABSENT = {"name": "gpu-3", "url": "http://127.0.0.1:9", "models": ["gpt-oss-120b"], "slots": 2}
PROMPT = "Tell me what happened to the old house at the end of the road. "
SPENT = (
    "insert into spend_daily select ?, day, sum(prompt_tokens + completion_tokens), sum(cost_micros) from usage_daily "
    "where key_name in (select value from json_each(?)) group by day"
)


@dataclass(frozen=True)
class Stage:
    """A running gateway, and the keys to it: one user's and the administrator's."""

    url: str
    key: str
    admin_key: str


@contextmanager
def stage(folder: Path, rows: int) -> Iterator[Stage]:
    """`folder`: an empty one. `rows`: how many requests to invent."""
    with ExitStack() as exits:
        servers: list[dict[str, object]] = [ABSENT]
        for name, (model, models) in SERVERS.items():
            server = start_server(folder / "models", model, "--alias", models[0])
            exits.callback(server.stop)
            servers.append({"name": name, "url": server.url, "models": models, "slots": 4})
        admin_key = secrets.token_urlsafe(24)
        path, port = folder / "config.yaml", free_port()
        text = {
            "listen": f"127.0.0.1:{port}",
            "data": ".",
            "admin_key": admin_key,
            "servers": servers[1:] + servers[:1],
            "aliases": {"fast": "qwen3-8b"},
            "limits": {"all": {"rpm": 1000}, "key": {"rpm": 120, "concurrency": 4}},
            "teams": {TEAM: {"tpm": 100_000, "budgets": [{"per": "month", "tokens": 20_000_000}]}},
            "prices": {"currency": "EUR", "models": PRICES},
        }
        path.write_text(json.dumps(text))
        keys = fill(folder, rows)
        url = exits.enter_context(proxy(path))
        exits.enter_context(traffic(url, keys[:4]))
        yield Stage(url, keys[0], admin_key)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fill(folder: Path, rows: int) -> list[str]:
    """Books, and the keys of their first users."""
    generate(folder / "usage.db", rows)
    keys = []
    with closing(KeyStore(folder / "keys.db")) as store:
        for name in USERS:
            is_member = name in RESEARCHERS
            limits = Limits(budgets=BUDGETS) if is_member else Limits()
            _, key = store.create(name, team=TEAM if is_member else None, limits=limits, actor="stage")
            keys.append(key)
        store.set_disabled(USERS[-1], True, actor="stage")
    with closing(sqlite3.connect(folder / "usage.db")) as db, db:
        for number, name in enumerate(USERS, 1):
            db.execute(SPENT, (f"key:{number}", json.dumps([name])))
        db.execute(SPENT, (f"team:{TEAM}", json.dumps(RESEARCHERS)))
        db.execute("delete from requests where outcome = 'open'")  # those that run are to be real ones
    return keys


@contextmanager
def proxy(path: Path) -> Iterator[str]:
    loaded = config.load(path)
    process = subprocess.Popen(worker_command(Plan(path, loaded, loaded.listen, None), 1).argv)
    url, deadline = f"http://{loaded.listen}", time.monotonic() + START_S
    try:
        while not is_up(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the proxy did not start")
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def traffic(url: str, keys: list[str]) -> Iterator[None]:
    """Each key's holder asks again and again: one server's model for a short answer, the other's for a long one."""
    stop = threading.Event()

    def ask(key: str) -> None:
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False) as client:
            while not stop.wait(0.5):
                for model, length in (("fast", 30), ("qwen3-coder-30b", 500)):
                    said = [{"role": "user", "content": PROMPT * 20}]
                    body = {"model": model, "messages": said, "max_tokens": length}
                    client.post("/v1/chat/completions", json=body, timeout=60)

    threads = [threading.Thread(target=ask, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
