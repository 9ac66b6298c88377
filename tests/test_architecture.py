"""The gateway's shape: imports point one way, few modules know mitmproxy or SQLite, and every file reads in minutes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ADDON = Path(__file__).parents[1] / "addon"
MODULES = {path.stem: path for path in sorted((ADDON / "gateway").glob("*.py")) if path.stem != "__init__"}
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
    "sqlite3": {"database", "keystore", "ledger"},
    "sqlite_utils": {"database", "keystore", "ledger", "schema"},
    "yaml": {"yaml_text"},
    "httpx": {"asking"},
}


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def picture() -> list[str]:
    """Who imports whom within the gateway, as "module: module, …", sorted: what a document can be checked against."""
    lines = []
    for name, path in MODULES.items():
        others = {parts[1] for target in imported(path) if (parts := target.split("."))[0] == "gateway"}
        lines.append(f"{name}: {', '.join(sorted(others & set(MODULES)))}".rstrip(": "))
    return lines


def imports() -> dict[str, set[str]]:
    split = (line.partition(": ") for line in picture())
    return {name: set(others.split(", ")) if others else set() for name, _, others in split}


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
