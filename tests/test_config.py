"""config.yaml: what is read, and that every mistake is answered with its path, what was expected and a hint."""

import json
import os
from pathlib import Path

import pytest

from gateway.config import ConfigError, load, parse
from gateway.settings import Address, Config, Secret, Server
from gateway.small_files import MAX_BYTES

ROOT = Path(__file__).parents[1]
FOLDER = Path("/etc/llmproxy")
SERVERS = "servers: [{name: a, url: 'http://h:1', models: [m, n]}]"

# As smol-llm-proxy's example has it, with its comments taken away.
SMOL = """
servers:
  - name: my-server
    url: http://host:8080
    api_key: ""       # optional, if llama-server requires auth
    models:
      - model-name.gguf
aliases:
  alias: model-name.gguf
"""


def test_the_shipped_file() -> None:
    config = load(ROOT / "config.yaml", environ={})
    assert config == Config(
        servers=(Server(name="gpu-1", url="http://127.0.0.1:8080"),), data=ROOT / "data", aliases={}
    )


def test_smol_llm_proxys_file() -> None:
    assert parse(SMOL, FOLDER, {}) == Config(
        servers=(Server(name="my-server", url="http://host:8080", models=("model-name.gguf",)),),
        aliases={"alias": "model-name.gguf"},
        data=FOLDER / "data",
    )


@pytest.mark.parametrize("indent", [None, 2, "\t"], ids=["one line", "spaces", "tabs"])
def test_json_is_yaml(indent: int | str | None) -> None:
    written = {"servers": [{"name": "a", "url": "http://h:1"}], "listen": "[::1]:8000", "aliases": {"é*": "m"}}
    config = parse(json.dumps(written, indent=indent), FOLDER, {})
    assert (config.listen.host, config.listen.port, config.aliases) == ("::1", 8000, {"é*": "m"})


PATHS = {
    "relative": ("books", "/etc/llmproxy/books"),
    "absolute": ("/var/books", "/var/books"),
    "up": ("../b", "/etc/llmproxy/../b"),
}


@pytest.mark.parametrize(("written", "expected"), PATHS.values(), ids=PATHS)
def test_relative_paths_count_from_the_file(written: str, expected: str) -> None:
    assert str(parse(f"{SERVERS}\ndata: {written}", FOLDER, {}).data) == expected


VARIABLES = {
    "set": ("${A}", {"A": "x"}, "x"),
    "within a text": ("a-${A}-${B}", {"A": "x", "B": "y"}, "a-x-y"),
    "unset, with nothing": ("${A:-}", {}, ""),
    "unset, with a default": ("${A:-b c}", {}, "b c"),
    "set wins": ("${A:-b}", {"A": "x"}, "x"),
    "set to nothing wins": ("${A:-b}", {"A": ""}, ""),
    "not taken twice": ("${A}", {"A": "${B}", "B": "y"}, "${B}"),
    "no variable": ("$A {A} ${1}", {}, "$A {A} ${1}"),
}


@pytest.mark.parametrize(("written", "environ", "expected"), VARIABLES.values(), ids=VARIABLES)
def test_variables(written: str, environ: dict[str, str], expected: str) -> None:
    config = parse(f"servers: [{{name: a, url: 'http://h', api_key: '{written}'}}]", FOLDER, environ)
    assert config.servers[0].api_key == expected


def test_secrets_hide() -> None:
    config = parse(f"{SERVERS[:-2]}, api_key: hush}}]\nadmin_key: hush", FOLDER, {})
    assert (config.admin_key, config.servers[0].api_key) == ("hush", "hush")
    for shown in (repr(config), f"{config}", repr(config.servers), f"{config.admin_key!r}"):
        assert "hush" not in shown
    assert (repr(Secret("x")), repr(Secret(""))) == ("Secret('***')", "Secret('')")


def test_a_key_with_nothing_behind_it_is_left_out() -> None:
    config = parse(f"{SERVERS}\ndefault_model:\naliases:\nlisten:\n", FOLDER, {})
    assert (config.default_model, config.aliases, config.listen) == (None, {}, Address("127.0.0.1:8000"))


