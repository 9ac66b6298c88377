"""Reading the config again, without a proxy: one at a time, all or nothing; what was made joins what is declared."""

import asyncio
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gateway import reloading
from gateway.changes import ReloadReport
from gateway.config import ConfigError, load
from gateway.keystore import KeyStore
from gateway.registry import Registry
from gateway.reloading import Reloader, read_first
from gateway.service import Service
from gateway.settings import Config, Server
from gateway.watch import FileWatch

NOWHERE = "http://127.0.0.1:1"


class Desk:
    """A config file, and the service and the reloader that it makes."""

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.path = folder / "config.yaml"
        self.keys_db = folder / "data" / "keys.db"
        self.applied: list[tuple[Config, Config]] = []
        if writes:
            self.write("a")
        file = FileWatch(self.path)
        first = read_first(self.path)
        self.service = Service(first.config, self.reload)
        self.reloader = Reloader(file, first, self.service, lambda *both: self.applied.append(both))

    def write(self, *names: str, **more: Any) -> None:
        servers = [{"name": name, "url": NOWHERE, "models": [f"model-{name}"]} for name in names]
        self.path.write_text(json.dumps({"servers": servers, **more}))

    def make(self, name: str) -> None:
        with closing(Registry(self.keys_db)) as registry:
            registry.create_server(Server(name, NOWHERE, models=("m",)), actor="test")

    async def reload(self, reason: str = "test") -> ReloadReport:
        return await self.reloader.reload(reason)

    @property
    def servers(self) -> list[str]:
        return [server.name for server in self.service.router.servers]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.service.close()


class SlowLoad:
    """Reading a file that goes on when it is told to. `begun`: how many have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.go_on = threading.Semaphore(0)
        monkeypatch.setattr("gateway.config.load", self._load)

    def _load(self, path: Path) -> Config:
        config = load(path)
        self.begun += 1
        assert self.go_on.acquire(timeout=10)
        return config

    async def until_begun(self, count: int) -> None:
        async with asyncio.timeout(10):
            while self.begun < count:
                await asyncio.sleep(0.001)


async def test_who_asks_while_one_runs_gets_the_next(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowLoad(monkeypatch)
    loop = asyncio.get_running_loop()
    first = loop.create_task(desk.reload())
    await slow.until_begun(1)
    desk.write("a", "b")  # too late for the first
    later = [loop.create_task(desk.reload()) for _ in range(3)]
    await asyncio.sleep(0)
    slow.go_on.release()
    assert (await first).changed == ()
    slow.go_on.release()
    reports = [await each for each in later]
    assert [report.changed for report in reports] == [("server b is new",)] * 3
    assert (slow.begun, desk.servers) == (2, ["a", "b"])


async def test_it_is_applied_with_both_configs(desk: Desk) -> None:
    before = desk.service.config
    desk.write("b")
    report = await desk.reload()
    assert (report.ok, report.problem, report.changed) == (True, None, ("server a is gone", "server b is new"))
    assert desk.applied == [(before, desk.service.config)]
    assert desk.service.report == report


class Broken(RuntimeError):
    """A fault of the test's."""


STEPS = ("upstream_tls.check", "read_made", "merge")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "error", [Broken("sk-secret"), OSError("no such disk"), ConfigError("servers: wrong")], ids=type
)
async def test_what_fails_changes_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    before = desk.service.config
    desk.write("b")
    monkeypatch.setattr(f"gateway.reloading.{step}", fail)
    report = await desk.reload()
    said = "the gateway failed; its log says how" if isinstance(error, Broken) else str(error)
    assert not report.ok
    assert str(report.problem).removeprefix("config.yaml: ") == said
    assert (desk.servers, desk.service.config, desk.applied) == (["a"], before, [])
    monkeypatch.undo()
    assert (await desk.reload()).ok
    assert desk.servers == ["b"]


async def test_what_was_made_joins_a_file_that_was_good_last(desk: Desk) -> None:
    desk.make("made")
    desk.path.write_text("servers: [")
    report = await desk.reload()
    assert (report.ok, report.changed) == (False, ("server made is new",))
    assert desk.servers == ["a", "made"]
    desk.write("made", "b")
    report = await desk.reload()
    assert (report.ok, desk.servers) == (True, ["made", "b"])
    assert desk.service.router.servers[0].models == ("model-made",), "the file does not win"


async def test_what_takes_a_restart_stays(desk: Desk) -> None:
    data = desk.service.config.data
    desk.write("a", data="elsewhere", drain_s=7, default_model="model-a")
    report = await desk.reload()
    assert (report.ok, report.changed, report.needs_restart) == (True, ("default_model",), ("data", "drain_s"))
    assert (desk.service.config.data, desk.service.config.default_model) == (data, "model-a")


