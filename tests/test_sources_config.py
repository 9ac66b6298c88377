"""auth.sources in config.yaml: every mistake stops the start, with its path and what was expected."""

import hashlib
import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gateway.auth import Authenticator
from gateway.config import ConfigError, parse
from gateway.keys import Key, Team
from gateway.limits import Limits
from gateway.records import utc_now
from gateway.sources import settings
from gateway.sources.sql_text import has_binds, with_percents

SHA = hashlib.sha256(b"sk-1").hexdigest()
QUERY = "select name from people where secret = :sha256"


class NoKeys:
    def find(self, key: str) -> Key | None:
        return None

    def team(self, name: str) -> Team | None:
        return None


def build(
    folder: Path, sources: Any, mode: str = "first_match", environ: dict[str, str] | None = None
) -> Authenticator:
    written = {"servers": [{"name": "a", "url": "http://h"}], "auth": {"mode": mode, "sources": sources}}
    return Authenticator(parse(json.dumps(written), folder, environ or {}), NoKeys(), utc_now)


def test_paths_count_from_the_files_folder() -> None:
    sources = [
        {"type": "file", "path": "keys.yaml"},
        {"type": "sql", "url": "sqlite:///people.db", "query": QUERY},
        {"type": "sql", "url": "sqlite:////var/people.db", "query": QUERY},
        {"type": "lua", "path": "who.lua"},
        {"type": "webhook", "url": "https://h/", "ca_file": "ca.pem"},
    ]
    written = {"servers": [{"name": "a", "url": "http://h"}], "auth": {"sources": sources}}
    found = parse(json.dumps(written), Path("/etc/llmproxy"), {}).auth.sources
    places = [[getattr(source, name, None) for name in ("path", "ca_file", "url")] for source in found]
    assert [str(next(filter(None, place))) for place in places] == [
        "/etc/llmproxy/keys.yaml",
        "sqlite:////etc/llmproxy/people.db",
        "sqlite:////var/people.db",
        "/etc/llmproxy/who.lua",
        "/etc/llmproxy/ca.pem",
    ]


def test_secrets_hide() -> None:
    sources = [
        {"type": "sql", "url": "postgresql://u:hush@h/d", "query": QUERY},
        {"type": "redis", "url": "redis://:hush@h"},
        {"type": "mongodb", "url": "mongodb://u:hush@h"},
        {"type": "webhook", "url": "https://h/", "api_key": "hush", "headers": {"x-token": "hush"}},
        {"type": "static", "keys": [{"name": "a", "key": "${KEY}"}]},
    ]
    written = {"servers": [{"name": "a", "url": "http://h"}], "auth": {"sources": sources}}
    assert "hush" not in repr(parse(json.dumps(written), Path("/"), {"KEY": "hush"}))


def static(**more: Any) -> list[dict[str, Any]]:
    return [{"type": "local"}, {"type": "static", "keys": [{"name": "ci", "sha256": SHA, **more}]}]


