"""scripts/keys: make, list and change the keys of users. A change acts on the running proxy at its next request."""

import argparse
import json
import sqlite3
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "addon"))

from gateway import config  # noqa: E402
from gateway.keystore import PRIORITIES, Key, KeyProblem, KeyStore, iso, parse_expiry  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, default=ROOT / "config.yaml", help="config file (default: config.yaml)")
    common.add_argument("--json", action="store_true", help="one line of JSON per key")
    parser = argparse.ArgumentParser(prog="scripts/keys", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    create = commands.add_parser("create", parents=[common], help="make a key and print it, once")
    create.add_argument("name", help="whose key it is: a person or an agent")
    create.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="PATTERN",
        help="a model this key may use: a name, a wildcard (gpt-*) or a regular expression (/gpt-[34]/); "
        "can be repeated; without it the key may use all",
    )
    create.add_argument("--expires", metavar="WHEN", help="2027-01-31 (through that day, UTC) or 90d, 12h, 30m")
    _add_limits(create, weight=1, priority="normal")
    limits = commands.add_parser("limits", parents=[common], help="change a key's weight, its priority or both")
    limits.add_argument("name")
    _add_limits(limits, weight=None, priority=None)
    commands.add_parser("list", parents=[common], help="all keys")
    for name, text in (
        ("show", "one key"),
        ("rotate", "a new key for the same name; the old one ends at once"),
        ("disable", "refuse a key until it is enabled again"),
        ("enable", "let a disabled key in again"),
        ("revoke", "delete a key for good; its rows stay"),
    ):
        commands.add_parser(name, parents=[common], help=text).add_argument("name")
    return parser


def _add_limits(command: argparse.ArgumentParser, weight: float | None, priority: str | None) -> None:
    """The options, with their defaults."""
    command.add_argument(
        "--weight",
        type=float,
        default=weight,
        metavar="W",
        help="when keys wait for a server: this one's share relative to the others' (1 is the usual one)",
    )
    command.add_argument(
        "--priority",
        choices=tuple(PRIORITIES),
        default=priority,
        help="when keys wait for a server: all of a higher class go first",
    )


def main() -> int:
    arguments = _parser().parse_args()
    try:
        store = KeyStore(config.load(arguments.config).data / "keys.db")
        try:
            _run(store, arguments)
        finally:
            store.close()
    except (config.ConfigError, KeyProblem, ValueError) as error:
        print(f"scripts/keys: {error}", file=sys.stderr)
        return 1
    except (OSError, sqlite3.Error) as error:
        print(f"scripts/keys: keys.db can't be used: {error}", file=sys.stderr)
        return 1
    return 0


def _run(store: KeyStore, arguments: argparse.Namespace) -> None:
    if arguments.command == "create":
        now = datetime.now(UTC)
        expires_at = parse_expiry(arguments.expires, now) if arguments.expires else None
        if expires_at is not None and expires_at <= iso(now):
            print(f"--expires: {arguments.expires} is over: this key is expired from the start", file=sys.stderr)
        new = store.create(
            arguments.name,
            models=tuple(arguments.model),
            expires_at=expires_at,
            weight=arguments.weight,
            priority=arguments.priority,
        )
        _print_new(*new, arguments.json)
    elif arguments.command == "limits":
        key = store.set_limits(arguments.name, weight=arguments.weight, priority=arguments.priority)
        _print_keys([key], arguments.json)
    elif arguments.command == "list":
        _print_keys(store.list(), arguments.json)
    elif arguments.command == "rotate":
        _print_new(*store.rotate(arguments.name), arguments.json)
    elif arguments.command == "show":
        _print_keys([store.get(arguments.name)], arguments.json)
    elif arguments.command == "revoke":
        key = store.revoke(arguments.name)
        shown = json.dumps({"id": key.id, "name": key.name, "state": "revoked"})
        print(shown if arguments.json else f"revoked {key.name}")
    else:
        _print_keys([store.set_disabled(arguments.name, arguments.command == "disable")], arguments.json)


def _print_new(key: Key, secret: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"id": key.id, "name": key.name, "key": secret}))
    else:
        print(secret)
        print(f"This is the key of {key.name}. It is shown this once: only its hash is kept.", file=sys.stderr)


def _print_keys(keys: list[Key], as_json: bool) -> None:
    now = iso(datetime.now(UTC))
    if as_json:
        for key in keys:
            shown = {"id": key.id, "name": key.name, "hint": key.hint, "state": key.state(now), "models": key.models}
            limits = {"weight": key.weight, "priority": key.priority}
            print(json.dumps({**shown, **limits, "created_at": key.created_at, "expires_at": key.expires_at}))
        return
    rows = [("ID", "NAME", "KEY", "STATE", "EXPIRES", "WEIGHT", "PRIORITY", "MODELS")]
    for key in keys:
        models = ", ".join(key.models) or "all"
        known = (str(key.id), key.name, key.hint, key.state(now), key.expires_at or "never")
        rows.append((*known, f"{key.weight:g}", key.priority, models))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
