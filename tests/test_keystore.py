"""keys.db: a key's life, what lies on the disk, and that a change acts at the next look, whoever made it."""

import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.keys import iso, parse_expiry, parse_start
from gateway.keystore import Changes, InUse, Key, KeyNotFound, KeyProblem, KeyReader, KeyStore, NameTaken, hash_key
from gateway.limits import Budget, Limits

ADDON = Path(__file__).parents[1] / "addon"
NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "keys.db"


@pytest.fixture
def store(path: Path) -> Iterator[KeyStore]:
    with closing(KeyStore(path)) as store:
        yield store


@pytest.fixture
def reader(store: KeyStore, path: Path) -> Iterator[KeyReader]:
    with closing(KeyReader(path)) as reader:
        yield reader


def test_a_keys_life(store: KeyStore, reader: KeyReader) -> None:
    made, key = store.create("alice", models=("qwen*",), expires_at="2027-01-01T00:00:00.000Z")
    assert made == Key(
        id=1,
        name="alice",
        hint=f"{key[:7]}…{key[-4:]}",
        created_at=made.created_at,
        disabled=False,
        expires_at="2027-01-01T00:00:00.000Z",
        models=("qwen*",),
        weight=1,
        priority="normal",
    )
    assert reader.find(key) == made == store.get("alice")

    store.set_disabled("alice", True)
    assert reader.find(key) == store.get("alice")
    assert store.get("alice").disabled
    store.set_disabled("alice", False)
    assert reader.find(key) == made

    rotated, new_key = store.rotate("alice")
    assert (rotated.id, rotated.models, rotated.expires_at) == (made.id, made.models, made.expires_at)
    assert (reader.find(key), reader.find(new_key)) == (None, rotated)

    assert store.revoke("alice") == rotated
    assert (reader.find(new_key), store.list()) == (None, [])


def test_keys_are_long_and_differ(store: KeyStore) -> None:
    keys = {store.create(f"n{number}")[1] for number in range(20)}
    assert len(keys) == 20
    assert all(key.startswith("sk-") and len(key) >= 46 for key in keys)


def test_ids_are_never_given_again(store: KeyStore) -> None:
    store.create("a")
    store.revoke("a")
    assert store.create("a")[0].id == 2


def test_only_the_hash_is_on_disk(store: KeyStore, path: Path) -> None:
    key = store.create("alice")[1]
    on_disk = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert key.encode() not in on_disk
    assert key[7:-4].encode() not in on_disk
    assert hash_key(key).encode() in on_disk


def test_files_are_the_owners_alone(store: KeyStore, reader: KeyReader, path: Path) -> None:
    store.create("alice")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir() if file.name != "usage.db"}
    assert {"keys.db", "keys.db-wal", "keys.db-shm"} <= set(modes)
    assert set(modes.values()) == {0o600}


