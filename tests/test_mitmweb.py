"""The same addon under mitmweb and under mitmproxy's console: it does its work, and they show what passes."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama import LlamaServer
from proxy import STOP_S, Proxy, free_port
from waiting import eventually

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the world"}],
    "max_tokens": 5,
    "seed": 7,
}
PASSWORD = "let-me-look"


@pytest.fixture(scope="module")
def web_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, confdir: Path, tiny: LlamaServer, web_port: int) -> Iterator[Proxy]:
    arguments = ["--no-web-open-browser", "--web-port", str(web_port), "--set", f"web_password={PASSWORD}"]
    with Proxy(
        tmp_path_factory.mktemp("mitmweb"),
        [{"name": "real", "url": tiny.url}],
        confdir=confdir,
        program="mitmweb",
        arguments=[*arguments, "--set", "store_streamed_bodies=true"],
    ) as proxy:
        yield proxy
    assert "Traceback" not in proxy.log()


@pytest.fixture(scope="module")
def web(proxy: Proxy, web_port: int) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {PASSWORD}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{web_port}", headers=headers, trust_env=False) as client:
        eventually(lambda: client.get("/flows").status_code == 200, "mitmweb's API")
        yield client


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_passes_can_be_looked_at(proxy: Proxy, web: httpx.Client, stream: bool) -> None:
    key = proxy.create_key(f"alice-{stream}")
    with proxy.client(key) as client:
        answer = client.post(CHAT, json=ASK | {"stream": stream})
    assert answer.status_code == 200
    (row,) = proxy.query("select * from requests where id = ?", answer.headers["x-request-id"])
    assert (row["outcome"], row["completion_tokens"], row["response_bytes"]) == ("ok", 5, len(answer.content))
    (flow,) = [
        flow
        for flow in web.get("/flows").json()
        if ["x-request-id", row["id"]] in [list(header) for header in (flow.get("response") or {}).get("headers", [])]
    ]
    assert (flow["request"]["path"], flow["response"]["status_code"]) == (CHAT, 200)
    assert web.get(f"/flows/{flow['id']}/request/content.data").json() == ASK | {"stream": stream}
    assert web.get(f"/flows/{flow['id']}/response/content.data").content == answer.content


def test_a_refusal_can_be_looked_at_too(proxy: Proxy, web: httpx.Client) -> None:
    with proxy.client() as client:
        assert client.post("/v1/refused", json=ASK).status_code == 401
    (flow,) = [flow for flow in web.get("/flows").json() if flow["request"]["path"] == "/v1/refused"]
    assert flow["response"]["status_code"] == 401


def test_a_users_key_is_not_shown(proxy: Proxy, web: httpx.Client) -> None:
    key = proxy.create_key("carol")
    with proxy.client(key) as client:
        assert client.post(CHAT, json=ASK).status_code == 200
    assert key.key not in web.get("/flows").text


def test_the_default_addons_stay(web: httpx.Client) -> None:
    """mitmweb shows and does what it can do elsewhere: nothing of it is trimmed."""
    commands = web.get("/commands").json()
    assert {"cut.save", "export.clip", "view.flows.resolve"} <= set(commands)


def test_the_console(tmp_path: Path, confdir: Path, tiny: LlamaServer) -> None:
    """mitmproxy in a terminal of its own."""
    proxy = Proxy(tmp_path, [{"name": "real", "url": tiny.url}], confdir=confdir)
    terminal, inner = pty.openpty()
    rows_and_columns = struct.pack("HHHH", 40, 120, 0, 0)
    fcntl.ioctl(inner, termios.TIOCSWINSZ, rows_and_columns)
    command = [str(Path(sys.executable).with_name("mitmproxy")), "-s", str(proxy.addon)]
    command += ["--set", f"llmproxy_config={proxy.config_path}", "--set", f"confdir={confdir}"]
    environment = {**os.environ, "TERM": "xterm-256color"}
    screen = bytearray()

    def drain() -> None:
        """A terminal that nobody reads stops its program."""
        while select.select([terminal], [], [], 0)[0]:
            screen.extend(os.read(terminal, 1 << 16))

    def shown() -> bool:
        drain()
        return b"completions" in screen

    def healthy() -> bool:
        drain()
        return process.poll() is None and proxy.healthy()

    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=inner, stdout=inner, stderr=inner)
    try:
        eventually(healthy, "the console's start", 30)
        key = proxy.create_key("alice")
        with proxy.client(key) as client:
            answer = client.post(CHAT, json=ASK | {"stream": True})
        assert answer.content.endswith(b"data: [DONE]\n\n")
        (row,) = proxy.rows()
        assert (row["outcome"], row["completion_tokens"]) == ("ok", 5)
        eventually(shown, "the flow on the screen")
    finally:
        process.terminate()
        with closing(os.fdopen(terminal, "rb", closefd=True)):
            eventually(lambda: _ended(process, drain), "the console's end", STOP_S)
        os.close(inner)


def _ended(process: "subprocess.Popen[bytes]", drain: Any) -> bool:
    drain()
    return process.poll() is not None
