"""scripts/keys, as somebody at a terminal uses it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from proxy import ROOT


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("servers: [{name: a, url: 'http://127.0.0.1:1'}]\n")
    return path


def run(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "keys.py"), *arguments, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def limits(config: Path, name: str) -> tuple[float, str]:
    shown = json.loads(run(config, "show", name, "--json").stdout)
    return shown["weight"], shown["priority"]


def test_limits_are_given_changed_and_shown(config: Path) -> None:
    run(config, "create", "alice")
    run(config, "create", "batch", "--weight", "0.5", "--priority", "low")
    assert (limits(config, "alice"), limits(config, "batch")) == ((1, "normal"), (0.5, "low"))

    changed = run(config, "limits", "alice", "--weight", "3")
    assert (changed.returncode, limits(config, "alice")) == (0, (3, "normal"))
    run(config, "limits", "alice", "--priority", "high", "--json")
    assert limits(config, "alice") == (3, "high")

    rows = [line.split() for line in run(config, "list").stdout.splitlines()]
    assert [[row[1], *row[-3:]] for row in rows] == [
        ["NAME", "WEIGHT", "PRIORITY", "MODELS"],
        ["alice", "3", "high", "all"],
        ["batch", "0.5", "low", "all"],
    ]


WRONG: dict[str, tuple[list[str], str]] = {
    "create, weight 0": (["create", "bob", "--weight", "0"], "--weight: expected a number from 0.001"),
    "create, weight nan": (["create", "bob", "--weight", "nan"], "--weight: expected a number from 0.001"),
    "create, weight no number": (["create", "bob", "--weight", "much"], "--weight: invalid float value: 'much'"),
    "create, unknown priority": (["create", "bob", "--priority", "0"], "--priority: invalid choice: '0'"),
    "limits, weight beyond bounds": (["limits", "alice", "--weight", "1001"], "--weight: expected a number from 0.001"),
    "limits, unknown priority": (["limits", "alice", "--priority", "Low"], "--priority: invalid choice: 'Low'"),
    "limits, nothing given": (["limits", "alice"], "give --weight W, --priority high|normal|low, or both"),
    "limits, no such key": (["limits", "bob", "--weight", "2"], "there is no key named 'bob'"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_mistakes_are_named_and_change_nothing(arguments: list[str], message: str, config: Path) -> None:
    run(config, "create", "alice")
    before = run(config, "list", "--json").stdout
    done = run(config, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert run(config, "list", "--json").stdout == before