def test_a_file_that_others_could_read_is_closed(path: Path) -> None:
    path.parent.mkdir()
    path.touch(0o644)
    KeyStore(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


PROBLEMS: dict[str, tuple[Callable[[KeyStore], object], str]] = {
    "create, name taken": (lambda store: store.create("alice"), "is a key named 'alice' already"),
    "create, no name": (lambda store: store.create(" "), "is no name: expected"),
    "create, a line end": (lambda store: store.create("a\nb"), "is no name: expected"),
    "create, too long": (lambda store: store.create("x" * 201), "is no name: expected"),
    "create, a space after it": (lambda store: store.create("b "), "'b ' begins or ends with a space"),
    "change, a space before it": (
        lambda store: store.change("alice", Changes(name=" b")),
        "begins or ends with a space",
    ),
    "change, a team's space": (lambda store: store.change("alice", Changes(team=" b")), "team: ' b' begins or ends"),
    "create, a broken pattern": (lambda store: store.create("b", models=("/(/",)), "no regular expression"),
    "create, a weight of 0": (lambda store: store.create("b", weight=0), "weight: expected a number from 0.001"),
    "create, a weight below 0": (lambda store: store.create("b", weight=-1), "weight: .* got -1"),
    "create, a weight beyond bounds": (lambda store: store.create("b", weight=1000.5), "weight: .* to 1000"),
    "create, a weight without end": (lambda store: store.create("b", weight=float("inf")), "weight: .* got inf"),
    "create, a weight that is none": (lambda store: store.create("b", weight=float("nan")), "weight: .* got nan"),
    "create, an unknown priority": (
        lambda store: store.create("b", priority="highest"),
        "priority: expected one of high, normal, low, got 'highest'",
    ),
    "limits, no such key": (lambda store: store.change("bob", Changes(weight=2)), "no key named 'bob'"),
    "limits, one of two is wrong": (
        lambda store: store.change("alice", Changes(weight=2, priority="")),
        "priority: .* got ''",
    ),
    "limits, a weight of 0": (
        lambda store: store.change("alice", Changes(weight=0, priority="low")),
        "weight: .* got 0",
    ),
    "create, no overlap in time": (
        lambda store: store.create("b", not_before="2027-01-02", expires_at="2027-01-01"),
        "expires_at: expected a time after not_before",
    ),
    "create, no time": (
        lambda store: store.create("b", not_before="soon"),
        "not_before: expected a date .* got 'soon'",
    ),
    "change, a name that is taken": (
        lambda store: [store.create("b"), store.change("b", Changes(name="alice"))],
        "is a key named 'alice' already",
    ),
    "rotate, an overlap below 0": (lambda store: store.rotate("alice", -1), "overlap_s: expected seconds, 0 or more"),
    "rotate, an overlap without end": (lambda store: store.rotate("alice", float("inf")), "overlap_s: .* got inf"),
    "rotate, an overlap that is none": (lambda store: store.rotate("alice", float("nan")), "overlap_s: .* got nan"),
    "get": (lambda store: store.get("bob"), "no key named 'bob'"),
    "get by id": (lambda store: store.get(2), "no key with the id 2"),
    "rotate": (lambda store: store.rotate("bob"), "no key named 'bob'"),
    "disable": (lambda store: store.set_disabled("bob", True), "no key named 'bob'"),
    "revoke": (lambda store: store.revoke("bob"), "no key named 'bob'"),
}


@pytest.mark.parametrize(("call", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_problems(call: Callable[[KeyStore], object], message: str, store: KeyStore) -> None:
    store.create("alice")
    before = store.list()
    with pytest.raises(KeyProblem, match=message):
        call(store)
    assert [key for key in store.list() if key.name != "b"] == before


CHANGES: dict[str, tuple[Changes, dict[str, object]]] = {
    "nothing": (Changes(), {}),
    "name": (Changes(name="bob"), {}),
    "disabled": (Changes(disabled=True), {}),
    "weight": (Changes(weight=1000), {}),
    "priority": (Changes(priority="high"), {}),
    "models": (Changes(models=("gpt-*", "/a.c/")), {}),
    "all models": (Changes(models=()), {}),
    "endpoints": (Changes(endpoints=("/v1/embeddings", "/v1/audio/*")), {}),
    "networks": (Changes(networks=("10.0.0.0/8", "2001:db8::/32", "192.0.2.1")), {}),
    "team": (Changes(team="lab"), {}),
    "no team": (Changes(team=None), {}),
    "limits": (Changes(limits=Limits(rpm=0, budgets=(Budget("total", tokens=0),))), {}),
    "no limits": (Changes(limits=Limits()), {}),
    "a span of days": (Changes(expires_at="90d"), {"expires_at": "2027-02-19T09:30:00.000Z"}),
    "through a date": (Changes(expires_at="2027-01-31"), {"expires_at": "2027-02-01T00:00:00.000Z"}),
    "no end": (Changes(expires_at=None), {}),
    "from a date on": (Changes(not_before="2026-12-01"), {"not_before": "2026-12-01T00:00:00.000Z"}),
    "from the beginning": (Changes(not_before=None), {}),
    "two": (Changes(weight=2, team="other"), {}),
}
FULL: dict[str, Any] = {
    "models": ("m",),
    "expires_at": "2027-06-01T00:00:00.000Z",
    "not_before": "2026-11-22T00:00:00.000Z",
    "weight": 0.5,
    "priority": "low",
    "team": "research",
    "limits": Limits(rpm=60, rps=2.5, burst=5, tpm=1000, concurrency=4, budgets=(Budget("month", tokens=5),)),
    "endpoints": ("/v1/models",),
    "networks": ("127.0.0.1",),
}


@pytest.mark.parametrize(("changes", "written"), CHANGES.values(), ids=CHANGES)
def test_what_is_given_changes_and_the_rest_stays(
    changes: Changes, written: dict[str, object], path: Path, reader: KeyReader
) -> None:
    with closing(KeyStore(path, lambda: NOW)) as store:
        made, secret = store.create("alice", **FULL)
        given = {name: getattr(changes, name) for name in changes.__struct_fields__}
        set_ones = {name: value for name, value in given.items() if value is not msgspec.UNSET}
        expected = msgspec.structs.replace(made, **{**set_ones, **written})
        assert store.change(made.id, changes) == expected == store.get(made.id) == reader.find(secret)


KINDS: dict[str, tuple[Callable[[KeyStore], object], type[KeyProblem], str | None]] = {
    "no such name": (lambda store: store.change("bob", Changes()), KeyNotFound, "name"),
    "no such id": (lambda store: store.revoke(7), KeyNotFound, "id"),
    "a name that is no Unicode": (lambda store: store.get("\ud800"), KeyNotFound, "name"),
    "an id of 65 bits": (lambda store: store.get(2**64), KeyNotFound, "id"),
    "name taken": (lambda store: store.create("alice"), NameTaken, "name"),
    "model": (lambda store: store.create("b", models=("m", "/(/")), KeyProblem, "models[1]"),
    "limit": (lambda store: store.change("alice", Changes(limits=Limits(rpm=-1))), KeyProblem, "limits.rpm"),
    "budget": (
        lambda store: store.change("alice", Changes(limits=Limits(budgets=(Budget("year", tokens=1),)))),
        KeyProblem,
        "limits.budgets[0].per",
    ),
    "team with keys": (
        lambda store: [
            store.create("b", team="lab"),
            store.teams.create("lab", actor="x"),
            store.teams.delete("lab", actor="x"),
        ],
        InUse,
        "name",
    ),
}


@pytest.mark.parametrize(("call", "kind", "field"), KINDS.values(), ids=KINDS)
def test_a_problem_names_its_field(
    call: Callable[[KeyStore], object], kind: type[KeyProblem], field: str | None, store: KeyStore
) -> None:
    store.create("alice")
    with pytest.raises(KeyProblem) as caught:
        call(store)
    assert (type(caught.value), caught.value.field) == (kind, field)


def test_a_change_may_depend_on_what_is_there(store: KeyStore) -> None:
    store.create("alice", limits=Limits(rpm=5))
    store.change("alice", lambda key: Changes(limits=msgspec.structs.replace(key.limits, tpm=7)))
    assert store.get("alice").limits == Limits(rpm=5, tpm=7)


def test_a_new_key_for_a_name_keeps_all_else(store: KeyStore) -> None:
    made, _ = store.create("alice", **FULL)
    rotated, _ = store.rotate("alice")
    assert rotated == msgspec.structs.replace(made, hint=rotated.hint)


STATES = {
    "active": ({}, "active"),
    "its last moment": ({"expires_at": "2026-11-21T09:30:00.001Z"}, "active"),
    "expired": ({"expires_at": "2026-11-21T09:30:00.000Z"}, "expired"),
    "its first moment": ({"not_before": "2026-11-21T09:30:00.000Z"}, "active"),
    "not yet": ({"not_before": "2026-11-21T09:30:00.001Z"}, "not_yet_valid"),
    "disabled and expired": ({"disabled": True, "expires_at": "2026-11-21T09:30:00.000Z"}, "disabled"),
}


@pytest.mark.parametrize(("facts", "state"), STATES.values(), ids=STATES)
def test_states(facts: dict[str, Any], state: str) -> None:
    key = Key(id=1, name="a", hint="", created_at="", disabled=False, expires_at=None, models=())
    assert msgspec.structs.replace(key, **facts).state(iso(NOW)) == state


EXPIRIES = {
    "90d": "2027-02-19T09:30:00.000Z",
    "12h": "2026-11-21T21:30:00.000Z",
    "30m": "2026-11-21T10:00:00.000Z",
    "0d": "2026-11-21T09:30:00.000Z",
    "2027-01-31": "2027-02-01T00:00:00.000Z",
    "2028-02-28": "2028-02-29T00:00:00.000Z",
    "2027-01-31T18:00": "2027-01-31T18:00:00.000Z",
    "2027-01-31T18:00Z": "2027-01-31T18:00:00.000Z",
    "2027-01-31T18:00+02:00": "2027-01-31T16:00:00.000Z",
    "2027-01-31 18:00:00.5": "2027-01-31T18:00:00.500Z",
    "2027-01-31T18:00:00.123Z": "2027-01-31T18:00:00.123Z",
    "45s": "2026-11-21T09:30:45.000Z",
    "2027-01-31 18": "2027-01-31T18:00:00.000Z",
    "0999-01-01T00:00": "0999-01-01T00:00:00.000Z",
}


@pytest.mark.parametrize(("text", "expected"), EXPIRIES.items())
def test_parse_expiry(text: str, expected: str) -> None:
    assert parse_expiry(text, NOW) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    {**EXPIRIES, "2027-01-31": "2027-01-31T00:00:00.000Z", "2028-02-28": "2028-02-28T00:00:00.000Z"}.items(),
)
def test_starts(text: str, expected: str) -> None:
    assert parse_start(text, NOW) == expected


@pytest.mark.parametrize(
    "text", ["", "d", "90", "-1d", "90 d", "1y", "tomorrow", "2027-02-30", "31.1.2027", "9999-12-31"]
)
def test_expiries_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_expiry(text, NOW)


def test_several_processes_change_it_at_once(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gateway.keystore import KeyStore\n"
        f"store = KeyStore(Path({str(path)!r}))\n"
        "for number in range(30): store.create(f'{sys.argv[1]}-{number}')"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(number)], env={"PYTHONPATH": str(ADDON)})
        for number in range(4)
    ]
    assert [process.wait(30) for process in processes] == [0] * 4
    with closing(KeyStore(path)) as store:
        assert len(store.list()) == 120


def test_changes_of_several_processes_do_not_undo_each_other(path: Path) -> None:
    code = (
        "import sys, msgspec; from pathlib import Path; from gateway.keystore import Changes, KeyStore\n"
        "def more(limits): return msgspec.structs.replace(limits, rpm=limits.rpm + 1)\n"
        f"store = KeyStore(Path({str(path)!r}))\n"
        "for _ in range(25):\n"
        "    store.change('alice', lambda key: Changes(limits=more(key.limits)))\n"
        "    store.teams.change('lab', more, actor='')"
    )
    with closing(KeyStore(path)) as store:
        store.create("alice", limits=Limits(rpm=0))
        store.teams.create("lab", Limits(rpm=0), actor="x")
        processes = [subprocess.Popen([sys.executable, "-c", code], env={"PYTHONPATH": str(ADDON)}) for _ in range(3)]
        assert [process.wait(30) for process in processes] == [0] * 3
        assert store.get("alice").limits == store.teams.get("lab").limits == Limits(rpm=75)
        assert store.audit_total() == 2 + 150
