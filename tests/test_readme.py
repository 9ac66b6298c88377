"""The README's tables and pictures say what the code says."""

import re
from pathlib import Path

import test_architecture
from gateway.config import Config, Server
from gateway.exchange import Row

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def table(name: str) -> list[str]:
    """The first column of the table between the marks of that name, as its code words."""
    inside = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert inside
    cells = [line.split("|")[1] for line in inside[1].splitlines()[2:]]
    return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


def test_every_key_of_the_config() -> None:
    top = [name for name in Config.__struct_fields__ if name != "servers"]
    below = [f"servers[].{name}" for name in Server.__struct_fields__]
    assert sorted(table("config")) == sorted([*top, "servers", *below])


def test_every_default_of_the_config() -> None:
    inside = README[README.index("<!-- config -->") : README.index("<!-- /config -->")]
    told = dict(re.findall(r"^\| `([a-z_]+)` \| `([^`]+)` \|", inside, re.MULTILINE))
    defaults = dict(zip(Config.__struct_fields__[1:], Config.__struct_defaults__, strict=True))
    assert told == {name: str(defaults[name]) for name in told}
    assert set(told) == {"listen", "dashboard", "data", "max_body_mb", "first_byte_timeout_s", "drain_s"}


def test_every_column_of_the_books() -> None:
    assert sorted(table("columns")) == sorted(Row.__struct_fields__)


def test_every_code_of_a_refusal() -> None:
    section = README[README.index("## Errors") : README.index("## The books")]
    sources = "".join(path.read_text() for path in (ROOT / "addon" / "gateway").glob("*.py"))
    raised = set(re.findall(r"Refusal\(\s*\d{3},\s*\"([a-z_]+)\"", sources))
    assert raised - {"not_found", "not_ready"} <= set(re.findall(r"`([a-z_]+)`", section))


def test_the_picture_of_imports() -> None:
    assert "\n".join(test_architecture.picture()) in README


def test_files_that_are_named_exist() -> None:
    named = re.findall(r"\]\(([^)#:]+)\)|`((?:addon|tests|scripts|deploy)/[\w./]+)`", README)
    missing = [name for pair in named for name in pair if name and not (ROOT / name).exists()]
    assert missing == []
