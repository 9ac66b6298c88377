"""The parts of a running llmproxy, and the order in which they come and go: workers, dashboard, the demo's traffic."""

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from gateway.settings import Address, Config
from supervisor import POLL_S, READY_WITHIN_S, Child, Command, StartFailedError, say, start_all, stop_in_order

ROOT = Path(__file__).resolve().parent.parent

# What the published dashboard may do and for how long. datasette-metadata.json says what it shows.
DATASETTE_ARGS: tuple[str, ...] = (
    *("--setting", "default_allow_sql", "on"),  # the charts ask through the SQL endpoint; connections are read-only
    *("--setting", "sql_time_limit_ms", "3000"),  # a query without end must not eat the proxy's CPU
    *("--setting", "facet_time_limit_ms", "1000"),
    *("--setting", "suggest_facets", "off"),  # 27 trial queries on each table page; the useful facets are named
    *("--setting", "max_returned_rows", "5000"),  # a year of days for each of the largest users fits a chart
    *("--setting", "default_page_size", "50"),
    *("--setting", "num_sql_threads", "3"),
    *("--setting", "allow_download", "off"),
    *("--setting", "default_cache_ttl", "0"),  # a reload shows what is true now
)

DASHBOARD_PATH = "/-/dashboards/usage"

# Beyond drain_s, for a worker to write its last rows and go.
DRAIN_MARGIN_S = 10.0


@dataclass(frozen=True)
class Plan:
    """Absolute paths. `dashboard` None: none. `traffic`: a command that uses the proxy once it is up."""

    config_path: Path
    config: Config
    listen: Address
    dashboard: Address | None
    workers: int = 1
    traffic: Command | None = None
    addon: Path = ROOT / "addon" / "llmproxy.py"


class Stack:
    """One run: start everything in order, wait for a signal, stop everything in order."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.workers = [Child(worker_command(plan, number)) for number in range(1, plan.workers + 1)]
        self.dashboard = [Child(dashboard_command(plan, plan.dashboard))] if plan.dashboard else []
        self.traffic = [Child(plan.traffic)] if plan.traffic else []
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._had_terminal = not terminal_is_gone()

    async def run(self) -> bool:
        """True if all ended by itself when asked to. Raises StartFailedError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        starting = asyncio.create_task(self._start())
        asked = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((starting, asked), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                starting.result()  # raises what kept it from starting
                await asked
        finally:
            starting.cancel()
            asked.cancel()
            by_itself = await self._stop_all()
        return by_itself

    async def _start(self) -> None:
        plan = self.plan
        await start_all(self.workers, reachable(plan.listen.host), plan.listen.port)
        say(f"llmproxy is up.\n  API         {http(plan.listen)}/v1")
        if plan.dashboard:
            await published(plan.config.data / "usage.db")
            await start_all(self.dashboard, reachable(plan.dashboard.host), plan.dashboard.port)
            say(f"  dashboard   {http(plan.dashboard)}{DASHBOARD_PATH}")
        say(hints(plan))
        await start_all(self.traffic)

    def _on_stop(self) -> None:
        if self._stop.is_set():
            self._kill.set()
        else:
            say(f"Stopping: what runs has {self.plan.config.drain_s:g} s to end; a second signal cuts it.")
            self._stop.set()

    def _on_hangup(self) -> None:
        if self._had_terminal and terminal_is_gone():
            self._on_stop()
        for worker in self.workers:
            worker.signal(signal.SIGHUP)

    async def _stop_all(self) -> bool:
        """The demo's traffic first, then the workers, and the dashboard last. The second signal skips the waiting."""
        groups = (self.traffic, self.workers, self.dashboard)
        stopping = asyncio.create_task(stop_in_order(groups))
        killing = asyncio.create_task(self._kill.wait())
        await asyncio.wait((stopping, killing), return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            for child in (child for group in groups for child in group):
                child.kill()
        killing.cancel()
        return await stopping and not self._kill.is_set()


async def published(database: Path) -> None:
    """A worker creates usage.db at its start; Datasette refuses to serve a file that is not there."""
    try:
        async with asyncio.timeout(READY_WITHIN_S):
            while not database.exists():
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise StartFailedError(f"{database} was not made within {READY_WITHIN_S:g} s") from None


def worker_command(plan: Plan, number: int) -> Command:
    reuse_port = ["--reuse-port"] if plan.workers > 1 else []
    argv = [
        *(sys.executable, str(ROOT / "scripts" / "launch.py"), *reuse_port),
        *("--mode", mode(plan.listen)),
        *("--set", f"confdir={plan.config.data / 'mitmproxy'}"),
        *("--set", "termlog_verbosity=warn", "--set", "flow_detail=0"),
        *("-s", str(plan.addon)),
        *("--set", f"llmproxy_config={plan.config_path}"),
    ]
    return Command(f"worker {number}", argv, stop_within_s=plan.config.drain_s + DRAIN_MARGIN_S)


def mode(listen: Address) -> str:
    """The way to nowhere: the addon gives each request that may pass its server. IPv6 stands there without brackets."""
    return f"reverse:http://no-route.invalid@{listen.host}:{listen.port}"


def dashboard_command(plan: Plan, address: Address) -> Command:
    argv = [
        *(sys.executable, "-m", "datasette", "serve", str(plan.config.data / "usage.db")),
        *("-m", str(ROOT / "datasette-metadata.json"), *DATASETTE_ARGS),
        *("-h", address.host, "-p", str(address.port)),
    ]
    return Command("dashboard", argv, needed=False, quiet=True)  # it would print a line for every page


def hints(plan: Plan) -> str:
    shipped = plan.config_path == ROOT / "config.yaml"
    path = plan.config_path.relative_to(ROOT) if plan.config_path.is_relative_to(ROOT) else plan.config_path
    keys = "scripts/keys create NAME" + ("" if shipped else f" --config {path}")
    debug = Address(f"127.0.0.1:{plan.listen.port + 2}")
    mitmweb = f".venv/bin/mitmweb --mode {mode(debug)} -s addon/llmproxy.py --set store_streamed_bodies=true"
    mitmweb += "" if shipped else f" --set llmproxy_config={path}"
    return (
        f"  a new key   {keys}\n"
        f"  debugging   {mitmweb}\n"
        f"              (proxies on {debug} as well, and shows each request)\n"
        "Ctrl-C ends it."
    )


def http(address: Address) -> str:
    """The URL under which this machine reaches it."""
    host = reachable(address.host)
    return f"http://[{host}]:{address.port}" if ":" in host else f"http://{host}:{address.port}"


def reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def terminal_is_gone() -> bool:
    """Tells a SIGHUP that comes from a closed terminal from one that asks for a reload."""
    try:
        os.tcgetpgrp(0)
    except OSError:
        return True
    return False
