"""The proxy's view of keys.db: a change acts at the next look, whoever made it; what can't be read lets nobody in."""

import fcntl
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from gateway.keys import iso
from gateway.keys_schema import migrations
from gateway.keystore import Changes, Key, KeyReader, KeyStore, KeysUnavailable, Team, hash_key
from gateway.limits import Budget, Limits
from gateway.registry import Registry

ADDON = Path(__file__).parents[1] / "addon"
NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def utc_now(self) -> str:
        return iso(self.now)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "keys.db"


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[KeyStore]:
    with closing(KeyStore(path, lambda: clock.now)) as store:
        yield store


@pytest.fixture
def reader(store: KeyStore, path: Path, clock: Clock) -> Iterator[KeyReader]:
    with closing(KeyReader(path, clock.utc_now)) as reader:
        yield reader


def in_another_process(path: Path, change: str) -> None:
    """Run `store.CHANGE` in a process of its own, as scripts/keys does."""
    code = f"from pathlib import Path; from gateway.keystore import KeyStore; KeyStore(Path({str(path)!r})).{change}"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ADDON)})


SCHEMAS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "m001": (1, "(hash, name, hint, created_at, models) values (?, 'alice', 'sk-', '', '[\"m\"]')", {}),
    "m002": (
        2,
        "(hash, name, hint, created_at, models, weight, priority) values (?, 'alice', 'sk-', '', '[\"m\"]', 3, 'low')",
        {"weight": 3.0, "priority": "low"},
    ),
}


@pytest.mark.parametrize(("applied", "row", "more"), SCHEMAS.values(), ids=SCHEMAS)
def test_a_file_of_before(applied: int, row: str, more: dict[str, Any], path: Path) -> None:
    """It migrates as it is opened; its keys go on working, and what they had not is the usual."""
    path.parent.mkdir()
    older = Migrations(migrations.name)
    older._migrations = migrations._migrations[:applied]
    with closing(sqlite3.connect(path)) as db:
        older.apply(Database(db))
        db.execute(f"insert into keys {row}", [hash_key("old")])
        db.commit()
    with closing(KeyReader(path)) as reader:
        found = reader.find("old")
    plain = Key(id=1, name="alice", hint="sk-", created_at="", disabled=False, expires_at=None, models=("m",))
    assert found == msgspec.structs.replace(plain, **more)
    with closing(KeyStore(path)) as store:
        _, new = store.rotate("alice", 60)
        with closing(KeyReader(path)) as reader:
            assert reader.find("old") == reader.find(new) == store.get("alice")


OVERLAPS = {
    "none": (0, [False, False, False]),
    "a minute": (60, [True, True, False]),
    "a part": (0.5, [True, False, False]),
}


@pytest.mark.parametrize(("overlap_s", "works"), OVERLAPS.values(), ids=OVERLAPS)
def test_a_rotated_key_works_until_its_overlap_is_over(
    overlap_s: float, works: list[bool], store: KeyStore, reader: KeyReader, clock: Clock
) -> None:
    old = store.create("alice")[1]
    rotated, new = store.rotate("alice", overlap_s)
    assert rotated == store.get("alice")
    seen = []
    for after_s in (0, 59.999, 60):
        clock.now = NOW + timedelta(seconds=after_s)
        seen.append(reader.find(old) == rotated)
        assert reader.find(new) == rotated
    assert seen == works


CHANGES: dict[str, tuple[Callable[[KeyStore], object], bool]] = {
    "rotated again, with an overlap": (lambda store: store.rotate("alice", 60), False),
    "rotated again, without": (lambda store: store.rotate("alice"), False),
    "revoked": (lambda store: store.revoke("alice"), False),
    "renamed": (lambda store: store.change("alice", Changes(name="bob")), True),
}


@pytest.mark.parametrize(("change", "is_found"), CHANGES.values(), ids=CHANGES)
def test_what_becomes_of_the_old_key(
    change: Callable[[KeyStore], object], is_found: bool, store: KeyStore, reader: KeyReader
) -> None:
    old = store.create("alice")[1]
    store.rotate("alice", 60)
    change(store)
    assert (reader.find(old) is not None) == is_found


def test_the_old_key_is_disabled_with_the_new_one(store: KeyStore, reader: KeyReader) -> None:
    old = store.create("alice")[1]
    _, new = store.rotate("alice", 60)
    disabled = store.set_disabled("alice", True)
    assert reader.find(old) == reader.find(new) == disabled
    assert disabled.disabled


def test_teams_are_as_the_file_says(store: KeyStore, reader: KeyReader) -> None:
    assert reader.team("lab") is None
    store.teams.create("lab", Limits(rpm=5), actor="x")
    assert reader.team("lab") == Team(1, "lab", Limits(rpm=5), iso(NOW))
    assert reader.team("lab") is reader.team("lab")
    store.teams.change("lab", Limits(budgets=(Budget("day", money=2.5),)), actor="x")
    assert reader.team("lab") == Team(1, "lab", Limits(budgets=(Budget("day", money=2.5),)), iso(NOW))
    store.teams.delete("lab", actor="x")
    assert reader.team("lab") is None


