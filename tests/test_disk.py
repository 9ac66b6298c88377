"""The disk fails: what can't be booked is refused, what runs settles when the disk is back, and nothing is lost."""

import contextlib
import json
import os
import resource
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from conftest import StartProxy
from proxy import Key, Proxy
from upstream import OK, STALL, Step, Upstream, chunk, head
from waiting import eventually

TIMEOUT_S = 15
CHAT = "/v1/chat/completions"
EVENT = 'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
LAST = 'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
STREAM: list[Step] = [
    head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked"),
    chunk(EVENT),
    STALL,
    chunk(LAST),
    chunk("data: [DONE]\n\n"),
    chunk(b""),
]
ANSWER: list[Step] = [OK[:-10], STALL, OK[-10:]]
RUNNING: dict[str, list[Step]] = {"stream": STREAM, "answer": ANSWER}

type Break = Callable[[Proxy], contextlib.AbstractContextManager[None]]


@contextmanager
def locked(proxy: Proxy) -> Iterator[None]:
    """Another process holds usage.db's lock."""
    with closing(sqlite3.connect(proxy.usage_db, isolation_level=None)) as db:
        db.execute("begin immediate")
        yield
        db.execute("rollback")


@contextmanager
def file_limit(proxy: Proxy) -> Iterator[None]:
    """No file of the proxy may grow: what a full quota looks like. Its log is such a file, too."""
    limits = resource.prlimit(proxy.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(proxy.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
    yield
    resource.prlimit(proxy.pid, resource.RLIMIT_FSIZE, limits)


@contextmanager
def disk_full(proxy: Proxy) -> Iterator[None]:
    """The file system of the data folder has no byte left."""
    filler = proxy.usage_db.with_name("filler")
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    yield
    filler.unlink()


BREAKS: dict[str, Break] = {"locked": locked, "file limit": file_limit, "disk full": disk_full}


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "llmproxy-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Rig:
    def __init__(self, proxy: Proxy, upstream: Upstream) -> None:
        self.proxy = proxy
        self.upstream = upstream
        self.key: Key = proxy.create_key("alice")
        self.pool = ThreadPoolExecutor()

    def ask(self, name: str) -> tuple[int, bytes]:
        """Status and body. An answer that is cut has no status: 0."""
        body = json.dumps({"model": "tiny", "stream": name == "stream", "messages": []})
        headers = {**self.key.headers, "x-request-id": name, "content-type": "application/json"}
        with closing(HTTPConnection("127.0.0.1", self.proxy.port, timeout=TIMEOUT_S)) as connection:
            try:
                connection.request("POST", CHAT, body, headers)
                response = connection.getresponse()
                return response.status, response.read()
            except TimeoutError:
                raise
            except (OSError, HTTPException):
                return 0, b""

    def begin(self) -> dict[str, "Future[tuple[int, bytes]]"]:
        """A stream and an answer that lack their end, and whose open rows are on disk."""
        asking = {}
        for name, steps in RUNNING.items():
            self.upstream.plan(steps)
            asking[name] = self.pool.submit(self.ask, name)
            self.upstream.wait_stalled(len(asking))
        self.proxy.wait_rows(len(asking), settled=False)
        return asking

    def refused(self) -> tuple[int, str]:
        status, body = self.ask("refused")
        return status, json.loads(body)["error"]["code"]

    def outcomes(self) -> dict[str, str]:
        return {row["client_request_id"]: row["outcome"] for row in self.proxy.rows()}


@pytest.fixture
def start_rig(start_proxy: StartProxy, upstream: Upstream) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def start(**more: Any) -> Rig:
        proxy = start_proxy([{"name": "a", "url": upstream.url, "models": ["tiny"]}], allow_errors=True, **more)
        rigs.append(Rig(proxy, upstream))
        return rigs[-1]

    yield start
    for rig in rigs:
        rig.proxy.kill()
        rig.pool.shutdown()


@pytest.mark.parametrize("cause", BREAKS)
def test_refused_then_settled(start_rig: Callable[..., Rig], tmp_path: Path, cause: str) -> None:
    with contextlib.ExitStack() as stack:
        data = tmp_path / "disk"
        if cause == "disk full":
            stack.enter_context(small_disk(data))
        rig = start_rig(data=str(data))
        rig.proxy.usage_db = data / "usage.db"
        asking = rig.begin()
        with BREAKS[cause](rig.proxy):
            rig.upstream.release()
            eventually(lambda: not rig.proxy.healthy(), "that /health tells it")
            served = len(rig.upstream.asked)
            assert [rig.refused() for _ in range(3)] == [(503, "ledger_unavailable")] * 3
            assert len(rig.upstream.asked) == served
            # The server has long said all. Nobody has the end of it.
            assert [name for name, asked in asking.items() if asked.done()] == []
        assert asking["stream"].result() == (200, (EVENT + LAST + "data: [DONE]\n\n").encode())
        assert asking["answer"].result() == (200, OK.partition(b"\r\n\r\n")[2])
        eventually(rig.proxy.healthy, "that /health is well again")
        assert rig.ask("after")[0] == 200
        eventually(lambda: "refused" in rig.outcomes(), "the refused rows")
        rows = sorted((row["client_request_id"], row["outcome"]) for row in rig.proxy.wait_rows(6))
        assert rows == [("after", "ok"), ("answer", "ok"), *[("refused", "refused")] * 3, ("stream", "ok")]
        rig.proxy.stop()


@pytest.mark.parametrize("ended", [True, False], ids=["answers have ended", "answers go on"])
def test_sigterm_while_rows_cant_be_written(start_rig: Callable[..., Rig], ended: bool) -> None:
    """It ends all the same, and what it could not book it says."""
    rig = start_rig(drain_s=1)
    asking = rig.begin()
    with locked(rig.proxy):
        if ended:
            rig.upstream.release()
            eventually(lambda: not rig.proxy.healthy(), "that /health tells it")
        assert rig.proxy.stop() == 0
        assert [asked.result() for asked in asking.values()] == [(0, b"")] * 2
    assert "LOST" in rig.proxy.log()
    rig.proxy.start()
    assert rig.outcomes() == {"stream": "interrupted", "answer": "interrupted"}


def test_deleted_while_running(start_rig: Callable[..., Rig]) -> None:
    rig = start_rig()
    asking = rig.begin()
    for file in rig.proxy.usage_db.parent.glob("usage.db*"):
        file.unlink()
    rig.upstream.release()
    assert [asked.result()[0] for asked in asking.values()] == [200, 200]
    assert rig.outcomes() == {"stream": "ok", "answer": "ok"}
    assert rig.ask("after")[0] == 200
    assert rig.outcomes() == {"stream": "ok", "answer": "ok", "after": "ok"}


def test_data_folder_deleted_while_running(start_rig: Callable[..., Rig]) -> None:
    """With keys.db gone nobody comes in any more; those inside settle."""
    rig = start_rig()
    asking = rig.begin()
    shutil.rmtree(rig.proxy.usage_db.parent)
    rig.upstream.release()
    assert [asked.result()[0] for asked in asking.values()] == [200, 200]
    assert rig.outcomes() == {"stream": "ok", "answer": "ok"}
    assert rig.ask("after")[0] in (401, 503)


def test_overwritten_while_running(start_rig: Callable[..., Rig]) -> None:
    """A damaged file takes no rows. No answer ends without one, and no request is served unbooked."""
    rig = start_rig()
    asking = rig.begin()
    with closing(sqlite3.connect(rig.proxy.usage_db)) as db:
        db.execute("pragma wal_checkpoint(truncate)")
    with rig.proxy.usage_db.open("r+b") as file:
        file.write(b"this is no database any more " * 1000)
    rig.upstream.release()
    eventually(lambda: not rig.proxy.healthy() or all(a.done() for a in asking.values()), "the trouble")
    served = len(rig.upstream.asked)
    ended = [name for name, asked in asking.items() if asked.done() and asked.result()[0] == 200]
    status, _ = rig.ask("after")
    assert ended == []
    assert status == 503
    assert len(rig.upstream.asked) == served


def test_started_without_a_way_to_write(start_proxy: StartProxy, upstream: Upstream, tmp_path: Path) -> None:
    """It says what is wrong in a line, and does not listen."""
    (tmp_path / "data").write_text("a file where a folder should be")
    servers = [{"name": "a", "url": upstream.url}]
    proxy = start_proxy(servers, start=False, allow_errors=True, data=str(tmp_path / "data"))
    proxy.launch()
    assert proxy.wait(TIMEOUT_S) != 0
    assert str(tmp_path / "data") in proxy.log()


def test_started_with_a_file_that_is_no_database(start_proxy: StartProxy, upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "usage.db").write_bytes(b"this is no database " * 1000)
    proxy = start_proxy([{"name": "a", "url": upstream.url}], start=False, allow_errors=True, data=str(tmp_path))
    proxy.launch()
    assert proxy.wait(TIMEOUT_S) != 0
    assert "usage.db" in proxy.log()
