"""Servers and aliases that the API made: whole records in and out of keys.db, and how they join those of the file."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.config import parse
from gateway.keystore import KeyStore
from gateway.made import Made, MadeAlias, MadeServer, Missing, Taken, Wrong, merge
from gateway.registry import Registry, merged, read_made
from gateway.settings import Config, Secret, Server

SERVER = Server("gpu-9", "http://10.0.0.9:8080")
KEY = "sk-upstream-0123456789abcdef"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with closing(Registry(tmp_path / "keys.db")) as opened:
        yield opened


def config(text: str) -> Config:
    return parse(text, Path("/nowhere"), {})


FILE = config("{servers: [{name: gpu-1, url: http://127.0.0.1:8080, models: [qwen]}], aliases: {fast: qwen}}")


def made_server(server: Server, active: bool = True) -> MadeServer:
    return MadeServer(1, server, active, "2026-11-21T10:00:00.000Z")


def becomes(server: Server) -> Callable[[MadeServer], MadeServer]:
    return lambda made: msgspec.structs.replace(made, server=server)


def audited(path: Path) -> list[tuple[str, str, str, str]]:
    with closing(KeyStore(path)) as store:
        return [(each.actor, each.action, each.kind, each.name) for each in reversed(store.audit(100))]


def test_a_server_comes_back_as_it_was_made(registry: Registry, tmp_path: Path) -> None:
    full = Server("gpu-9", "https://10.0.0.9", Secret(KEY), ("m2", "m1"), 2.5, "openai", 0, verify_tls=False)
    assert registry.create_server(full, active=False, actor="me") == 1
    (found,) = read_made(tmp_path / "keys.db").servers
    sorted_models = Server("gpu-9", "https://10.0.0.9", Secret(KEY), ("m1", "m2"), 2.5, "openai", 0, verify_tls=False)
    assert (found.id, found.server, found.active) == (1, sorted_models, False)
    assert isinstance(found.server.api_key, Secret)
    assert audited(tmp_path / "keys.db") == [("me", "create", "server", "gpu-9")]


def test_secrets_are_not_in_the_audit(registry: Registry, tmp_path: Path) -> None:
    registry.create_server(Server("s", "http://h", Secret(KEY)), actor="me")
    registry.change_server(1, becomes(Server("s", "http://h", Secret(KEY[::-1]))), actor="me")
    registry.delete_server(1, actor="me")
    with closing(sqlite3.connect(tmp_path / "keys.db")) as db:
        told = str(db.execute("select * from audit").fetchall())
    assert KEY[8:20] not in told and KEY[::-1][8:20] not in told
    assert "sk-upst…cdef" in told


def test_models_are_asked_until_one_is_assigned(registry: Registry) -> None:
    registry.create_server(SERVER, actor="me")
    assert registry.made().servers[0].server.models is None
    registry.assign(1, "m", actor="me")
    registry.assign(1, "m", actor="me")
    assert registry.made().servers[0].server.models == ("m",)
    registry.unassign(1, "m", actor="me")
    assert registry.made().servers[0].server.models == ()
    registry.change_server(1, becomes(SERVER), actor="me")
    assert registry.made().servers[0].server.models is None


def models_of(registry: Registry) -> dict[str, tuple[str, ...] | None]:
    return {each.server.name: each.server.models for each in registry.made().servers}


def test_a_model_is_moved_or_shared(registry: Registry) -> None:
    for name in "abc":
        registry.create_server(Server(name, "http://h"), actor="me")
    registry.assign(1, "m", actor="me")
    with pytest.raises(Taken, match=r"Model 'm' already assigned to server 'a' \(id=1\)"):
        registry.assign(2, "m", actor="me")
    assert models_of(registry) == {"a": ("m",), "b": None, "c": None}
    registry.assign(2, "m", share=True, actor="me")
    assert models_of(registry) == {"a": ("m",), "b": ("m",), "c": None}
    registry.assign(3, "m", move=True, actor="me")
    assert models_of(registry) == {"a": (), "b": (), "c": ("m",)}


def test_deleting_a_server_deletes_its_models(registry: Registry) -> None:
    registry.create_server(Server("a", "http://h", models=("m",)), actor="me")
    registry.delete_server(1, actor="me")
    registry.create_server(Server("b", "http://h"), actor="me")
    registry.assign(2, "m", actor="me")
    assert models_of(registry) == {"b": ("m",)}


def test_ids_are_never_given_again(registry: Registry) -> None:
    assert registry.server_ids(["gpu-1", "gpu-2"]) == {"gpu-1": 1, "gpu-2": 2}
    assert registry.create_server(SERVER, actor="me") == 3
    registry.delete_server(3, actor="me")
    assert registry.create_server(SERVER, actor="me") == 4
    assert registry.server_ids(["gpu-1", "new"]) == {"gpu-1": 1, "gpu-2": 2, "gpu-9": 4, "new": 5}
    assert registry.create_server(Server("gpu-2", "http://h"), actor="me") == 2  # the file has let go of it
    assert registry.made().servers[0].id == 2


def test_aliases(registry: Registry, tmp_path: Path) -> None:
    registry.create_alias("fast", "m", actor="me")
    with pytest.raises(Taken):
        registry.create_alias("fast", "m2", actor="me")
    registry.change_alias("fast", "m2", actor="you")
    (alias,) = registry.made().aliases
    assert (alias.id, alias.name, alias.model) == (1, "fast", "m2")
    registry.delete_alias("fast", actor="me")
    registry.delete_alias("fast", actor="me")
    assert registry.made() == Made()
    assert audited(tmp_path / "keys.db") == [
        ("me", "create", "alias", "fast"),
        ("you", "change", "alias", "fast"),
        ("me", "delete", "alias", "fast"),
    ]


@pytest.mark.parametrize(
    "work",
    [
        lambda registry: registry.change_server(7, becomes(SERVER), actor="me"),
        lambda registry: registry.delete_server(7, actor="me"),
        lambda registry: registry.delete_server(registry.server_ids(["declared"])["declared"], actor="me"),
        lambda registry: registry.assign(7, "m", actor="me"),
        lambda registry: registry.unassign(7, "m", actor="me"),
        lambda registry: registry.change_alias("nobody", "m", actor="me"),
    ],
    ids=["change", "delete", "delete-declared", "assign", "unassign", "alias"],
)
def test_what_is_not_there_can_t_be_changed(
    registry: Registry, work: Callable[[Registry], Any], tmp_path: Path
) -> None:
    with pytest.raises(Missing):
        work(registry)
    assert audited(tmp_path / "keys.db") == []


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("name", {"name": " "}),
    ("name", {"name": "a\nb"}),
    ("name", {"name": "x" * 501}),
    ("url", {"url": "ftp://h"}),
    ("url", {"url": "http://h/v1"}),
    ("url", {"url": "http://user:pass@h"}),
    ("api_key", {"api_key": Secret("a\r\nx: y")}),
    ("api_key", {"api_key": Secret("schlüssel")}),
    ("models[1]", {"models": ("m", "\0")}),
    ("weight", {"weight": 0}),
    ("weight", {"weight": float("nan")}),
    ("type", {"type": "vllm"}),
    ("slots", {"slots": -1}),
]


@pytest.mark.parametrize(
    ("field", "values"), WRONG, ids=[f"{field}-{number}" for number, (field, _) in enumerate(WRONG)]
)
def test_a_wrong_server_is_told_by_its_field(registry: Registry, field: str, values: dict[str, Any]) -> None:
    with pytest.raises(Wrong) as raised:
        registry.create_server(Server(**{"name": "s", "url": "http://h", **values}), actor="me")
    assert raised.value.field == field
    assert registry.made() == Made()


@pytest.mark.parametrize(
    ("field", "name", "model"),
    [("alias_name", "", "m"), ("alias_name", "/(/", "m"), ("real_model_name", "a", " "), ("alias_name", "\x1b", "m")],
)
def test_a_wrong_alias_is_told_by_its_field(registry: Registry, field: str, name: str, model: str) -> None:
    with pytest.raises(Wrong) as raised:
        registry.create_alias(name, model, actor="me")
    assert raised.value.field == field


def test_nothing_made_changes_nothing() -> None:
    assert merged(FILE, Made()) is not None
    assert merged(FILE, Made()) == FILE


def test_made_ones_join_those_of_the_file() -> None:
    other = Server("gpu-2", "http://h", models=("llama",))
    made = Made((made_server(other),), (MadeAlias(1, "slow", "llama", ""),))
    both = merge(FILE, made)
    assert [server.name for server in both.config.servers] == ["gpu-1", "gpu-2"]
    assert both.config.aliases == {"fast": "qwen", "slow": "llama"}
    assert both.problems == ()


def test_names_of_the_file_win() -> None:
    made = Made((made_server(Server("gpu-1", "http://other")),), (MadeAlias(1, "fast", "qwen", ""),))
    assert merge(FILE, made).config == FILE


def test_what_is_not_active_is_not_in_use() -> None:
    assert merge(FILE, Made((made_server(SERVER, active=False),))).config == FILE


def test_what_is_wrong_beside_the_file_is_left_out_and_told() -> None:
    bad = Server("bad", "no url")
    both = merge(FILE, Made((made_server(bad),), (MadeAlias(1, "gone", "nobody-has-it", ""),)))
    assert both.config == FILE
    assert both.problems == (
        "servers.bad.url: expected http://HOST:PORT or https://HOST:PORT, got 'no url'",
        "aliases.gone: 'nobody-has-it' is no server's model",
    )


def test_an_alias_may_lead_to_what_a_server_will_tell() -> None:
    both = merge(FILE, Made((made_server(SERVER),), (MadeAlias(1, "soon", "somebody-may-have-it", ""),)))
    assert both.config.aliases == {"fast": "qwen", "soon": "somebody-may-have-it"}
    assert both.problems == ()
