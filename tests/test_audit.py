"""Each change leaves one row in its own transaction: who, what, from what to what; and no secret."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway import audit
from gateway.audit import Difference, Entry
from gateway.keystore import Changes, KeyProblem, KeyStore
from gateway.limits import Limits

NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
AT = "2026-11-21T09:30:00.000Z"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def store(path: Path) -> Iterator[KeyStore]:
    with closing(KeyStore(path, lambda: NOW)) as store:
        store.create("alice", models=("m",), limits=Limits(rpm=5), actor="maker")
        store.teams.create("lab", Limits(tpm=7), actor="maker")
        yield store


CHANGES: dict[str, tuple[Callable[[KeyStore], object], str, str, dict[str, Difference]]] = {
    "disable": (
        lambda store: store.set_disabled("alice", True, actor="me"),
        "disable",
        "key alice",
        {"disabled": Difference(False, True)},
    ),
    "enable what is enabled": (lambda store: store.set_disabled("alice", False, actor="me"), "enable", "key alice", {}),
    "change": (
        lambda store: store.change("alice", Changes(weight=2, team="lab", limits=Limits()), actor="me"),
        "change",
        "key alice",
        {"weight": Difference(1, 2), "team": Difference(None, "lab"), "limits": Difference({"rpm": 5}, {})},
    ),
    "rename": (
        lambda store: store.change(1, Changes(name="bob"), actor="me"),
        "change",
        "key alice",
        {"name": Difference("alice", "bob")},
    ),
    "change a team": (
        lambda store: store.teams.change("lab", Limits(rpm=1), actor="me"),
        "change",
        "team lab",
        {"limits": Difference({"tpm": 7}, {"rpm": 1})},
    ),
    "delete a team": (
        lambda store: store.teams.delete("lab", actor="me"),
        "delete",
        "team lab",
        {"name": Difference("lab", None), "limits": Difference({"tpm": 7}, None)},
    ),
}


@pytest.mark.parametrize(("change", "action", "what", "detail"), CHANGES.values(), ids=CHANGES)
def test_changes(
    change: Callable[[KeyStore], object], action: str, what: str, detail: dict[str, Difference], store: KeyStore
) -> None:
    before = store.audit(10)
    change(store)
    kind, _, name = what.partition(" ")
    assert store.audit(10) == [Entry(3, AT, "me", action, kind, name, detail), *before]


def test_a_keys_whole_life(store: KeyStore) -> None:
    made = store.get("alice")
    rotated, _ = store.rotate("alice", 60, actor="me")
    store.revoke("alice", actor="me")
    revoked, rotation, _, creation = store.audit(10)
    facts = {
        "id": 1, "name": "alice", "models": ["m"], "weight": 1, "priority": "normal", "limits": {"rpm": 5},
    }  # fmt: skip
    assert creation == Entry(
        1, AT, "maker", "create", "key", "alice",
        {field: Difference(None, value) for field, value in {**facts, "hint": made.hint}.items()},
    )  # fmt: skip
    until = "2026-11-21T09:31:00.000Z"
    assert rotation == Entry(
        3, AT, "me", "rotate", "key", "alice",
        {"hint": Difference(made.hint, rotated.hint), "old_until": Difference(None, until)},
    )  # fmt: skip
    facts |= {"hint": rotated.hint, "old_until": until}
    assert revoked == Entry(
        4, AT, "me", "revoke", "key", "alice", {field: Difference(value, None) for field, value in facts.items()}
    )  # fmt: skip


def test_no_secret_is_in_it(store: KeyStore, path: Path) -> None:
    keys = [store.create("bob")[1], store.rotate("bob", 60)[1], store.rotate("bob")[1]]
    with closing(sqlite3.connect(path)) as db:
        text = str(db.execute("select * from audit").fetchall())
        hashes = [value for (value,) in db.execute("select hash from keys")]
    assert "bob" in text
    assert not [secret for secret in (*keys, *(key[7:-4] for key in keys), *hashes) if secret in text]


def test_pages_from_the_newest_on(store: KeyStore) -> None:
    for number in range(5):
        store.create(f"key-{number}")
    assert [entry.name for entry in store.audit(3)] == ["key-4", "key-3", "key-2"]
    assert [entry.name for entry in store.audit(3, 3)] == ["key-1", "key-0", "lab"]
    assert (store.audit(3, 7), store.audit_total()) == ([], 7)


def test_a_failed_change_leaves_no_row_and_a_failed_row_no_change(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyProblem):
        store.create("alice")
    assert store.audit_total() == 2

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(audit, "record", full)
    before = (store.list(), store.teams.list())
    for change in (
        lambda: store.create("bob"),
        lambda: store.rotate("alice"),
        lambda: store.revoke("alice"),
        lambda: store.set_disabled("alice", True),
        lambda: store.teams.create("x", actor="me"),
        lambda: store.teams.change("lab", Limits(), actor="me"),
        lambda: store.teams.delete("lab", actor="me"),
    ):
        with pytest.raises(sqlite3.OperationalError):
            change()
    assert (store.list(), store.teams.list()) == before
