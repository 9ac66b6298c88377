"""The gateway's shape: imports point one way, few modules know mitmproxy or SQLite, and every file reads in minutes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ADDON = Path(__file__).parents[1] / "addon"
PACKAGE = ADDON / "gateway"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}
MAX_LINES = 400

MAY_IMPORT = {
    "mitmproxy": {
        "connections",
        "dispatch",
        "held",
        "hooks",
        "http1",
        "layers",
        "lifecycle",
        "startup",
        "stream",
        "upstream",
        "upstream_tls",
    },
    "sqlite3": {
        "accounts",
        "admin.desk",
        "books",
        "database",
        "keyreader",
        "sources.sql_connections",
    },
    "sqlite_utils": {"audit", "database", "keyreader", "keys_schema", "schema", "teams"},
    "yaml": {"yaml_text"},
    "httpcore": {"sources.deadline", "sources.webhook"},
    "httpx": {"asking", "sources.webhook"},
    "lupa": {"sources.lua_sandbox"},
    "psycopg": {"sources.sql_connections"},
    "pymongo": {"sources.mongodb"},
    "pymysql": {"sources.sql_connections"},
    "redis": {"shared_accounts", "sources.redis_keys"},
}


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports() -> dict[str, set[str]]:
    """Who imports whom within the gateway."""
    found = {}
    for name, path in MODULES.items():
        others = {target.removeprefix("gateway.") for target in imported(path) if target.startswith("gateway.")}
        found[name] = {module for module in MODULES for other in others if f"{other}.".startswith(f"{module}.")}
    return found


def picture() -> list[str]:
    """The same as "module: module, …", sorted, with each package as one: what a document can be checked against."""
    rooms: dict[str, set[str]] = {}
    for name, others in imports().items():
        room = name.partition(".")[0]
        rooms.setdefault(room, set()).update({other.partition(".")[0] for other in others} - {room})
    return [f"{room}: {', '.join(sorted(others))}".rstrip(": ") for room, others in sorted(rooms.items())]


def test_imports_point_one_way() -> None:
    left = imports()
    while left:
        leaves = {name for name, others in left.items() if not others & set(left)}
        assert leaves, f"these import each other in a circle: {left}"
        left = {name: others for name, others in left.items() if name not in leaves}


def test_nothing_imports_the_addon() -> None:
    assert [name for name, others in imports().items() if "hooks" in others] == []
    assert set(imported(ADDON / "llmproxy.py")) == {"gateway.hooks.Gateway"}


def test_every_module_is_in_use() -> None:
    used = {other for others in imports().values() for other in others}
    assert set(MODULES) - used == {"hooks"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_who_knows_what(package: str) -> None:
    users = {
        name for name, path in MODULES.items() if any(target.split(".")[0] == package for target in imported(path))
    }
    assert users <= MAY_IMPORT[package]
    assert users, f"nobody imports {package}: take it out of the table"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_reads_in_minutes_and_opens_with_its_rule(name: str) -> None:
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text))
