"""scripts/keys: make, list and change the keys of users, and teams. A change acts on the running proxy at its next
request.
"""

import argparse
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "addon"))

from gateway import config  # noqa: E402
from gateway.keys import KeyProblem  # noqa: E402
from gateway.keystore import KeyStore  # noqa: E402
from key_commands import Commands, Unsaid, say  # noqa: E402
from key_options import add_key_options, add_limits, explained  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, default=ROOT / "config.yaml", help="config file (default: config.yaml)")
    common.add_argument("--json", action="store_true", help="one line of JSON per key")
    parser = argparse.ArgumentParser(prog="scripts/keys", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    create = commands.add_parser("create", parents=[common], help="make a key and print it, once")
    create.add_argument("name", help="whose key it is: a person or an agent")
    add_key_options(create)
    limits = commands.add_parser("limits", parents=[common], help="change what a key may use: what is given, no more")
    limits.add_argument("name")
    add_key_options(limits)
    commands.add_parser("list", parents=[common], help="all keys")
    rotate = commands.add_parser("rotate", parents=[common], help="a new key for the same name; the old one ends")
    rotate.add_argument("name")
    rotate.add_argument(
        "--overlap", metavar="SPAN", help="how long the old key goes on working: 24h, 7d (default: not)"
    )
    for name, text in (
        ("show", "one key"),
        ("disable", "refuse a key until it is enabled again"),
        ("enable", "let a disabled key in again"),
        ("revoke", "delete a key for good; its rows stay"),
    ):
        commands.add_parser(name, parents=[common], help=text).add_argument("name")
    _add_teams(commands.add_parser("team", help="teams: limits that several keys share"), common)
    audit = commands.add_parser("audit", parents=[common], help="who changed what, the newest first")
    audit.add_argument("--limit", type=int, default=50, metavar="N", help="how many changes (default: 50)")
    return parser


def _add_teams(team: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    commands = team.add_subparsers(required=True, metavar="COMMAND")
    every = commands.add_parser("list", parents=[common], help="all teams, also those of config.yaml")
    every.set_defaults(command="team list")
    for name, text in (
        ("create", "make a team; keys join it by their --team"),
        ("limits", "change its limits: what is given, no more"),
        ("show", "one team"),
        ("delete", "delete a team that no key names"),
    ):
        command = commands.add_parser(name, parents=[common], help=text)
        command.set_defaults(command=f"team {name}")
        command.add_argument("name")
        if name in ("create", "limits"):
            add_limits(command)


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    try:
        settings = config.load(arguments.config)
        store = KeyStore(settings.data / "keys.db")
        try:
            said = Commands(store, settings, arguments).run()
        finally:
            store.close()
    except KeyProblem as problem:
        print(f"scripts/keys: {explained(problem)}", file=sys.stderr)
        return 1
    except (config.ConfigError, ValueError) as error:
        print(f"scripts/keys: {error}", file=sys.stderr)
        return 1
    except (OSError, sqlite3.Error, msgspec.MsgspecError) as error:
        print(f"scripts/keys: keys.db can't be used: {error}", file=sys.stderr)
        return 1
    except Unsaid as problem:
        print(f"scripts/keys: {problem}; nothing was changed", file=sys.stderr)
        return 1
    try:
        if said:
            say(said)
    except Unsaid as problem:
        print(f"scripts/keys: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
