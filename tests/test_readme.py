"""The README's tables and pictures say what the code says."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

import test_architecture
from gateway.limits import PERIODS, Limits
from gateway.records import Row
from gateway.settings import Config, Server
from gateway.sources.settings import Local

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def table(name: str) -> list[str]:
    """The first column of the table between the marks of that name, as its code words."""
    inside = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert inside
    cells = [line.split("|")[1] for line in inside[1].splitlines()[2:]]
    return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


def first_words(name: str) -> list[str]:
    """The first code word of each row."""
    inside = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert inside
    return re.findall(r"^\| `([^`]+)`", inside[1], re.MULTILINE)


def defaults(record: type[msgspec.Struct], path: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of the config below `path`, with its default; sections are walked through."""
    for field in msgspec.structs.fields(record):
        if field.name != "servers":
            default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            # Limits have a table of their own.
            if isinstance(default, msgspec.Struct) and not isinstance(default, Limits):
                yield from defaults(type(default), f"{path}{field.name}.")
            else:
                yield f"{path}{field.name}", default


DEFAULTS = dict(defaults(Config))


def test_every_key_of_the_config() -> None:
    below = [f"servers[].{name}" for name in Server.__struct_fields__]
    assert sorted(key for key in first_words("config")) == sorted([*DEFAULTS, "servers", *below])


def test_every_default_of_the_config() -> None:
    inside = README[README.index("<!-- config -->") : README.index("<!-- /config -->")]
    told = dict(re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \|", inside, re.MULTILINE))
    assert told == {name: str(DEFAULTS[name]) for name in told}
    untold = {name for name, value in DEFAULTS.items() if value not in (None, {}, "", (), Limits(), (Local(),))}
    assert set(told) == untold


def test_every_column_of_the_books() -> None:
    assert sorted(table("columns")) == sorted(Row.__struct_fields__)


def test_every_limit() -> None:
    section = README[README.index("### Limits and budgets") : README.index("**What a request holds.**")]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    named = {word for row in rows for word in re.findall(r"`([a-z]+)`", row)}
    assert set(Limits.__struct_fields__) | set(PERIODS) <= named


def test_every_code_of_a_refusal() -> None:
    section = README[README.index("## Errors") : README.index("## The books")]
    sources = "".join(path.read_text() for path in (ROOT / "addon" / "gateway").rglob("*.py"))
    raised = set(re.findall(r"Refusal\(\s*\d{3},\s*\"([a-z_]+)\"", sources))
    assert raised - {"not_found", "not_ready"} <= set(re.findall(r"`([a-z_]+)`", section))


def test_the_picture_of_imports() -> None:
    assert "\n".join(test_architecture.picture()) in README


def test_files_that_are_named_exist() -> None:
    named = re.findall(r"\]\(([^)#:]+)\)|`((?:addon|tests|scripts|deploy)/[\w./]+)`", README)
    missing = [name for pair in named for name in pair if name and not (ROOT / name).exists()]
    assert missing == []
