"""The entry script touched, broken, deleted while streams run: what can't be served is refused, never let through.

mitmproxy watches the entry script and loads it again; the package behind it stays as it is.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

import pytest

from conftest import StartProxy
from proxy import ROOT, Key, Proxy
from upstream import OK, STALL, Step, Upstream, chunk, head
from waiting import eventually

TIMEOUT_S = 20
CHAT = "/v1/chat/completions"
GOOD = (
    f"import sys\n\nsys.path.insert(0, {str(ROOT / 'addon')!r})\n\n"
    "from gateway.hooks import Gateway\n\naddons = [Gateway()]\n"
)
EVENT = 'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
LAST = 'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
HEAD = head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
HELD_STREAM: list[Step] = [HEAD, chunk(EVENT), STALL, chunk(LAST), chunk("data: [DONE]\n\n"), chunk(b"")]
HELD_ANSWER: list[Step] = [OK[:-10], STALL, OK[-10:]]


class Rig:
    def __init__(self, start_proxy: StartProxy, upstream: Upstream, folder: Path) -> None:
        self.upstream = upstream
        self.entry = folder / "entry.py"
        self.entry.write_text(GOOD)
        servers = [{"name": "a", "url": upstream.url, "models": ["tiny"]}]
        self.proxy: Proxy = start_proxy(servers, allow_errors=True, start=False)
        self.proxy.addon = self.entry
        self.proxy.start()
        self.key: Key = self.proxy.create_key("alice")

    def write(self, text: str) -> None:
        """The script as an editor leaves it: with a later time of change, however coarse the clock is."""
        loaded = self.loads()
        self.entry.write_text(text)
        later = time.time() + 10 * loaded
        os.utime(self.entry, (later, later))
        eventually(lambda: self.loads() > loaded, "the script's reload")
        if text == GOOD:
            eventually(self.proxy.healthy, "the gateway after the reload")

    def delete(self) -> None:
        self.entry.unlink()
        eventually(lambda: "Removing script" in self.proxy.log(), "the script's removal")

    def loads(self) -> int:
        return self.proxy.log().count("Loading script")

    @contextmanager
    def connected(self) -> Iterator[HTTPConnection]:
        with closing(HTTPConnection("127.0.0.1", self.proxy.port, timeout=TIMEOUT_S)) as connection:
            yield connection

    def post(self, connection: HTTPConnection, name: str, key: str | None = None, stream: bool = False) -> None:
        headers = {"x-request-id": name, "content-type": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        connection.request("POST", CHAT, json.dumps({"model": "tiny", "stream": stream, "messages": []}), headers)

    def answer(self, connection: HTTPConnection, name: str, key: str | None = None) -> int:
        """The status; 0: the connection was cut or refused."""
        try:
            self.post(connection, name, key)
            response = connection.getresponse()
            response.read()
        except TimeoutError:
            raise
        except (OSError, HTTPException):
            connection.close()
            return 0
        return response.status

    def names_at_server(self) -> list[str]:
        return [name for request in self.upstream.asked for name in request.values("x-request-id")]

    def outcome(self, name: str) -> str | None:
        rows = self.proxy.query("select outcome from requests where client_request_id = ?", name)
        assert len(rows) <= 1
        return rows[0]["outcome"] if rows else None


@pytest.fixture
def rig(start_proxy: StartProxy, upstream: Upstream, tmp_path: Path) -> Rig:
    return Rig(start_proxy, upstream, tmp_path)


@contextmanager
def running(rig: Rig) -> Iterator[tuple[HTTPResponse, HTTPConnection]]:
    """A stream that has begun, and an answer of which the last bytes are missing."""
    with rig.connected() as streaming, rig.connected() as asking:
        rig.upstream.plan(HELD_STREAM, HELD_ANSWER)
        rig.post(streaming, "stream", rig.key.key, stream=True)
        response = streaming.getresponse()
        assert response.read1(1000) == EVENT.encode()
        rig.post(asking, "answer", rig.key.key)
        rig.upstream.wait_stalled(2)
        yield response, asking


def rest(response: HTTPResponse) -> tuple[bytes, bool]:
    """What else comes, and whether it ended well."""
    data = b""
    try:
        while piece := response.read1(1 << 16):
            data += piece
    except TimeoutError:
        raise
    except (OSError, HTTPException):
        return data, False
    return data, response.isclosed() and not response.length


def plain(connection: HTTPConnection) -> tuple[bytes, bool]:
    try:
        return rest(connection.getresponse())
    except TimeoutError:
        raise
    except (OSError, HTTPException):
        return b"", False


def test_a_touched_script_goes_on(rig: Rig) -> None:
    with rig.connected() as kept, running(rig) as (stream, asking):
        assert rig.answer(kept, "before", rig.key.key) == 200
        rig.write(GOOD)
        assert rig.answer(kept, "kept", rig.key.key) == 200
        assert rig.answer(kept, "intruder") == 401
        with rig.connected() as fresh:
            assert rig.answer(fresh, "fresh", rig.key.key) == 200
        rig.upstream.release()
        assert rest(stream) == ((LAST + "data: [DONE]\n\n").encode(), True)
        assert [rig.outcome("stream"), plain(asking)[1], rig.outcome("answer")] == ["ok", True, "ok"]
    assert "intruder" not in rig.names_at_server()
    with rig.connected() as connection:
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read())["running"] == 0
    rig.proxy.wait_rows(5)


def test_sigterm_drains_streams_from_before_a_reload(rig: Rig) -> None:
    with running(rig) as (stream, asking):
        rig.write(GOOD)
        assert rig.proxy.process
        rig.proxy.process.terminate()
        eventually(lambda: not rig.proxy.healthy(), "the drain's begin")
        rig.upstream.release()
        assert rest(stream) == ((LAST + "data: [DONE]\n\n").encode(), True)
        assert plain(asking)[1]
        assert rig.proxy.wait() == 0
    assert [rig.outcome("stream"), rig.outcome("answer")] == ["ok", "ok"]


def test_touched_again_and_again(rig: Rig) -> None:
    """Neither claims nor files are left behind."""
    open_files = Path(f"/proc/{rig.proxy.pid}/fd")
    before = len(list(open_files.iterdir()))
    for number in range(3):
        rig.write(GOOD)
        with rig.connected() as connection:
            assert rig.answer(connection, f"{number}", rig.key.key) == 200
    eventually(lambda: len(list(open_files.iterdir())) <= before, "the end of what the old ones had open")
    assert [row["outcome"] for row in rig.proxy.wait_rows(3)] == ["ok"] * 3


BREAKS = {
    "syntax error": "this is no Python",
    "raises": "raise RuntimeError('broken')",
    "import fails": "import no_such_module",
    "no addons": "",
    "no gateway": "addons = []",
    "deleted": None,
}


@pytest.mark.parametrize("text", BREAKS.values(), ids=BREAKS)
def test_without_its_script_it_refuses(rig: Rig, text: str | None) -> None:
    with rig.connected() as kept, running(rig) as (stream, asking):
        assert rig.answer(kept, "before", rig.key.key) == 200
        if text is None:
            rig.delete()
        else:
            rig.write(text)
        statuses = []
        with rig.connected() as fresh:
            for connection, name in ((kept, "kept"), (fresh, "fresh")):
                statuses.append(rig.answer(connection, name, rig.key.key))
                statuses.append(rig.answer(connection, f"intruder-{name}"))
        with rig.connected() as absolute:
            absolute.request("POST", rig.upstream.url + CHAT, b"{}", {"x-request-id": "intruder-absolute"})
            statuses.append(absolute.getresponse().status)
        assert [status for status in statuses if status != 0 and status < 500] == []
        assert rig.names_at_server() == ["stream", "answer", "before"]
        rig.upstream.release()
        # Nobody is there to settle them. They may be cut; they may not end well without a row.
        for name, (data, well) in (("stream", rest(stream)), ("answer", plain(asking))):
            print(f"{name}: {'ends well' if well else 'is cut'}, its row: {rig.outcome(name)}")
            if well or b"[DONE]" in data:
                assert rig.outcome(name) == "ok"
    if text is not None:
        rig.write(GOOD)
        with rig.connected() as fresh:
            assert rig.answer(fresh, "intruder") == 401
            assert rig.answer(fresh, "after", rig.key.key) == 200
    rig.proxy.restart() if text is not None else rig.proxy.stop()
    if text is not None:
        assert [row for row in rig.proxy.rows() if row["outcome"] == "open"] == []
