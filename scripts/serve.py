"""scripts/serve: the proxy's workers and the dashboard, in the foreground, until a signal.

SIGTERM and SIGINT let the workers finish what runs (config: drain_s), a second one cuts it. Each worker reads a changed
config by itself; SIGHUP makes all of them read it at once. What belongs to this process (listen, dashboard, data,
drain_s) takes a restart.
"""

import argparse
import asyncio
import errno
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "addon"))

import demo  # noqa: E402
from gateway.config import ConfigError, load  # noqa: E402
from gateway.settings import Address  # noqa: E402
from stack import Plan, Stack, http  # noqa: E402
from supervisor import StartFailedError  # noqa: E402


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/serve", description="The proxy and its dashboard, in the foreground.")
    parser.add_argument("--config", type=Path, help="default: config.yaml, beside the folder scripts/")
    parser.add_argument("--listen", type=address, metavar="HOST:PORT", help="instead of the config's listen")
    dashboard = parser.add_mutually_exclusive_group()
    dashboard.add_argument("--dashboard", type=address, metavar="HOST:PORT", help="instead of the config's dashboard")
    dashboard.add_argument("--no-dashboard", action="store_true", help="only the proxy")
    parser.add_argument(
        "--workers", type=count, default=1, metavar="N", help="processes that share the port; default: 1"
    )
    parser.add_argument("--demo", action="store_true", help="with two small llama-servers, keys and traffic of its own")
    options = parser.parse_args(argv)
    if options.demo and options.config:
        parser.error("--demo writes a config of its own: leave --config out")
    return options


def address(text: str) -> Address:
    try:
        return Address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of processes, got {text!r}")
    return int(text)


def check_free(address: Address, option: str) -> None:
    """Raises StartFailedError with what to do. Workers that share a port would not notice that another has it, too."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, target in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(target)
    except OSError as error:
        why = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise StartFailedError(f"{address}: {why}. Choose another with {option} or in the config") from None


def run(options: argparse.Namespace, exits: ExitStack) -> bool:
    """True if it ended in order. Raises ConfigError, StartFailedError."""
    config_path: Path = options.config or ROOT / "config.yaml"
    if options.demo:
        config_path = exits.enter_context(demo.upstreams(ROOT / "data" / "demo"))
    config = load(config_path)
    listen = options.listen or config.listen
    plan = Plan(
        config_path=config_path.absolute(),
        config=config,
        listen=listen,
        dashboard=None if options.no_dashboard else options.dashboard or config.dashboard,
        workers=options.workers,
        traffic=demo.traffic(config_path, http(listen)) if options.demo else None,
    )
    check_free(plan.listen, "--listen")
    if plan.dashboard:
        check_free(plan.dashboard, "--dashboard")
    config.data.mkdir(parents=True, exist_ok=True)
    return asyncio.run(Stack(plan).run())


def main() -> int:
    options = arguments()
    try:
        with ExitStack() as exits:
            return 0 if run(options, exits) else 1
    except (ConfigError, StartFailedError) as error:
        print(f"scripts/serve: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