def write(path: Path, sql: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(sql)


WRITES: dict[str, Callable[[KeyStore, Path], object]] = {
    "a key": lambda store, _: store.set_disabled("alice", True),
    "a team": lambda store, _: store.teams.create("lab", actor="x"),
    "a server": lambda _, path: write(path, "insert into servers (name, created_at) values ('gpu', '')"),
    "an alias": lambda _, path: write(path, "insert into aliases (name, created_at) values ('fast', '')"),
}


@pytest.mark.parametrize("change", WRITES.values(), ids=WRITES)
def test_the_version_changes_with_any_table(
    change: Callable[[KeyStore, Path], object], store: KeyStore, reader: KeyReader, path: Path
) -> None:
    store.create("alice")
    before = reader.version
    assert reader.version == before
    change(store, path)
    after = reader.version
    assert after != before
    assert reader.version == after


EMPTIES: dict[str, Callable[[KeyStore, Path], object]] = {
    "a key": lambda store, _: store.rotate("alice"),
    "a team": lambda store, _: store.teams.create("lab", actor="x"),
    "an alias": lambda _, path: in_another_registry(path),
}


def in_another_registry(path: Path) -> None:
    with closing(Registry(path)) as registry:
        registry.create_alias("fast", "m", actor="x")


@pytest.mark.parametrize("change", EMPTIES.values(), ids=EMPTIES)
def test_a_change_is_in_the_file_itself(
    change: Callable[[KeyStore, Path], object], store: KeyStore, reader: KeyReader, path: Path
) -> None:
    key = store.create("alice")[1]
    assert reader.find(key)
    change(store, path)
    assert path.with_name("keys.db-wal").stat().st_size == 0


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
        with pytest.raises(KeysUnavailable):
            assert reader.version
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


@pytest.mark.parametrize(
    "limits", ["", "[]", '{"rpm": "5"}', '{"rpm": -1}', '{"rmp": 5}', '{"budgets": [{"per": "day"}]}']
)
def test_limits_that_can_not_be_read_let_nobody_in(limits: str, store: KeyStore, reader: KeyReader, path: Path) -> None:
    key = store.create("alice", team="lab")[1]
    store.teams.create("lab", actor="x")
    for table in ("keys", "teams"):
        write(path, f"update {table} set limits = '{limits}'")
    with pytest.raises(KeysUnavailable):
        reader.find(key)
    with pytest.raises(KeysUnavailable):
        reader.team("lab")


def another_file(folder: Path) -> tuple[Path, str]:
    """A copy of some other keys.db, and its one key."""
    with closing(KeyStore(folder / "other.db")) as other:
        return folder / "other.db", other.create("bob")[1]


def test_a_copy_beside_the_changes_of_the_one_before_lets_nobody_in(
    store: KeyStore, reader: KeyReader, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite would play them back into it, and what was revoked in the copy would live on."""
    old = store.create("alice")[1]
    copy, new = another_file(tmp_path)
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("insert into aliases (name, created_at) values ('fast', '')")
        writer.commit()
        assert path.with_name("keys.db-wal").stat().st_size > 0
        copy.replace(path)
        for key in (old, new, old):
            with pytest.raises(KeysUnavailable, match="was replaced beside"):
                reader.find(key)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    for leftover in ("keys.db-wal", "keys.db-shm"):
        path.with_name(leftover).unlink()
    assert reader.find(old) is None
    assert reader.find(new)


def test_a_copy_put_in_place_is_what_it_was(store: KeyStore, reader: KeyReader, path: Path, tmp_path: Path) -> None:
    """A change that is done is in the file itself: nothing of it is left to be played back."""
    old = store.create("alice")[1]
    assert reader.find(old)
    copy, new = another_file(tmp_path)
    copy.replace(path)
    assert reader.find(old) is None
    assert reader.find(new)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("pragma integrity_check").fetchall() == [("ok",)]


def test_it_does_not_wait_for_those_who_open_the_file(
    store: KeyStore, reader: KeyReader, path: Path, tmp_path: Path
) -> None:
    copy, new = another_file(tmp_path)
    with path.with_name("keys.db.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copy.replace(path)
        assert reader.find(new)


def test_a_locked_file_lets_nobody_in_until_it_is_free(
    store: KeyStore, reader: KeyReader, path: Path, tmp_path: Path
) -> None:
    copy, new = another_file(tmp_path)
    with closing(sqlite3.connect(copy, isolation_level=None)) as other:
        other.execute("pragma journal_mode = delete")
        other.execute("begin exclusive")
        copy.replace(path)
        with pytest.raises(KeysUnavailable, match="locked"):
            reader.find(new)
    assert reader.find(new)


def test_a_file_of_before_that_is_put_in_place(store: KeyStore, reader: KeyReader, path: Path, tmp_path: Path) -> None:
    """The reader can't bring it up to date, which may take its time; whoever opens it next does."""
    older = Migrations(migrations.name)
    older._migrations = migrations._migrations[:1]
    with closing(sqlite3.connect(tmp_path / "older.db")) as db:
        older.apply(Database(db))
        db.execute("insert into keys (hash, name, hint, created_at) values (?, 'bob', 'sk-', '')", [hash_key("old")])
        db.commit()
    (tmp_path / "older.db").replace(path)
    with pytest.raises(KeysUnavailable, match="scripts/keys list"):
        reader.find("old")
    KeyStore(path).close()
    assert reader.find("old")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["a folder", "a pipe"])
def test_what_is_no_file_lets_nobody_in(
    make: Callable[[Path], None], store: KeyStore, reader: KeyReader, path: Path
) -> None:
    key = store.create("alice")[1]
    kept = path.rename(path.with_name("away"))
    make(path)
    with pytest.raises(KeysUnavailable, match="is no file"):
        reader.find(key)
    with pytest.raises(OSError, match="is no file"):
        KeyStore(path)
    path.rmdir() if path.is_dir() else path.unlink()
    kept.rename(path)
    assert reader.find(key)


def test_who_may_not_make_the_file(tmp_path: Path) -> None:
    for opens in (KeyStore, Registry):
        with pytest.raises(FileNotFoundError):
            opens(tmp_path / "keys.db", create=False)
    assert [*tmp_path.iterdir()] == []
