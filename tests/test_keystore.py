"""keys.db: a key's life, what lies on the disk, and that a change acts at the next look, whoever made it."""

import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from gateway import keystore
from gateway.keystore import Key, KeyProblem, KeyReader, KeyStore, KeysUnavailable, hash_key, parse_expiry

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


def in_another_process(path: Path, change: str) -> None:
    """Run `store.CHANGE` in a process of its own, as scripts/keys does."""
    code = f"from pathlib import Path; from gateway.keystore import KeyStore; KeyStore(Path({str(path)!r})).{change}"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ADDON)})


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


PROBLEMS = {
    "create, name taken": (lambda store: store.create("alice"), "is a key named 'alice' already"),
    "create, no name": (lambda store: store.create(" "), "no name for a key"),
    "create, a line end": (lambda store: store.create("a\nb"), "no name for a key"),
    "create, too long": (lambda store: store.create("x" * 201), "no name for a key"),
    "create, a broken pattern": (lambda store: store.create("b", models=("/(/",)), "no regular expression"),
    "create, a weight of 0": (lambda store: store.create("b", weight=0), "--weight: expected a number from 0.001"),
    "create, a weight below 0": (lambda store: store.create("b", weight=-1), "--weight: .* got -1"),
    "create, a weight beyond bounds": (lambda store: store.create("b", weight=1000.5), "--weight: .* to 1000"),
    "create, a weight without end": (lambda store: store.create("b", weight=float("inf")), "--weight: .* got inf"),
    "create, a weight that is none": (lambda store: store.create("b", weight=float("nan")), "--weight: .* got nan"),
    "create, an unknown priority": (
        lambda store: store.create("b", priority="highest"),
        "--priority: expected one of high, normal, low, got 'highest'",
    ),
    "limits, nothing given": (
        lambda store: store.set_limits("alice"),
        r"nothing to change: give --weight W, --priority high\|normal\|low, or both",
    ),
    "limits, no such key": (lambda store: store.set_limits("bob", weight=2), "no key named 'bob'"),
    "limits, one of two is wrong": (
        lambda store: store.set_limits("alice", weight=2, priority=""),
        "--priority: .* got ''",
    ),
    "limits, a weight of 0": (lambda store: store.set_limits("alice", weight=0, priority="low"), "--weight: .* got 0"),
    "get": (lambda store: store.get("bob"), "no key named 'bob'"),
    "rotate": (lambda store: store.rotate("bob"), "no key named 'bob'"),
    "disable": (lambda store: store.set_disabled("bob", True), "no key named 'bob'"),
    "revoke": (lambda store: store.revoke("bob"), "no key named 'bob'"),
}


@pytest.mark.parametrize(("call", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_problems(call: object, message: str, store: KeyStore) -> None:
    store.create("alice")
    before = store.list()
    assert callable(call)
    with pytest.raises(KeyProblem, match=message):
        call(store)
    assert store.list() == before


def test_limits_change_one_by_one_or_both(store: KeyStore, reader: KeyReader) -> None:
    made, key = store.create("alice", models=("m",), weight=0.5, priority="low")
    assert (made.weight, made.priority) == (0.5, "low")
    for weight, priority, expected in [
        (1000, None, (1000, "low")),
        (None, "high", (1000, "high")),
        (3, "normal", (3, "normal")),
    ]:
        changed = store.set_limits("alice", weight=weight, priority=priority)
        assert reader.find(key) == changed == msgspec.structs.replace(made, weight=expected[0], priority=expected[1])


def test_a_new_key_for_a_name_keeps_its_limits(store: KeyStore) -> None:
    store.create("alice", weight=4, priority="high")
    rotated, _ = store.rotate("alice")
    assert (rotated.weight, rotated.priority) == (4, "high")


def test_a_file_of_before_the_fair_queue(path: Path) -> None:
    """It migrates as it is opened, and its keys are the usual ones."""
    path.parent.mkdir()
    older = Migrations(keystore.migrations.name)
    older._migrations = keystore.migrations._migrations[:1]
    with closing(sqlite3.connect(path)) as db:
        older.apply(Database(db))
        db.execute("insert into keys (name, hash, hint, created_at) values ('alice', ?, '', '')", (hash_key("old"),))
        db.commit()
    with closing(KeyReader(path)) as reader:
        found = reader.find("old")
    assert found == Key(
        id=1, name="alice", hint="", created_at="", disabled=False, expires_at=None, models=(), weight=1,
        priority="normal",
    )  # fmt: skip


def test_a_change_of_another_process_acts_at_the_next_look(store: KeyStore, reader: KeyReader, path: Path) -> None:
    key = store.create("alice")[1]
    assert reader.find(key) is not None
    in_another_process(path, "set_disabled('alice', True)")
    found = reader.find(key)
    assert found
    assert found.disabled
    in_another_process(path, "revoke('alice')")
    assert reader.find(key) is None


def test_a_key_is_not_read_again_without_a_change(store: KeyStore, reader: KeyReader) -> None:
    key = store.create("alice")[1]
    assert reader.find(key) is reader.find(key)


def test_a_replaced_file_acts_at_the_next_look(store: KeyStore, reader: KeyReader, path: Path, tmp_path: Path) -> None:
    old = store.create("alice")[1]
    assert reader.find(old)
    with closing(KeyStore(tmp_path / "other.db")) as other:
        new = other.create("bob")[1]
    with closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("pragma journal_mode = delete")
    (tmp_path / "other.db").replace(path)
    for leftover in ("keys.db-wal", "keys.db-shm"):
        (path.parent / leftover).unlink(missing_ok=True)
    found = reader.find(new)
    assert found
    assert (reader.find(old), found.name) == (None, "bob")


def test_a_deleted_file_lets_nobody_in_until_it_is_back(store: KeyStore, reader: KeyReader, path: Path) -> None:
    key = store.create("alice")[1]
    assert reader.find(key)
    kept = path.rename(path.with_name("away"))
    for _ in range(2):
        with pytest.raises(KeysUnavailable):
            reader.find(key)
    assert not path.exists()
    kept.rename(path)
    assert reader.find(key)


def test_garbage_lets_nobody_in_until_it_is_mended(store: KeyStore, reader: KeyReader, path: Path) -> None:
    key = store.create("alice")[1]
    assert reader.find(key)
    with closing(sqlite3.connect(path)) as db:
        db.execute("pragma wal_checkpoint(truncate)")  # else SQLite mends the file from its journal
    kept = path.rename(path.with_name("away"))
    path.write_bytes(b"no database at all" * 100)
    for _ in range(2):
        with pytest.raises(KeysUnavailable):
            reader.find(key)
    path.unlink()
    kept.rename(path)
    assert reader.find(key)


@pytest.mark.parametrize("change", ["models = 'qwen'", "weight = 0", "weight = 'much'", "priority = 'highest'"])
def test_a_row_that_can_not_be_read_lets_nobody_in(change: str, store: KeyStore, reader: KeyReader, path: Path) -> None:
    key = store.create("alice")[1]
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"update keys set {change}")
    with pytest.raises(KeysUnavailable):
        reader.find(key)


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
}


@pytest.mark.parametrize(("text", "expected"), EXPIRIES.items())
def test_parse_expiry(text: str, expected: str) -> None:
    assert parse_expiry(text, NOW) == expected


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