def one(server: str) -> str:
    return f"servers: [{{name: a, url: 'http://h', {server}}}]"


# What is written -> what the message must hold: the path first, then what was expected or a hint.
MISTAKES: dict[str, tuple[str, list[str]]] = {
    "not YAML": ("servers: [", ["is not YAML"]),
    "nothing": ("", ["expected a mapping", "servers:", "got nothing"]),
    "a list": ("- a", ["expected a mapping", "list"]),
    "a key twice": (f"{SERVERS}\ndata: a\ndata: b", ["'data'", "twice", "line 3"]),
    "limits of an alias": (
        f"{SERVERS}\naliases: {{fast: m}}\nlimits: {{models: {{fast: {{rpm: 1}}}}}}",
        ["limits.models.fast", "is an alias", "'m'"],
    ),
    "a price of a model that nobody has": (
        f"{SERVERS}\nprices: {{models: {{mm: {{prompt: 1}}}}}}",
        ["prices.models.mm", "no server's model", "'m'"],
    ),
    "a negative limit": (f"{SERVERS}\nlimits: {{key: {{rpm: -1}}}}", ["limits.key.rpm", "0 (nothing) or more", "-1"]),
    "a limit that is none": (f"{SERVERS}\nlimits: {{all: {{rmp: 1}}}}", ["limits.all.rmp", "did you mean 'rpm'"]),
    "a budget of both": (
        f"{SERVERS}\nteams: {{a: {{budgets: [{{per: day, tokens: 1, money: 1}}]}}}}",
        ["teams.a.budgets[0]", "either tokens or money"],
    ),
    "a budget of no period": (
        f"{SERVERS}\nteams: {{a: {{budgets: [{{per: year, tokens: 1}}]}}}}",
        ["teams.a.budgets[0].per", "day, week, month, total", "year"],
    ),
    "a way to reserve": (f"{SERVERS}\nlimits: {{reserve: all}}", ["limits.reserve", "off, prompt, max_tokens"]),
    "a storage": (f"{SERVERS}\nlimits: {{storage: mysql://h}}", ["limits.storage", "redis://"]),
    "a negative price": (
        f"{SERVERS}\nprices: {{models: {{m: {{prompt: -1}}}}}}",
        ["prices.models.m.prompt", "0 or more"],
    ),
    "a mode": (f"{SERVERS}\nauth: {{mode: any}}", ["auth.mode", "first_match, all"]),
    "no network": (f"{SERVERS}\ntrusted_proxies: [here]", ["trusted_proxies[0]", "10.0.0.0/8"]),
    "a list as a key": ("{[1]: 2}", ["is not YAML", "key"]),
    "no servers": ("listen: 127.0.0.1:1", ["servers: missing", "a list of servers"]),
    "servers empty": ("servers: []", ["servers", "expected"]),
    "servers a mapping": ("servers: {a: b}", ["servers", "expected a list", "a list of servers"]),
    "a server that is a text": ("servers: [a]", ["servers[0]", "expected an object"]),
    "no url": ("servers: [{name: a}]", ["servers[0].url: missing", "http://HOST:PORT"]),
    "no name": ("servers: [{url: 'http://h'}]", ["servers[0].name: missing"]),
    "an unknown key": (f"{SERVERS}\nlissten: x", ["lissten: unknown key", "did you mean 'listen'"]),
    "an unknown key, far from all": (f"{SERVERS}\nqqq: x", ["qqq: unknown key", "known keys: servers"]),
    "an unknown key of a server": (one("apikey: x"), ["servers[0].apikey: unknown key", "did you mean 'api_key'"]),
    "a number for a text": (
        "servers: [{name: 1, url: 'http://h'}]",
        ["servers[0].name", "expected text, got a number"],
    ),
    "a text for a number": (f"{SERVERS}\nmax_body_mb: big", ["max_body_mb", "expected a number, got text"]),
    "models a text": (one("models: m"), ["servers[0].models", "expected a list"]),
    "a model a number": (one("models: [m, 1]"), ["servers[0].models[1]", "expected text"]),
    "an empty model": (one("models: ['']"), ["servers[0].models", "not empty"]),
    "an address without a port": (f"{SERVERS}\nlisten: localhost", ["listen", "HOST:PORT", "127.0.0.1:8000"]),
    "a port too large": (f"{SERVERS}\nlisten: 'a:65536'", ["listen", "HOST:PORT"]),
    "a port as a number": (f"{SERVERS}\nlisten: 8000", ["listen", "text", "8000"]),
    "dashboard on the same address": (f"{SERVERS}\ndashboard: 127.0.0.1:8000", ["dashboard", "listen", "another port"]),
    "another scheme": ("servers: [{name: a, url: 'ftp://h'}]", ["servers[0].url", "http://HOST:PORT", "'ftp://h'"]),
    "no scheme": ("servers: [{name: a, url: 'h:8080'}]", ["servers[0].url", "http://HOST:PORT"]),
    "no host": ("servers: [{name: a, url: 'http://'}]", ["servers[0].url", "http://HOST:PORT"]),
    "a wrong port": ("servers: [{name: a, url: 'http://h:x'}]", ["servers[0].url", "http://HOST:PORT"]),
    "half an IPv6 address": ("servers: [{name: a, url: 'http://[::1'}]", ["servers[0].url", "http://HOST:PORT"]),
    "a url with /v1": ("servers: [{name: a, url: 'http://h:1/v1/'}]", ["servers[0].url", "root", "write http://h:1"]),
    "a name twice": (
        "servers: [{name: a, url: 'http://h'}, {name: a, url: 'http://i'}]",
        ["servers[1].name", "'a'", "differ"],
    ),
    "an empty name": ("servers: [{name: ' ', url: 'http://h'}]", ["servers[0].name", "not empty"]),
    "weight zero": (one("weight: 0"), ["servers[0].weight", "above 0"]),
    "weight endless": (one("weight: .inf"), ["servers[0].weight", "above 0"]),
    "an unknown type": (one("type: vllm"), ["servers[0].type", "llama.cpp, openai"]),
    "a key of two lines": (one('api_key: "a\\nb"'), ["servers[0].api_key", "one line"]),
    "a body of no size": (f"{SERVERS}\nmax_body_mb: 0", ["max_body_mb", "above 0"]),
    "no time at all": (f"{SERVERS}\nfirst_byte_timeout_s: .nan", ["first_byte_timeout_s", "above 0"]),
    "a time before now": (f"{SERVERS}\ndrain_s: -1", ["drain_s", "expected"]),
    "an alias to nothing": (f"{SERVERS}\naliases: {{fast: mm}}", ["aliases.fast", "'mm'", "did you mean 'm'"]),
    "an alias to nothing like it": (f"{SERVERS}\naliases: {{fast: zzz}}", ["aliases.fast", "models: m, n"]),
    "an alias of two": (f"{SERVERS}\naliases: {{fast: [m]}}", ["aliases", "expected text"]),
    "a broken regular expression": (f"{SERVERS}\naliases: {{'/(/': m}}", ["aliases./(/", "no regular expression"]),
    "an unknown default": (f"{SERVERS}\ndefault_model: zzz", ["default_model", "'zzz'", "models: m, n"]),
    "a variable that is not set": (one("api_key: '${KEY}'"), ["servers[0].api_key", "KEY is not set", "${KEY:-}"]),
}


