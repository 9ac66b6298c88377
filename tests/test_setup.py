"""The scripts: how they find a Python, and how scripts/serve starts, restarts and ends what belongs to it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from proxy import ROOT, free_port
from waiting import eventually

SCRIPTS = ROOT / "scripts"
START_S = 60

type StartServe = Callable[..., "Serve"]


def fake_python(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def find_python(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """What env.sh's search says when PATH holds nothing but the folder's interpreters."""
    script = folder / "scripts" / "probe"
    script.parent.mkdir(exist_ok=True)
    script.write_text(
        f"#!/bin/sh\nPATH={os.environ['PATH']}\n. {SCRIPTS}/env.sh\nroot={folder}\nPATH={folder}\nuse some.lock\n"
    )
    script.chmod(0o755)
    return subprocess.run(["/bin/sh", script], env=env, capture_output=True, text=True, check=False)


OLD, BROKEN = "exit 1", "echo 'pyenv: command not found' >&2; exit 127"


def new(name: str) -> str:
    """Answers the question for its version, and, started to make the environment, says who it is."""
    return f'case "$1" in -c) echo "$0";; *) echo made by {name} >&2; exit 0;; esac'


@pytest.mark.parametrize(
    ("pythons", "env", "chosen"),
    [
        ({"python3.13": new("3.13"), "python3.12": new("3.12")}, {}, "3.13"),
        ({"python3.14": BROKEN, "python3.13": BROKEN, "python3.12": new("3.12")}, {}, "3.12"),
        ({"python3": OLD, "python": new("plain")}, {}, "plain"),
        ({"python3.13": new("3.13"), "mine": new("mine")}, {"PYTHON": "mine"}, "mine"),
        ({"python3.13": new("3.13"), "mine": OLD}, {"PYTHON": "mine"}, "3.13"),
    ],
    ids=["newest first", "shims that fail are passed over", "an old python3", "PYTHON first", "PYTHON is too old"],
)
def test_the_first_python_that_runs_and_is_new_enough(
    tmp_path: Path, pythons: dict[str, str], env: dict[str, str], chosen: str
) -> None:
    for name, script in pythons.items():
        fake_python(tmp_path, name, script)
    result = find_python(tmp_path, **env)
    assert (result.returncode, result.stderr) == (0, f"made by {chosen}\n")


@pytest.mark.parametrize("pythons", [{}, {"python3": OLD, "python": BROKEN}], ids=["none", "only old ones"])
def test_without_a_python_one_line_says_what_to_do(tmp_path: Path, pythons: dict[str, str]) -> None:
    for name, script in pythons.items():
        fake_python(tmp_path, name, script)
    result = find_python(tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "Python 3.12 or newer" in result.stderr


@pytest.mark.parametrize("name", ["serve", "keys", "test", "bench", "lock", "extras"])
def test_scripts_can_be_executed(name: str) -> None:
    assert os.access(SCRIPTS / name, os.X_OK)
    assert (SCRIPTS / name).read_bytes().startswith(b"#!/bin/sh\n")


@pytest.mark.parametrize(("asked", "status"), [("--help", 0), ("-h", 0), ("psycopg", 2)])
def test_extras_installs_nothing_when_it_is_asked_something(asked: str, status: int, tmp_path: Path) -> None:
    """In a copy without anything to install from."""
    script = tmp_path / "scripts" / "extras"
    script.parent.mkdir()
    script.write_text((ROOT / "scripts" / "extras").read_text())
    done = subprocess.run(["/bin/sh", script, asked], capture_output=True, text=True, check=False)
    assert (done.returncode, bool(done.stdout), bool(done.stderr)) == (status, status == 0, status != 0)
    assert "scripts/extras" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "path", ["requirements.lock", "scripts/demo.lock", "scripts/extras.lock", "tests/requirements.lock"]
)
def test_every_lock_names_the_same_versions(path: str) -> None:
    """The environments add up in one .venv: a second lock must never change what the first one installed."""

    def versions(name: str) -> set[str]:
        return {line.split(" \\")[0] for line in (ROOT / name).read_text().splitlines() if "==" in line.split(" ")[0]}

    def pins(name: str) -> set[str]:
        return {version.split(";")[0].strip() for version in versions(name)}

    assert pins(path) <= pins("tests/requirements.lock")


class Serve:
    """scripts/serve.py with a config of its own and everything that it says in one file."""

    def __init__(self, folder: Path, *arguments: str, config: str | None = None) -> None:
        self.port = free_port()
        self.config = folder / "config.yaml"
        servers = "servers: [{name: a, url: 'http://127.0.0.1:1'}]"
        self.config.write_text(config or f'listen: "127.0.0.1:{self.port}"\ndrain_s: 5\n{servers}\n')
        self.log = folder / "serve.log"
        command = [sys.executable, str(SCRIPTS / "serve.py"), "--config", str(self.config), *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def said(self) -> str:
        return self.log.read_text()

    def up(self) -> "Serve":
        eventually(lambda: self.process.poll() is not None or "Ctrl-C" in self.said(), "the start", START_S)
        assert self.process.poll() is None, self.said()
        return self

    def children(self) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def health(self) -> int:
        return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5).status_code


@pytest.fixture
def start_serve(tmp_path: Path) -> Iterator[StartServe]:
    started: list[Serve] = []

    def start(*arguments: str, config: str | None = None) -> Serve:
        started.append(Serve(tmp_path, *arguments, config=config))
        return started[-1]

    yield start
    for serve in started:
        serve.process.kill()
        serve.process.wait()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_sigterm_ends_everything(start_serve: StartServe) -> None:
    serve = start_serve("--dashboard", f"127.0.0.1:{free_port()}", "--workers", "2").up()
    children = serve.children()
    assert len(children) == 3
    serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(START_S) == 0, serve.said()
    assert all(gone(pid) for pid in children)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_a_killed_supervisor_leaves_nobody_behind(start_serve: StartServe) -> None:
    serve = start_serve("--dashboard", f"127.0.0.1:{free_port()}").up()
    children = serve.children()
    serve.process.kill()
    serve.process.wait()
    assert len(children) == 2
    eventually(lambda: all(gone(pid) for pid in children), "the children's end")


def test_a_worker_that_dies_is_started_again(start_serve: StartServe) -> None:
    serve = start_serve("--no-dashboard").up()
    (worker,) = serve.children()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: worker not in serve.children() and len(serve.children()) == 1, "the restart", START_S)
    assert "worker 1 ended with signal SIGKILL: starting it again" in serve.said()

    def healthy() -> bool:
        try:
            return serve.health() in (200, 503)
        except httpx.TransportError:
            return False

    eventually(healthy, "the new worker", START_S)


def test_a_hangup_makes_every_worker_read_the_config_again(start_serve: StartServe) -> None:
    """Also one that is started just then, which would end by it."""
    serve = start_serve("--no-dashboard", "--workers", "2")
    eventually(lambda: len(serve.children()) == 2, "both workers", START_S)
    serve.process.send_signal(signal.SIGHUP)
    serve.up()
    eventually(lambda: serve.said().count("server a is down") == 2, "both workers' first look at their server", START_S)
    serve.config.write_text(serve.config.read_text() + "default_model: tiny\n")
    for _ in range(3):
        serve.process.send_signal(signal.SIGHUP)
    eventually(lambda: serve.said().count("): default_model") == 2, "both reloads", START_S)
    assert "ended with" not in serve.said()


def test_a_port_in_use_is_said_in_one_line(start_serve: StartServe) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        serve = start_serve("--no-dashboard", "--listen", taken)
        assert serve.process.wait(START_S) == 2
    assert (
        serve.said() == f"scripts/serve: {taken}: the port is in use. Choose another with --listen or in the config\n"
    )


def test_a_wrong_config_is_said(start_serve: StartServe) -> None:
    serve = start_serve("--no-dashboard", config="servers: [{name: a, url: 'http://127.0.0.1:1'}]\nlisten: here\n")
    assert serve.process.wait(START_S) == 2
    assert serve.said().startswith(f"scripts/serve: {serve.config}: listen: ")


def test_a_worker_that_cannot_start_ends_it_with_its_own_words(start_serve: StartServe, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "usage.db").write_text("this is no database, and long enough to be seen as something else")
    serve = start_serve("--no-dashboard")
    assert serve.process.wait(START_S) == 2
    *own_words, last = serve.said().splitlines()
    assert last == "scripts/serve: worker 1 can't start: it ended with exit code 1"
    assert any("usage.db" in line or "database" in line for line in own_words), own_words