async def test_a_keys_db_that_is_gone_is_not_made_again(desk: Desk) -> None:
    """An empty one in its place would drop what the admin API made."""
    desk.make("made")
    assert (await desk.reload()).changed == ("server made is new",)
    away = desk.keys_db.rename(desk.keys_db.with_name("away"))
    desk.write("b")
    report = await desk.reload()
    assert (report.ok, desk.servers, desk.keys_db.exists()) == (False, ["a", "made"], False)
    assert "data/keys.db" in str(report.problem)
    away.rename(desk.keys_db)
    assert (await desk.reload()).ok
    assert desk.servers == ["b", "made"]


def break_rows(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("update servers set settings = 'xx'")


async def test_a_row_that_can_not_be_read_is_told_once(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.make("made")
    await desk.reload()
    break_rows(desk.keys_db)
    caplog.clear()
    assert [await desk.reloader._reason() for _ in range(5)] == [None] * 5
    (told,) = [each for each in caplog.records if each.name == "gateway.reloading"]
    assert (told.levelname, told.exc_info) == ("ERROR", None)
    assert "keys.db: can't be understood" in told.getMessage()
    report = await desk.reload()
    assert (report.ok, desk.servers) == (False, ["a", "made"])


class HangingLook:
    """A look at the file that does not end before it is told to."""

    def __init__(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.go_on = threading.Event()
        monkeypatch.setattr(desk.reloader._file, "has_changed", self._has_changed)
        monkeypatch.setattr(reloading, "POLL_S", 0.01)

    def _has_changed(self) -> bool:
        self.begun += 1
        assert self.go_on.wait(10)
        return True


async def test_a_look_that_hangs_is_the_only_one(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    look = HangingLook(desk, monkeypatch)
    assert [await desk.reloader._reason() for _ in range(3)] == [None] * 3
    desk.reloader.hang_up()
    assert await desk.reloader._reason() == "SIGHUP"
    assert await desk.reloader._reason() is None
    assert look.begun == 1
    look.go_on.set()
    async with asyncio.timeout(10):
        while (reason := await desk.reloader._reason()) is None:
            pass
    assert (reason, look.begun) == ("its file has changed", 1)


async def test_a_reading_that_hangs_is_the_only_one(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowLoad(monkeypatch)
    monkeypatch.setattr(reloading, "READ_TIMEOUT_S", 0.01)
    assert [(await desk.reload()).problem for _ in range(3)] == [
        "TimeoutError",
        *["the reading before this one has not come to an end: a file system hangs"] * 2,
    ]
    await slow.until_begun(1)
    slow.go_on.release()
    assert slow.begun == 1


def audited(desk: Desk) -> list[tuple[str, ...]]:
    with closing(KeyStore(desk.keys_db)) as store:
        return [(each.actor, each.action, each.kind, each.name, str(each.detail)) for each in store.audit(100)]


async def test_the_audit_tells_of_it(desk: Desk) -> None:
    """Names, and no value; of two workers that read the same file, one row."""
    secret = "sk-0123456789"
    auth = {"sources": [{"type": "local"}, {"type": "static", "keys": [{"name": "bob", "key": secret}]}]}
    desk.write("a", teams={"lab": {"rpm": 4711}}, limits={"all": {"rpm": 4711}}, auth=auth)
    other = Desk(desk.path.parent, writes=False)
    other.reloader._declared = desk.reloader._declared
    for each in (desk, other):
        assert (await each.reload("SIGHUP")).ok
    assert (await desk.reload("again")).ok
    (row,) = audited(desk)
    assert row[:4] == ("config file (SIGHUP)", "reload", "config", "config file")
    assert "['auth.sources[1]', 'limits.all.rpm', 'teams.lab']" in row[4]
    assert "4711" not in row[4]
    assert secret not in row[4]
    desk.write("b")
    assert (await desk.reload()).ok
    assert len(audited(desk)) == 2
    other.service.close()


async def test_an_audit_that_can_not_be_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no such disk")

    monkeypatch.setattr(reloading, "record_reload", fail)
    desk.write("b")
    assert (await desk.reload()).ok
    assert "the audit does not tell of this change of the config: no such disk" in caplog.text


def test_what_was_made_and_is_wrong_now_is_no_reason_not_to_start(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConfigError("servers[1]: wrong")

    desk.make("made")
    assert [server.name for server in read_first(desk.path).config.servers] == ["a", "made"]
    monkeypatch.setattr(reloading, "merge", fail)
    assert [server.name for server in read_first(desk.path).config.servers] == ["a"]
