"""Keys in a file: read again when it changes, and what is no list of keys changes nothing."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.keys import hash_key
from gateway.secret import Secret
from gateway.sources import listed
from gateway.sources.listed import FileKeys
from gateway.sources.source import Asked
from gateway.yaml_text import ConfigError
from waiting import eventually


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed, "POLL_S", 0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "keys.yaml").write_text("- {name: alice, key: sk-1}\n- {name: bob, key: '${BOB}', expires: 2100-01-31}")
    return tmp_path / "keys.yaml"


@pytest.fixture
def source(path: Path) -> Iterator[FileKeys]:
    source = FileKeys(path, "file", {"BOB": "sk-2"})
    source.start()
    yield source
    source.close()


def find(source: FileKeys, key: str) -> str | None:
    """The key's name. Decided at once: nothing is waited for."""
    asked = source.find(Asked(Secret(key), hash_key(key), ""))
    try:
        asked.send(None)
    except StopIteration as end:
        return end.value.name if end.value else None
    raise AssertionError("it waits")


def test_what_it_knows(source: FileKeys) -> None:
    assert [find(source, key) for key in ("sk-1", "sk-2", "sk-3")] == ["alice", "bob", None]


def test_a_changed_file(source: FileKeys, path: Path) -> None:
    assert find(source, "sk-1") == "alice"
    path.write_text(json.dumps({"keys": [{"name": "carol", "sha256": hash_key("sk-3")}]}))
    eventually(lambda: find(source, "sk-3") == "carol")
    assert find(source, "sk-1") is None
    path.write_text("[]")
    eventually(lambda: find(source, "sk-3") is None)


BAD = {
    "no YAML": ("[", "is not YAML"),
    "nothing": ("", "Expected `object`"),
    "an unknown field": ("- {name: a, key: b, rmp: 5}", "rmp"),
    "a wrong limit": ("- {name: a, key: b, limits: {rpm: -1}}", "limits.rpm"),
    "no models": ("- {name: a, key: b, models: []}", "keys[0].models: expected one at least"),
    "no key": ("- {name: a}", "keys[0]"),
    "an unset variable": ("- {name: a, key: '${NO}'}", "NO"),
    "very deep": ("[" * 5000, ""),
    "no text": ("\udcff", ""),
}


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD)
def test_a_bad_file_changes_nothing_and_is_told_once(
    source: FileKeys, path: Path, text: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = path.read_bytes()
    assert find(source, "sk-1") == "alice"
    with caplog.at_level(logging.INFO):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        eventually(lambda: caplog.messages, "its report")
        assert find(source, "sk-1") == "alice"
        assert caplog.messages[0].startswith("key source file keeps the keys it has: ")
        assert expected in caplog.messages[0]
        path.write_bytes(good + b"\n- {name: carol, key: sk-3}")
        eventually(lambda: find(source, "sk-3") == "carol")
        eventually(lambda: len(caplog.messages) > 1)
    assert [message.split(":")[0] for message in caplog.messages] == [
        "key source file keeps the keys it has",
        f"key source file has read {path} again",
    ]


def test_a_file_that_is_gone_changes_nothing(source: FileKeys, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find(source, "sk-1") == "alice"
    path.unlink()
    eventually(lambda: "can't be read" in caplog.text)
    assert find(source, "sk-1") == "alice"


def test_a_fault_does_not_end_its_thread(
    source: FileKeys, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("sk-1")

    with monkeypatch.context() as patch:
        patch.setattr(listed, "static_keys", fail)
        path.write_text("- {name: carol, key: sk-3}")
        eventually(lambda: caplog.messages)
    assert caplog.messages[0] == "key source file keeps the keys it has: a fault: RuntimeError"
    eventually(lambda: find(source, "sk-3") == "carol")


def test_a_bad_file_at_the_start(path: Path) -> None:
    path.write_text("- {name: a}")
    with pytest.raises(ConfigError, match=r"keys\.yaml: keys\[0\]"):
        FileKeys(path, "file", {})


def test_closing_ends_its_thread(source: FileKeys) -> None:
    find(source, "sk-1")
    watcher = source._watcher
    assert watcher
    source.close()
    eventually(lambda: not watcher.is_alive())