AT = "auth.sources[0]"
MISTAKES: dict[str, tuple[Any, list[str]]] = {
    "none": ([], ["auth.sources", "at least one"]),
    "no type": ([{"path": "x"}], [AT, "type"]),
    "an unknown type": ([{"type": "ldap"}], [AT, "type", "ldap"]),
    "an unknown key": ([{"type": "redis", "uri": "x"}], [f"{AT}.uri: unknown key"]),
    "no url": ([{"type": "redis"}], [f"{AT}.url: missing"]),
    "on_error": ([{"type": "local", "on_error": "ignore"}], [f"{AT}.on_error", "refuse, next"]),
    "no time": ([{"type": "local", "timeout_s": 0}], [f"{AT}.timeout_s", "above 0"]),
    "negative cache": ([{"type": "redis", "url": "redis://h", "cache_s": -1}], [f"{AT}.cache_s", "0 or more"]),
    "two of a name": ([{"type": "local", "name": "a"}, {"type": "local", "name": "a"}], ["auth.sources[1].name"]),
    "a name with a slash": ([{"type": "local", "name": "a/b"}], [f"{AT}.name", "without a /"]),
    "no models": (static(models=[]), ["auth.sources[1].keys[0].models", "leave it out for all"]),
    "no endpoints": (static(endpoints=[]), ["auth.sources[1].keys[0].endpoints", "leave it out for all"]),
    "no networks": (static(networks=[]), ["auth.sources[1].keys[0].networks", "leave it out for all"]),
    "an empty name": ([{"type": "local", "name": " "}], [f"{AT}.name"]),
    "a key and its hash": (static(key="sk-1"), ["auth.sources[1].keys[0]", "either a key"]),
    "neither": ([{"type": "static", "keys": [{"name": "a"}]}], [f"{AT}.keys[0]", "either a key"]),
    "an unset variable": ([{"type": "static", "keys": [{"name": "a", "key": "${NO}"}]}], [f"{AT}.keys[0].key", "NO"]),
    "half a hash": ([{"type": "static", "keys": [{"name": "a", "sha256": "abc"}]}], [f"{AT}.keys[0].sha256", "64"]),
    "a limit": (static(limits={"rpm": -1}), ["auth.sources[1].keys[0].limits.rpm"]),
    "a strange limit": (static(limits={"rmp": 1}), ["auth.sources[1].keys[0].limits.rmp", "did you mean"]),
    "a network": (static(networks=["10.0.0.1/8"]), ["auth.sources[1].keys[0].networks[0]"]),
    "a pattern": (static(models=["/(/"]), ["auth.sources[1].keys[0].models[0]"]),
    "a time": (static(expires="soon"), ["auth.sources[1].keys[0].expires", "2027-01-31"]),
    "a span": (static(expires="90d"), ["auth.sources[1].keys[0].expires", "expected a date"]),
    "a priority": (static(priority="vip"), ["auth.sources[1].keys[0].priority"]),
    "one name for two": (
        [{"type": "static", "keys": [{"name": "a", "key": "x"}, {"name": "a", "key": "y"}]}],
        [f"{AT}.keys[1].name", "taken"],
    ),
    "one key for two": (
        [{"type": "static", "keys": [{"name": "a", "key": "sk-1"}, {"name": "b", "sha256": SHA}]}],
        [f"{AT}.keys[1]", "same key"],
    ),
    "no file": ([{"type": "file", "path": "none.yaml"}], [AT, "none.yaml", "can't be read"]),
    "no list of keys": ([{"type": "file", "path": "config.yaml"}], [AT, "config.yaml"]),
    "another database": ([{"type": "sql", "url": "oracle://h/d", "query": QUERY}], [f"{AT}.url", "sqlite://"]),
    "no database": ([{"type": "sql", "url": "sqlite:///none.db", "query": QUERY}], [f"{AT}.url", "none.db"]),
    "no bind": (
        [{"type": "sql", "url": "postgresql://h/d", "query": "select ':key' -- :sha256"}],
        [f"{AT}.query", ":sha256"],
    ),
    "half a url": ([{"type": "sql", "url": "postgresql://h:x:y/d?z", "query": QUERY}], [f"{AT}.url", "postgresql://"]),
    "a port that is none": ([{"type": "sql", "url": "mysql://h:x/d", "query": QUERY}], [f"{AT}.url", "mysql://"]),
    "an option of nobody": ([{"type": "sql", "url": "mysql://h/d?a=b", "query": QUERY}], [f"{AT}.url", "'a'"]),
    "redis: a web address": ([{"type": "redis", "url": "http://h"}], [f"{AT}.url", "redis://"]),
    "redis: no template": ([{"type": "redis", "url": "redis://h", "key": "keys"}], [f"{AT}.key", "{sha256}"]),
    "redis: a template of more": ([{"type": "redis", "url": "redis://h", "key": "{sha256}{x}"}], [f"{AT}.key"]),
    "mongodb: a web address": ([{"type": "mongodb", "url": "http://h"}], [f"{AT}.url", "mongodb://"]),
    "webhook: no address": ([{"type": "webhook", "url": "h/path"}], [f"{AT}.url", "https://"]),
    "webhook: no CA": ([{"type": "webhook", "url": "https://h/", "ca_file": "none.pem"}], [AT, "ca_file"]),
    "webhook: a CA for nothing": (
        [{"type": "webhook", "url": "https://h/", "ca_file": "a.pem", "verify_tls": False}],
        [f"{AT}.ca_file", "verify_tls"],
    ),
    "python: no file": ([{"type": "python", "path": "none.py"}], [AT, "none.py", "can't be read"]),
    "python: no function": ([{"type": "python", "path": "x.py", "function": "a b"}], [f"{AT}.function"]),
    "lua: no instructions": ([{"type": "lua", "path": "x", "max_instructions": 0}], [f"{AT}.max_instructions"]),
    "lua: no memory": ([{"type": "lua", "path": "x", "max_memory_mb": 0}], [f"{AT}.max_memory_mb"]),
}


