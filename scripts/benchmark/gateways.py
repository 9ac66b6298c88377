"""The gateways that are compared, each started in front of the scripted upstream on a free port of 127.0.0.1."""

import json
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmark import shapes
from benchmark.processes import SCRIPTS, Processes
from gateway.config import load
from stack import Plan, worker_command
from supervisor import StartFailedError

DIRECT = "direct"
BARE = "bare"
ADDON = SCRIPTS.parent / "addon" / "llmproxy.py"

# The least that passes streams on as they come.
_FORWARDING_ADDON = """\
def responseheaders(flow):
    flow.response.stream = True
"""
_PROBE_TIMEOUT_S = 5.0
_KEYS_TIMEOUT_S = 60.0
# Each claim is counted, and nothing has to wait.
_SLOTS = 1000
_PLENTY = 1_000_000_000
_ALL_LIMITS = {
    **dict.fromkeys(("rpm", "rps", "burst", "tpm", "concurrency"), _PLENTY),
    "budgets": [{"per": "month", "tokens": _PLENTY}, {"per": "day", "money": _PLENTY / 1e6}],
}
_LIMITED = {
    "limits": {"key": _ALL_LIMITS, "models": {"*": _ALL_LIMITS}, "all": _ALL_LIMITS},
    "prices": {"models": {"*": {"prompt": 0.2, "cached": 0.02, "completion": 0.6, "gpu_second": 0.0004}}},
}


