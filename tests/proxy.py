"""The real proxy as its users start it: mitmdump with the addon, a config file, a data folder and a port of its own."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Self

import httpx

from waiting import eventually

ROOT = Path(__file__).parents[1]
START_S = 30  # mitmproxy takes one second; a busy machine much longer
STOP_S = 15
LOG_TAIL = 6000  # characters

type Row = dict[str, Any]


@dataclass(frozen=True)
class Key:
    id: int
    name: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Proxy:
    """One proxy over all of its restarts, as a context manager. Port, config and books stay; the process changes.

    `servers`, `aliases` and `more` are what stands in config.yaml. `confdir` is mitmproxy's folder for its certificate,
    which takes a second to make: give several proxies the same.
    """

    def __init__(
        self,
        folder: Path,
        servers: Sequence[Mapping[str, Any]],
        *,
        aliases: Mapping[str, str] | None = None,
        confdir: Path | None = None,
        program: str = "mitmdump",
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config_path = folder / "config.yaml"
        self.log_path = folder / "proxy.log"
        self.usage_db = folder / "data" / "usage.db"
        self.addon = ROOT / "addon" / "llmproxy.py"
        self.port = free_port()
        self.config: dict[str, Any] = {
            "listen": f"127.0.0.1:{self.port}",
            "data": "data",
            "servers": [dict(server) for server in servers],
            "aliases": dict(aliases or {}),
            **more,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._confdir = confdir or folder / "mitmproxy"
        self._program = program
        self._arguments = list(arguments)
        self._env = dict(env or {})
        self.write_config()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def write_config(self, **changes: Any) -> None:
        """Change some keys of config.yaml on disk; whether and when the proxy reads it again is up to the test."""
        self.config.update(changes)
        self.config_path.write_text(json.dumps(self.config, indent=1))

    def start(self, attempts: int = 3) -> None:
        """Start, and wait for /health. Another process may have taken the port meanwhile: then take another."""
        self.launch()
        try:
            eventually(lambda: not self.running or self.healthy(), "the proxy's start", START_S)
        except AssertionError as error:
            self.kill()
            raise AssertionError(f"{error}\n{self.log()[-LOG_TAIL:]}") from None
        if not self.running and attempts > 1 and "address already in use" in self.log().lower():
            self.log_path.unlink()
            self.port = free_port()
            self.write_config(listen=f"127.0.0.1:{self.port}")
            self.start(attempts - 1)
        assert self.running, f"the proxy ended at its start:\n{self.log()[-LOG_TAIL:]}"

    def launch(self) -> None:
        """Only start the process, for tests of starts that are meant to fail. Everything it says goes into one log."""
        command = [str(Path(sys.executable).with_name(self._program)), "-s", str(self.addon)]
        command += ["--set", f"llmproxy_config={self.config_path}", "--set", f"confdir={self._confdir}"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self._arguments],
                cwd=self.folder,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self._env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def healthy(self) -> bool:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False

    def stop(self) -> int:
        """SIGTERM, and wait for the end. Gives the exit status."""
        assert self.process
        self.process.terminate()
        return self.wait()

    def kill(self) -> int:
        """SIGKILL: nothing is settled, closed or written any more."""
        assert self.process
        self.process.kill()
        return self.wait()

    def wait(self, within_s: float = STOP_S) -> int:
        """Wait for the end of a process that was told to end, or ends by itself. Never leaves it behind."""
        assert self.process
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def restart(self) -> None:
        if self.running:
            self.stop()
        self.start()

    def hang_up(self) -> None:
        """SIGHUP: read the config again."""
        assert self.process
        self.process.send_signal(signal.SIGHUP)

    def log(self) -> str:
        """What the proxy wrote, over all of its restarts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def keys(self, *arguments: str) -> Any:
        """Run scripts/keys with these arguments; gives the JSON that it prints, or None."""
        command = [sys.executable, str(ROOT / "scripts" / "keys.py"), *arguments]
        done = subprocess.run(
            [*command, "--config", str(self.config_path), "--json"],
            capture_output=True,
            text=True,
            env={**os.environ, **self._env},
            check=False,
        )
        assert done.returncode == 0, f"keys {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout) if done.stdout.strip() else None

    def create_key(self, name: str, *options: str) -> Key:
        return Key(**self.keys("create", name, *options))

    def client(self, key: Key | None = None, **more: Any) -> httpx.Client:
        """For requests to the proxy, as this key's holder."""
        return httpx.Client(
            base_url=self.url, headers=key.headers if key else {}, **{"timeout": 30, "trust_env": False, **more}
        )

    def query(self, sql: str, *values: Any) -> list[Row]:
        """Read usage.db, on a connection that can't write. No rows while the file or its tables are not there."""
        if not self.usage_db.exists():
            return []
        with closing(sqlite3.connect(f"file:{self.usage_db}?mode=ro", uri=True, timeout=10)) as db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(sql, values)]

    def rows(self) -> list[Row]:
        """The table `requests`, oldest first: its ids are UUIDv7."""
        return self.query("select * from requests order by id")

    def wait_rows(self, count: int, settled: bool = True, within_s: float = 10) -> list[Row]:
        """Wait until there are this many rows, by default none of them open. More rows are a mistake at once."""

        def look() -> list[Row]:
            found.clear()
            found.extend(self.rows())
            assert len(found) <= count, f"{len(found)} rows instead of {count}: {found}"
            return (
                found
                if len(found) == count and not (settled and any(row["outcome"] == "open" for row in found))
                else []
            )

        found: list[Row] = []
        try:
            return eventually(look, f"{count} rows", within_s) if count else self.rows()
        except AssertionError as error:
            raise AssertionError(f"{error}\nrows: {found}") from None