@pytest.mark.parametrize(("sources", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(tmp_path: Path, sources: Any, expected: list[str]) -> None:
    (tmp_path / "config.yaml").write_text("servers: []")
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, sources)
    for part in expected:
        assert part in str(caught.value)
    assert "sk-1" not in str(caught.value)


def test_with_mode_all_no_source_may_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auth\.sources\[1\]\.on_error: with mode: all"):
        build(tmp_path, [{"type": "local"}, {"type": "local", "on_error": "next"}], "all")


DRIVERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "postgresql": (
        "psycopg",
        {"type": "sql", "url": "postgresql://h/d", "query": QUERY},
        "auth.sources[0]: type sql with postgresql:// needs psycopg, which is not installed: run scripts/extras",
    ),
    "mysql": (
        "pymysql",
        {"type": "sql", "url": "mysql://h/d", "query": QUERY},
        "auth.sources[0]: type sql with mysql:// needs pymysql, which is not installed: run scripts/extras",
    ),
    "redis": (
        "redis",
        {"type": "redis", "url": "redis://h"},
        "auth.sources[0]: type redis needs redis, which is not installed: run scripts/extras",
    ),
    "mongodb": (
        "pymongo",
        {"type": "mongodb", "url": "mongodb://h"},
        "auth.sources[0]: type mongodb needs pymongo, which is not installed: run scripts/extras",
    ),
    "lua": (
        "lupa",
        {"type": "lua", "path": "who.lua"},
        "auth.sources[0]: type lua needs lupa, which is not installed: run scripts/extras",
    ),
}


@pytest.mark.parametrize(("package", "source", "expected"), DRIVERS.values(), ids=DRIVERS)
def test_a_missing_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: dict[str, Any], expected: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, [source])
    assert str(caught.value) == expected


BINDS: dict[str, tuple[str, bool, str]] = {
    "a hash": ("where s = :sha256", True, "where s = %(sha256)s"),
    "the key": ("where s = crypt(:key, s)", True, "where s = crypt(%(key)s, s)"),
    "both": (":key :sha256", True, "%(key)s %(sha256)s"),
    "a cast": ("where s = :sha256::text", True, "where s = %(sha256)s::text"),
    "a cast to a type of this name": ("a::key", False, "a::key"),
    "within a text": ("where s = ':key' and '%'", False, "where s = ':key' and '%%'"),
    "a text with quotes": ("'it''s :key'", False, "'it''s :key'"),
    "a text with a backslash": (r"'it\'s :key'", False, r"'it\'s :key'"),
    "a quoted name": ('":key" `:key`', False, '":key" `:key`'),
    "comments": ("1 -- :key\n/* :sha256 */", False, "1 -- :key\n/* :sha256 */"),
    "a longer name": (":keys :sha2561", False, ":keys :sha2561"),
    "a percent sign": ("a % 2 like '%x%' = :key", True, "a %% 2 like '%%x%%' = %(key)s"),
    "what a driver would take for a bind": ("%(key)s", False, "%%(key)s"),
}


@pytest.mark.parametrize(("query", "binds", "expected"), BINDS.values(), ids=BINDS)
def test_where_the_binds_are(query: str, binds: bool, expected: str) -> None:
    assert has_binds(query) is binds
    assert with_percents(query) == expected


async def test_a_static_key_with_everything(tmp_path: Path) -> None:
    sources = static(
        team="t",
        models=["m"],
        endpoints=["/v1/*"],
        networks=["10.0.0.0/8"],
        weight=2,
        priority="low",
        not_before="2026-01-01",
        expires="2100-01-31",
        limits={"rpm": 5},
    )
    caller = await build(tmp_path, sources).authenticate({"x-api-key": ["sk-1"]}, "10.1.1.1")
    assert (caller.key_id, caller.key_name, caller.source, caller.scope) == (None, "ci", "static", "key:static/ci")
    assert (caller.weight, caller.priority, caller.team, caller.limits) == (2, 2, "t", Limits(rpm=5))
    assert [caller.may_use("m"), caller.may_use("n"), caller.may_call("/v1/models"), caller.may_call("/x")] == [
        True,
        False,
        True,
        False,
    ]


async def test_a_replaced_sqlite_file_is_used_at_once(tmp_path: Path) -> None:
    def write(path: Path, name: str) -> None:
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("create table people (name text, secret text)")
            db.execute("insert into people values (?, ?)", [name, SHA])

    write(tmp_path / "people.db", "alice")
    by = build(tmp_path, [{"type": "sql", "url": "sqlite:///people.db", "query": QUERY, "cache_s": 0}])
    names = [(await by.authenticate({"x-api-key": ["sk-1"]}, "")).key_name]
    write(tmp_path / "new.db", "bob")
    (tmp_path / "new.db").replace(tmp_path / "people.db")
    names.append((await by.authenticate({"x-api-key": ["sk-1"]}, "")).key_name)
    assert names == ["alice", "bob"]


def test_every_type_has_its_record() -> None:
    tags = {kind.__struct_config__.tag for kind in settings.Source.__value__.__args__}
    assert tags == {"local", "static", "file", "sql", "redis", "mongodb", "webhook", "python", "lua"}
