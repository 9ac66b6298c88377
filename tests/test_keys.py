"""scripts/keys, as somebody at a terminal uses it."""

import io
import json
import os
import pwd
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import keys
from conftest import StartProxy
from pairs import SCRIPTED
from proxy import ROOT
from upstream import Upstream, reply

ACTOR = f"scripts/keys ({pwd.getpwuid(os.getuid()).pw_name})"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("servers: [{name: a, url: 'http://127.0.0.1:1'}]\nteams: {research: {tpm: 100000}}\n")
    return path


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(config: Path, *arguments: str) -> Done:
    """The command in this process, which saves its start."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = keys.main([*arguments, "--config", str(config)])
        except SystemExit as ended:  # what argparse does
            assert isinstance(ended.code, int)
            status = ended.code
    return Done(status, out.getvalue(), err.getvalue())


def test_the_command_itself(config: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "keys.py"), "create", "alice", "--config", str(config)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (made.returncode, made.stdout[:3], len(made.stdout.splitlines())) == (0, "sk-", 1)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (1, "")
    assert "there is a key named 'alice' already" in again.stderr


UNSEEN: dict[str, tuple[str, str]] = {
    "a full disk": ("> /dev/full", "its output can't be written"),
    "closed": (">&-", "its output is closed"),
    "a pipe that nobody reads": ("| true; exit ${PIPESTATUS[0]}", "its output can't be written"),
}


@pytest.mark.parametrize(("where", "said"), UNSEEN.values(), ids=UNSEEN)
def test_a_key_that_nobody_sees_is_not_made(config: Path, where: str, said: str) -> None:
    told(config, "create", "alice")
    before = run(config, "list", "--json").stdout, run(config, "audit", "--json").stdout
    for words in ("create bob", "rotate alice", "rotate alice --json"):
        command = f"{sys.executable} {ROOT}/scripts/keys.py {words} --config {config} {where}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert said in done.stderr
        assert "nothing was changed" in done.stderr
    assert (run(config, "list", "--json").stdout, run(config, "audit", "--json").stdout) == before


def test_a_list_that_nobody_sees(config: Path) -> None:
    command = f"{sys.executable} {ROOT}/scripts/keys.py list --config {config} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def told(config: Path, *arguments: str) -> Any:
    """What it says with --json: a value for each line."""
    done = run(config, *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    values = [json.loads(line) for line in done.stdout.splitlines()]
    return values[0] if len(values) == 1 else values


def cells(config: Path, *arguments: str) -> list[list[str]]:
    """The table that it prints; its columns are two spaces apart."""
    lines = run(config, *arguments).stdout.splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_create_prints_the_key_once(config: Path) -> None:
    made = told(config, "create", "alice")
    assert list(made) == ["id", "name", "key"]
    assert (made["id"], made["name"], made["key"][:3]) == (1, "alice", "sk-")
    plain = run(config, "create", "bob")
    assert plain.stdout.startswith("sk-")
    assert len(plain.stdout.splitlines()) == 1
    assert made["key"] not in run(config, "list").stdout + run(config, "audit", "--json").stdout


FULL = {
    "--model": "qwen*", "--rpm": "60", "--tpm": "100000", "--concurrency": "4", "--rps": "2.5", "--burst": "5",
    "--budget": "month:tokens:5000000", "--team": "research", "--endpoint": "/v1/embeddings",
    "--network": "10.0.0.0/8", "--not-before": "2026-12-01", "--expires": "2099-01-31", "--weight": "0.5",
    "--priority": "low",
}  # fmt: skip
SHOWN: dict[str, Any] = {
    "id": 1,
    "name": "alice",
    "models": ["qwen*"],
    "weight": 0.5,
    "priority": "low",
    "expires_at": "2099-02-01T00:00:00.000Z",
    "not_before": "2026-12-01T00:00:00.000Z",
    "team": "research",
    "limits": {
        "rpm": 60,
        "rps": 2.5,
        "burst": 5,
        "tpm": 100_000,
        "concurrency": 4,
        "budgets": [{"per": "month", "tokens": 5_000_000, "money": None}],
    },
    "endpoints": ["/v1/embeddings"],
    "networks": ["10.0.0.0/8"],
    "old_until": None,
}


def shown(config: Path, name: str = "alice") -> dict[str, Any]:
    """What is shown of a key and does not differ from run to run."""
    found = told(config, "show", name)
    assert {*found} == {*SHOWN, "hint", "state", "created_at"}
    return {field: found[field] for field in SHOWN}


def test_all_options_are_kept_and_shown(config: Path) -> None:
    told(config, "create", "alice", *(word for pair in FULL.items() for word in pair))
    assert shown(config) == SHOWN


LIMITS = SHOWN["limits"]
OTHER_BUDGET = {"per": "day", "tokens": None, "money": 2.5}
CHANGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "rpm": (["--rpm", "5"], {"limits": {**LIMITS, "rpm": 5}}),
    "nothing allowed": (["--tpm", "0"], {"limits": {**LIMITS, "tpm": 0}}),
    "no rpm": (["--rpm", "none"], {"limits": {name: LIMITS[name] for name in LIMITS if name != "rpm"}}),
    "no rps, and no burst": (
        ["--rps", "none"],
        {"limits": {name: LIMITS[name] for name in LIMITS if name not in ("rps", "burst")}},
    ),
    "another budget": (
        ["--budget", "day:money:2.50"],
        {"limits": {**LIMITS, "budgets": [*LIMITS["budgets"], OTHER_BUDGET]}},
    ),
    "the same budget": (
        ["--budget", "month:tokens:7"],
        {"limits": {**LIMITS, "budgets": [{"per": "month", "tokens": 7, "money": None}]}},
    ),
    "one for another": (
        ["--budget", "month:tokens:none", "--budget", "day:money:2.50"],
        {"limits": {**LIMITS, "budgets": [OTHER_BUDGET]}},
    ),
    "no budget": (["--budget", "none"], {"limits": {name: LIMITS[name] for name in LIMITS if name != "budgets"}}),
    "models": (["--model", "a", "--model", "b*"], {"models": ["a", "b*"]}),
    "any model": (["--model", "any"], {"models": []}),
    "any endpoint and network": (["--endpoint", "any", "--network", "any"], {"endpoints": [], "networks": []}),
    "no times": (["--expires", "none", "--not-before", "none"], {"expires_at": None, "not_before": None}),
    "no team": (["--team", "none"], {"team": None}),
    "weight": (["--weight", "3"], {"weight": 3}),
    "priority": (["--priority", "high"], {"priority": "high"}),
}


@pytest.mark.parametrize(("options", "changed"), CHANGES.values(), ids=CHANGES)
def test_limits_change_what_is_given(options: list[str], changed: dict[str, Any], config: Path) -> None:
    told(config, "create", "alice", *(word for pair in FULL.items() for word in pair))
    assert told(config, "limits", "alice", *options) == told(config, "show", "alice")
    assert shown(config) == {**SHOWN, **changed}


def test_the_table_has_columns_for_what_there_is(config: Path) -> None:
    run(config, "create", "alice")
    assert [row[:2] + row[3:] for row in cells(config, "list")] == [
        ["ID", "NAME", "STATE", "EXPIRES", "WEIGHT", "PRIORITY", "MODELS"],
        ["1", "alice", "active", "never", "1", "normal", "all"],
    ]
    run(config, "create", "batch", "--weight", "0.5", "--priority", "low", "--rpm", "60", "--team", "research")
    run(config, "limits", "batch", "--budget", "month:tokens:5000000", "--budget", "day:money:2.5", "--tpm", "1500")
    limits = "60 rpm, 1500 tpm, 5M tokens/month, 2.50 EUR/day"
    assert [row[:2] + row[3:] for row in cells(config, "list")] == [
        ["ID", "NAME", "STATE", "EXPIRES", "TEAM", "LIMITS", "WEIGHT", "PRIORITY", "MODELS"],
        ["1", "alice", "active", "never", "-", "-", "1", "normal", "all"],
        ["2", "batch", "active", "never", "research", limits, "0.5", "low", "all"],
    ]


def test_show_tells_all_of_one_key(config: Path) -> None:
    run(config, "create", "alice", *(word for pair in FULL.items() for word in pair))
    run(config, "rotate", "alice", "--overlap", "24h")
    facts = dict(line.split(maxsplit=1) for line in run(config, "show", "alice").stdout.splitlines())
    assert {name: facts[name] for name in ("team", "limits", "endpoints", "networks", "expires")} == {
        "team": "research",
        "limits": "60 rpm, 2.5 rps (burst 5), 100k tpm, 4 at once, 5M tokens/month",
        "endpoints": "/v1/embeddings",
        "networks": "10.0.0.0/8",
        "expires": "2099-02-01 00:00Z",
    }
    assert facts["old"].startswith("key     works until 20")


def test_teams(config: Path) -> None:
    made = told(config, "team", "create", "lab", "--rpm", "100", "--budget", "day:money:2.5")
    limits = {"rpm": 100, "budgets": [OTHER_BUDGET]}
    lab = {"name": "lab", "limits": limits, "keys": 0, "declared": False, "created_at": made["created_at"]}
    assert made == lab
    told(config, "create", "alice", "--team", "lab")
    told(config, "create", "bob", "--team", "research")
    research = {"name": "research", "limits": {"tpm": 100_000}, "keys": 1, "declared": True, "created_at": None}
    assert told(config, "team", "list") == [research, {**lab, "keys": 1}]
    assert cells(config, "team", "list") == [
        ["TEAM", "KEYS", "DECLARED IN", "LIMITS"],
        ["research", "1", "config.yaml", "100k tpm"],
        ["lab", "1", "keys.db", "100 rpm, 2.50 EUR/day"],
    ]
    changed = told(config, "team", "limits", "lab", "--rpm", "none", "--tpm", "7")
    assert changed == told(config, "team", "show", "lab")
    assert changed == {**lab, "keys": 1, "limits": {"tpm": 7, "budgets": [OTHER_BUDGET]}}
    assert "the team 'lab' has keys: alice;" in run(config, "team", "delete", "lab").stderr
    told(config, "revoke", "alice")
    assert told(config, "team", "delete", "lab") == {"name": "lab", "state": "deleted"}
    assert told(config, "team", "list") == research


def test_a_team_that_is_not_there_yet_is_told(config: Path) -> None:
    made = run(config, "create", "alice", "--team", "lab", "--json")
    assert (made.returncode, json.loads(made.stdout)["name"]) == (0, "alice")
    assert "there is no team named 'lab' yet" in made.stderr
    run(config, "team", "create", "lab")
    assert run(config, "limits", "alice", "--team", "lab").stderr == ""


def test_an_expiry_that_is_over_is_told(config: Path) -> None:
    made = run(config, "create", "alice", "--expires", "2020-01-01")
    assert made.returncode == 0
    assert "--expires: 2020-01-01 is over" in made.stderr


def test_audit(config: Path) -> None:
    run(config, "create", "alice", "--rpm", "5")
    run(config, "limits", "alice", "--rpm", "7", "--model", "m")
    run(config, "team", "create", "lab")
    run(config, "disable", "alice")
    run(config, "revoke", "alice")
    said = told(config, "audit")
    assert [(entry["actor"], entry["action"], entry["kind"], entry["name"]) for entry in said] == [
        (ACTOR, "revoke", "key", "alice"),
        (ACTOR, "disable", "key", "alice"),
        (ACTOR, "create", "team", "lab"),
        (ACTOR, "change", "key", "alice"),
        (ACTOR, "create", "key", "alice"),
    ]
    assert said[3]["detail"] == {
        "limits": {"old": {"rpm": 5}, "new": {"rpm": 7}},
        "models": {"old": [], "new": ["m"]},
    }
    assert [row[1:] for row in cells(config, "audit", "--limit", "4")] == [
        ["WHO", "WHAT", "CHANGES"],
        [ACTOR, "revoke key alice", *cells(config, "audit", "--limit", "1")[1][3:]],
        [ACTOR, "disable key alice", "disabled false → true"],
        [ACTOR, "create team lab", "-"],
        [ACTOR, "change key alice", "models all → m; limits 5 rpm → 7 rpm"],
    ]


WRONG: dict[str, tuple[list[str], str]] = {
    "create, weight 0": (["create", "bob", "--weight", "0"], "--weight: expected a number from 0.001"),
    "create, weight nan": (["create", "bob", "--weight", "nan"], "--weight: expected a number from 0.001"),
    "create, weight no number": (["create", "bob", "--weight", "much"], "--weight: invalid float value: 'much'"),
    "create, unknown priority": (["create", "bob", "--priority", "0"], "--priority: invalid choice: '0'"),
    "create, taken": (["create", "alice"], "there is a key named 'alice' already"),
    "create, no name": (["create", ""], "'' is no name"),
    "create, expires": (["create", "bob", "--expires", "soon"], "--expires: expected a date (2027-01-31)"),
    "create, a space before it": (["create", " bob"], "' bob' begins or ends with a space"),
    "create, expires in a week": (["create", "bob", "--expires", "2027-W05"], "--expires: expected a date"),
    "create, starts on a day of a week": (
        ["create", "bob", "--not-before", "2027W051"],
        "--not-before: expected a date",
    ),
    "create, a team with a space": (["create", "bob", "--team", "lab "], "--team: 'lab ' begins or ends with a space"),
    "create, model": (["create", "bob", "--model", "/(/"], "--model: '/(/' is no regular expression"),
    "create, any among models": (["create", "bob", "--model", "any", "--model", "m"], "--model: any stands alone"),
    "create, endpoint": (["create", "bob", "--endpoint", "v1"], "--endpoint: expected a path"),
    "create, network": (["create", "bob", "--network", "10.0.0.1/8"], "--network: expected a network"),
    "create, never valid": (
        ["create", "bob", "--not-before", "2030-01-02", "--expires", "2030-01-01"],
        "--expires: expected a time after not_before",
    ),
    "create, rpm below 0": (["create", "bob", "--rpm", "-1"], "--rpm: expected a whole number, 0 (nothing) or more"),
    "create, rpm in parts": (["create", "bob", "--rpm", "1.5"], "--rpm: expected a whole number or none, got '1.5'"),
    "create, burst alone": (["create", "bob", "--burst", "2"], "--burst: expected an rps beside it"),
    "create, budget, a unit": (["create", "bob", "--budget", "day:words:1"], "expected PER:UNIT:AMOUNT such as month:"),
    "create, budget, an amount": (["create", "bob", "--budget", "day:tokens:1.5"], "expected PER:UNIT:AMOUNT such as"),
    "create, budget, a period": (
        ["create", "bob", "--budget", "year:tokens:1"],
        "--budget: expected one of day, week,",
    ),
    "limits, weight beyond bounds": (["limits", "alice", "--weight", "1001"], "--weight: expected a number from 0.001"),
    "limits, unknown priority": (["limits", "alice", "--priority", "Low"], "--priority: invalid choice: 'Low'"),
    "limits, nothing given": (["limits", "alice"], "nothing to change: give --rpm N or another of the options"),
    "limits, no such key": (["limits", "bob", "--weight", "2"], "there is no key named 'bob'"),
    "limits, one of two is wrong": (
        ["limits", "alice", "--rpm", "2", "--network", "x"],
        "--network: expected a network",
    ),
    "rotate, overlap": (["rotate", "alice", "--overlap", "3"], "--overlap: expected a span such as"),
    "rotate, overlap too long": (["rotate", "alice", "--overlap", "9999d"], "--overlap: expected seconds"),
    "rotate, overlap empty": (["rotate", "alice", "--overlap", ""], "--overlap: expected a span such as"),
    "team create, none": (["team", "create", "none"], "'none' is no name for a team"),
    "team create, any": (["team", "create", "Any"], "'Any' is no name for a team"),
    "team create, a space after it": (["team", "create", "lab "], "'lab ' begins or ends with a space"),
    "team create, taken": (["team", "create", "lab"], "there is a team named 'lab' already"),
    "team create, declared": (["team", "create", "research"], "the team 'research' is declared in"),
    "team limits, declared": (["team", "limits", "research", "--rpm", "1"], "the team 'research' is declared in"),
    "team limits, nothing given": (["team", "limits", "lab"], "nothing to change: give --rpm N"),
    "team show, none": (["team", "show", "none"], "there is no team named 'none'"),
    "team delete, declared": (["team", "delete", "research"], "the team 'research' is declared in"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_mistakes_are_named_and_change_nothing(arguments: list[str], message: str, config: Path) -> None:
    run(config, "create", "alice")
    run(config, "team", "create", "lab")
    before = [told(config, *command) for command in (["list"], ["team", "list"], ["audit"])]
    done = run(config, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert [told(config, *command) for command in (["list"], ["team", "list"], ["audit"])] == before


def test_a_file_that_can_not_be_read_is_told(config: Path) -> None:
    run(config, "create", "alice")
    (config.parent / "data" / "keys.db").write_bytes(b"no database" * 1000)
    for leftover in ("keys.db-wal", "keys.db-shm"):
        (config.parent / "data" / leftover).unlink(missing_ok=True)
    done = run(config, "list")
    assert done.returncode == 1
    assert done.stderr.startswith("scripts/keys: keys.db can't be used: ")


def test_a_change_acts_at_the_next_request(start_proxy: StartProxy, upstream: Upstream) -> None:
    upstream.always("/v1/chat/completions", reply({}))
    proxy = start_proxy([{"name": "a", "url": upstream.url, "models": ["m"], **SCRIPTED}])
    key = proxy.create_key("alice")

    def ask(with_key: str = key.key) -> tuple[int, str | None]:
        with proxy.client() as client:
            answer = client.post(
                "/v1/chat/completions",
                json={"model": "m", "messages": []},
                headers={"Authorization": f"Bearer {with_key}"},
            )
        return answer.status_code, answer.json().get("error", {}).get("code")

    assert ask() == (200, None)
    for command, expected in (
        (["disable", "alice"], (403, "key_disabled")),
        (["enable", "alice"], (200, None)),
        (["limits", "alice", "--model", "other"], (403, "model_not_allowed")),
        (["limits", "alice", "--model", "any"], (200, None)),
        (["limits", "alice", "--not-before", "2099-01-01"], (403, "key_not_yet_valid")),
        (["limits", "alice", "--not-before", "none"], (200, None)),
        (["limits", "alice", "--network", "192.0.2.0/24"], (403, "network_not_allowed")),
        (["limits", "alice", "--network", "127.0.0.1"], (200, None)),
        (["limits", "alice", "--endpoint", "/v1/embeddings"], (403, "endpoint_not_allowed")),
        (["limits", "alice", "--endpoint", "/v1/chat/*"], (200, None)),
        (["limits", "alice", "--rpm", "0"], (429, "rate_limit_exceeded")),
        (["limits", "alice", "--rpm", "none"], (200, None)),
        (["limits", "alice", "--budget", "day:tokens:0"], (429, "insufficient_quota")),
        (["limits", "alice", "--budget", "none"], (200, None)),
    ):
        told(proxy.config_path, *command)
        assert (command, ask()) == (command, expected)

    new = told(proxy.config_path, "rotate", "alice", "--overlap", "1h")["key"]
    assert (ask(), ask(new)) == ((200, None), (200, None))
    newest = told(proxy.config_path, "rotate", "alice")["key"]
    assert (ask(), ask(new), ask(newest)) == ((401, "invalid_api_key"), (401, "invalid_api_key"), (200, None))
    told(proxy.config_path, "revoke", "alice")
    assert ask(newest) == (401, "invalid_api_key")
