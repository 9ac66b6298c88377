"""The real PostgreSQL, MariaDB and Redis as Debian has them: each on a free port, in a folder of its own, and without
root's rights, where the server refuses them. Tests may freeze, stop and start them.
"""

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psycopg
import pymysql
import redis

from proxy import free_port
from waiting import eventually

START_S = 60
STOP_S = 30
# An account without rights, that every system has.
NOBODY = "nobody"


class Missing(Exception):
    """The server's programs are not installed."""


class Database:
    """One server. `url`: for its clients; its port stays when it is stopped and started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._frozen = False

    url: str

    def command(self) -> list[str]:
        raise NotImplementedError

    def ping(self) -> None:
        """Raises whatever its client raises until it is up."""
        raise NotImplementedError

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                _unprivileged(self.command()), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        try:
            eventually(self._is_up, f"the start of {self.command()[0]}", START_S)
        except AssertionError as error:
            self.stop()
            raise AssertionError(f"{error}\n{self.log.read_text(errors='replace')[-3000:]}") from None

    def stop(self) -> None:
        """At once, and all of its connections with it."""
        self.thaw()
        if self.process:
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    stop_signal = signal.SIGTERM

    def freeze(self) -> None:
        """It hangs: connections stay, and are even accepted, but nothing is answered."""
        self._signal(signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        if self._frozen:
            self._signal(signal.SIGCONT)
            self._frozen = False

    def _signal(self, number: signal.Signals) -> None:
        assert self.process
        for pid in (self.process.pid, *_children(self.process.pid)):
            os.kill(pid, number)

    def _is_up(self) -> bool:
        assert self.process
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        try:
            self.ping()
        except (OSError, psycopg.Error, pymysql.MySQLError, redis.RedisError):
            return False
        return True


def _children(pid: int) -> list[int]:
    """PostgreSQL has a process for each connection."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class Postgres(Database):
    stop_signal = signal.SIGINT  # "fast": without waiting for its clients

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._programs = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
        if not self._programs:
            raise Missing("no PostgreSQL: install it (apt install postgresql)")
        _run(
            [str(self._programs / "initdb"), "-D", str(folder / "data"), "-U", "postgres", "-A", "trust", "-N"], folder
        )

    def command(self) -> list[str]:
        assert self._programs
        options = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder), "-F"]
        return [str(self._programs / "postgres"), "-D", str(self.folder / "data"), *options]

    def ping(self) -> None:
        psycopg.connect(self.url, connect_timeout=2).close()


class MariaDB(Database):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.url = f"mysql://tester:secret%21@127.0.0.1:{self.port}/test"
        server, install = (shutil.which(name, path=PATHS) for name in ("mariadbd", "mariadb-install-db"))
        if not server or not install:
            raise Missing("no MariaDB: install it (apt install mariadb-server)")
        self._server = server
        data = f"--datadir={folder / 'data'}"
        _run([install, "--no-defaults", data, "--auth-root-authentication-method=normal", "--skip-test-db"], folder)
        (folder / "init.sql").write_text(
            "create database if not exists test;\n"
            "create user if not exists 'tester'@'127.0.0.1' identified by 'secret!';\n"
            "grant all on test.* to 'tester'@'127.0.0.1';\n"
        )

    def command(self) -> list[str]:
        folder = self.folder
        return [
            self._server,
            "--no-defaults",
            f"--datadir={folder / 'data'}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            f"--socket={folder / 's'}",
            f"--pid-file={folder / 'pid'}",
            f"--init-file={folder / 'init.sql'}",
            "--innodb-flush-log-at-trx-commit=0",
        ]

    def connect(self) -> "pymysql.Connection[pymysql.cursors.Cursor]":
        return pymysql.connect(
            host="127.0.0.1",
            port=self.port,
            user="tester",
            password="secret!",
            database="test",
            autocommit=True,
            connect_timeout=2,
        )

    def ping(self) -> None:
        self.connect().close()


class RedisServer(Database):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.url = f"redis://:secret%21@127.0.0.1:{self.port}/0"
        self._server = shutil.which("redis-server")
        if not self._server:
            raise Missing("no Redis: install it (apt install redis-server)")

    def command(self) -> list[str]:
        assert self._server
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", "secret!"]
        return [self._server, *options, "--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always"]

    def client(self) -> "redis.Redis":
        return redis.Redis.from_url(self.url, decode_responses=True, socket_timeout=5)

    def ping(self) -> None:
        self.client().ping()


PATHS = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
DATABASES: dict[str, Callable[[Path], Database]] = {"postgres": Postgres, "mariadb": MariaDB, "redis": RedisServer}


def _unprivileged(command: list[str]) -> list[str]:
    if os.geteuid() != 0:
        return command
    setpriv = shutil.which("setpriv", path=PATHS)
    assert setpriv, "setpriv is missing (util-linux)"
    account = pwd.getpwnam(NOBODY)
    return [setpriv, f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups", *command]


def own(folder: Path) -> None:
    """Give a folder to who runs the servers, and let them come into it."""
    if os.geteuid() == 0:
        account = pwd.getpwnam(NOBODY)
        os.chown(folder, account.pw_uid, account.pw_gid)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(_unprivileged(command), capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