@pytest.mark.parametrize(("text", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, environ={})
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    message = message.removeprefix(f"{path}: ")
    assert [part for part in parts if part.lower() not in message.lower()] == [], message
    assert "\n  File" not in message


def url(text: str) -> str:
    return f"servers: [{{name: a, url: '{text}'}}]"


# What holds "hush" -> what is said instead.
SECRETS = {
    "a key of the wrong type": (one("api_key: [hush]"), "servers[0].api_key: expected text, got list"),
    "a path of the wrong type": (f"{SERVERS}\ndata: {{key: hush}}", "data: expected text, got dict"),
    "a text, no mapping": ("admin_key hush\n", "expected a mapping that begins with 'servers:', got str"),
    "a list": ("- api_key: hush\n", "expected a mapping that begins with 'servers:', got list"),
    "a password": (url("http://user:hush@gpu:1"), "'http://***@gpu:1'. Clients' paths are added to it: write http"),
    "a token": (url("http://gpu:1/?token=hush"), "'http://gpu:1/?***'"),
    "a password and a token": (url("http://u:hush@gpu:1/?t=hush#hush"), "'http://***@gpu:1/?***'"),
    "a password with a mark of queries": (url("http://u:12?hush@gpu:1"), "got 'http://***'"),
    "another url in the query": (url("http://u:hush@gpu:1/?u=http://h:1"), "'http://***@gpu:1/?***'"),
    "a password, and no url": (url("u:hush@gpu:1"), "got '***@gpu:1'"),
    "a tag": (f"{SERVERS}\nadmin_key: !hush", "line 2, column 12: could not determine a constructor for the tag …"),
    "a tag's handle": (f"{SERVERS}\nadmin_key: !hush!x y", "found undefined tag handle …"),
    "an alias": (f"{SERVERS}\nadmin_key: *hush", "line 2, column 12: found undefined alias …"),
    "an anchor": (f"{SERVERS}\nlisten: &hush a\nadmin_key: &hush b", "found duplicate anchor …"),
    "an escape": (f'{SERVERS}\nadmin_key: "\\hush"', "found unknown escape character …"),
    "a time": (f"{SERVERS}\nadmin_key: !!timestamp hush", "a value that can't be read (AttributeError)"),
    "a number": (f"{SERVERS}\ndrain_s: !!int hush", "a value that can't be read (ValueError)"),
    "no base64": (f"{SERVERS}\nadmin_key: !!binary hushé", "failed to convert base64 data into ascii: …"),
    "a key of JSON twice": ('{"sk-hush": 1, "sk-hush": 2}', "a key is given twice"),
    "a key twice": ("{sk-hush: 1, sk-hush: 2}", "line 1, column 14: a key is given twice"),
}


@pytest.mark.parametrize(("text", "expected"), SECRETS.values(), ids=SECRETS)
def test_a_secret_is_not_shown(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, FOLDER, {})
    assert "hush" not in str(caught.value)
    assert expected in str(caught.value)


# What PyYAML and Python stumble over in ways of their own.
UNREADABLE = {
    "a time that is none": f"{SERVERS}\nlisten: !!timestamp foo",
    "a number without digits": f"{SERVERS}\ndrain_s: 0x_",
    "a number of 5000 digits": f"{SERVERS}\ndrain_s: {'1' * 5000}",
    "10,000 lists deep": "[" * 10_000,
    "10,000 lists deep, in JSON": '{"a":' + "[" * 10_000,
    "a list in itself": f"{SERVERS}\ntrusted_proxies: &a [*a]",
    "a NUL": "a: \0",
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_what_can_not_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        parse(text, FOLDER, {})


LONG = "x" * 1_000_000


@pytest.mark.parametrize("text", [LONG, f"- {LONG}", f"{SERVERS}\n{LONG}: 1", f"{SERVERS}\nlisten: {LONG}", url(LONG)])
def test_what_is_said_is_short(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert len(str(caught.value)) <= 400


FILES = {"not there": (None, "can't be read"), "not UTF-8": (b"\xff\xfe\x00", "is not UTF-8")}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_files_that_are_none(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(path, environ={})


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load(tmp_path, environ={})


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="can't be read: it is no regular file"):
        load(tmp_path / "config.yaml", environ={})


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SERVERS + "\n" + "#" * (MAX_BYTES - len(SERVERS) - 1))
    assert load(path, {}).servers[0].name == "a"
    with path.open("a") as file:
        file.write("#")
    with pytest.raises(ConfigError, match="can't be read: it is larger than 5 MB"):
        load(path, {})