@dataclass(frozen=True)
class Gateway:
    """One column of the table."""

    name: str
    port: int
    host: str = "127.0.0.1"
    path: str = ""  # before /v1/…
    key: str = ""
    pid: int | None = None  # whose CPU and memory count, with its children's
    exact: bool = True  # passes the upstream's bytes on unchanged
    process: subprocess.Popen[str] | None = None

    @property
    def is_direct(self) -> bool:
        return self.name == DIRECT

    @property
    def answers(self) -> bool:
        return self.problem() == ""

    def problem(self) -> str:
        """Sends one small request; what is wrong with the answer, or nothing."""
        request = urllib.request.Request(
            f"http://{self.host}:{self.port}{self.path}{shapes.PATH}",
            data=shapes.request_body(8, stream=False),
            headers={"Authorization": f"Bearer {self.key or 'sk-none'}", "Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_PROBE_TIMEOUT_S) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.read()[:500]!r}"
        except OSError as error:
            return str(error)
        wrong = self.exact and shapes.fingerprint(body) != shapes.completion_fingerprint(8)
        return f"other bytes than the upstream's: {body[:200]!r}" if wrong else ""


@dataclass(frozen=True)
class Place:
    """Where a gateway is started."""

    processes: Processes
    upstream_port: int


def bare(place: Place) -> Gateway:
    folder = _folder(place, "bare")
    addon = folder / "forward.py"
    addon.write_text(_FORWARDING_ADDON)
    port = free_port()
    argv = [*_mitmdump(), "-s", str(addon), "--set", f"confdir={folder}"]
    argv += ["--mode", f"reverse:http://127.0.0.1:{place.upstream_port}@127.0.0.1:{port}"]
    return _start(place, Gateway(BARE, port), argv)


def ours(place: Place) -> Gateway:
    """As scripts/serve runs a worker."""
    gateway, config_path = _ours(place, "ours")
    return _start(place, gateway, _worker(config_path))


def ours_plain(place: Place) -> Gateway:
    gateway, config_path = _ours(place, "ours, plain mitmdump")
    argv = [*_mitmdump(), "-s", str(ADDON), "--set", f"llmproxy_config={config_path}"]
    return _start(place, gateway, [*argv, "--set", f"confdir={config_path.parent}"])


def ours_limited(place: Place) -> Gateway:
    """Every kind of limit on each request, all of them too high to be reached."""
    gateway, config_path = _ours(place, "ours, limited", _LIMITED)
    return _start(place, gateway, _worker(config_path))


STARTERS: dict[str, Callable[[Place], Gateway]] = {
    "bare": bare,
    "ours": ours,
    "limited": ours_limited,
    "plain": ours_plain,
}


def by_url(text: str, pids: dict[str, int]) -> Gateway:
    """NAME=URL[,KEY]. Raises ValueError."""
    name, _, rest = text.partition("=")
    url, _, key = rest.partition(",")
    parts = urlsplit(url)
    if not name or parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{text!r}: expected NAME=http://HOST[:PORT][/PATH][,KEY]")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Gateway(name, parts.port or 80, parts.hostname, path, key, pids.get(name), exact=False)


def start_upstream(place: Place, *, keep_streams: bool) -> Gateway:
    process = place.processes.start_part(
        "fast_upstream", str(place.upstream_port), *(["--keep-streams"] if keep_streams else [])
    )
    gateway = Gateway(DIRECT, place.upstream_port, pid=process.pid, process=process)
    place.processes.wait_until(process, "fast_upstream", lambda: gateway.answers)
    return gateway


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _start(place: Place, gateway: Gateway, argv: list[str]) -> Gateway:
    name = gateway.name
    process = place.processes.start(name, argv)
    try:
        place.processes.wait_until(process, name, lambda: gateway.answers)
    except StartFailedError as error:
        raise StartFailedError(f"{error}\nlast answer: {gateway.problem()}") from error
    return Gateway(name, gateway.port, key=gateway.key, pid=process.pid, process=process)


def start_proxy(
    place: Place, name: str, servers: Sequence[Mapping[str, Any]], more: Mapping[str, Any], keys: Sequence[str]
) -> dict[str, Gateway]:
    """A worker of ours in front of any servers, seen through each of these keys: name of the key -> gateway.

    `more` are further keys of its config. It is ready once it knows all servers.
    """
    config_path = _config(place, name, servers, more)
    port = load(config_path).listen.port
    gateways = {key: Gateway(name, port, key=_new_key(config_path, key)) for key in keys}
    process = place.processes.start(name, _worker(config_path))
    place.processes.wait_until(process, name, lambda: _knows_servers(port))
    return gateways


def _ours(place: Place, name: str, more: Mapping[str, Any] | None = None) -> tuple[Gateway, Path]:
    """Config with a ledger of its own, and a key. The upstream passes for two servers, so that there is a choice."""
    url = f"http://127.0.0.1:{place.upstream_port}"
    servers = [{"name": name, "url": url, "slots": _SLOTS} for name in ("fast-1", "fast-2")]
    config_path = _config(place, name.partition(",")[0], servers, more or {})
    return Gateway(name, load(config_path).listen.port, key=_new_key(config_path, "bench")), config_path


def _config(place: Place, name: str, servers: Sequence[Mapping[str, Any]], more: Mapping[str, Any]) -> Path:
    path = _folder(place, name) / "config.yaml"
    own = {"listen": f"127.0.0.1:{free_port()}", "data": "data", "servers": list(servers)}
    path.write_text(json.dumps({**own, **more}))
    return path


def _worker(config_path: Path) -> list[str]:
    """As scripts/serve runs it."""
    config = load(config_path)
    return list(worker_command(Plan(config_path, config, config.listen, dashboard=None), 1).argv)


def _new_key(config_path: Path, name: str) -> str:
    made = subprocess.run(
        [sys.executable, str(SCRIPTS / "keys.py"), "create", name, "--config", str(config_path), "--json"],
        check=False,
        capture_output=True,
        text=True,
        timeout=_KEYS_TIMEOUT_S,
    )
    if made.returncode:
        raise StartFailedError(f"{name}: no key could be made:\n{made.stderr}")
    return str(json.loads(made.stdout)["key"])


def _knows_servers(port: int) -> bool:
    """Whether /health is good and, where it tells of servers, all of them are up."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=_PROBE_TIMEOUT_S) as answer:
            servers = json.load(answer).get("servers", {"up": 0, "total": 0})
    except (OSError, ValueError):
        return False
    return bool(servers["up"] == servers["total"])


def _folder(place: Place, name: str) -> Path:
    """A new one at each start: a gateway begins with an empty ledger."""
    number = len(list(place.processes.folder.iterdir()))
    folder = place.processes.folder / f"{number}-{name}"
    folder.mkdir()
    return folder


def _mitmdump() -> list[str]:
    beside = shutil.which("mitmdump", path=str(Path(sys.executable).parent)) or shutil.which("mitmdump")
    if beside is None:
        raise StartFailedError("mitmdump is not installed")
    return [beside, "-q"]
