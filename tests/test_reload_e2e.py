"""The config changes under a running gateway: what acts, what goes on, and what a bad file does, which is nothing."""

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority, TlsUpstream
from conftest import StartProxy
from gateway.registry import Registry
from gateway.settings import Server
from h2client import Http2
from llama import LlamaServer
from proxy import Key, Proxy, free_port
from upstream import CLOSE, OK, STALL, Pause, Request, Step, Steps, Upstream, chunk, head
from waiting import eventually

TIMEOUT_S = 30
CHAT = "/v1/chat/completions"
EVENT = 'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
LAST = 'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = "data: [DONE]\n\n"
HEAD = head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
HELD_STREAM: list[Step] = [HEAD, chunk(EVENT), STALL, chunk(LAST), chunk(DONE), chunk(b"")]

type Json = dict[str, Any]
type StartUpstream = Callable[[], Upstream]


def server(name: str, upstream: Upstream, **more: Any) -> Json:
    return {"name": name, "url": upstream.url, "models": ["tiny"], **more}


class Rig:
    """A gateway, a key, and what its config is now."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.key = proxy.create_key(f"alice-{proxy.port}")

    def health(self) -> Json:
        with self.proxy.client() as client:
            answer = client.get("/health")
            assert answer.status_code == 200
            found: Json = answer.json()
            return found

    def config(self) -> Json:
        found: Json = self.health()["config"]
        return found

    def reload(self, **changes: Any) -> Json:
        """Write the file and say so. Gives what /health says of it."""
        self.proxy.write_config(**changes)
        return self.hang_up()

    def hang_up(self) -> Json:
        before = self.config()
        self.proxy.hang_up()
        eventually(lambda: self.config() != before, "the reload")
        return self.config()

    @contextmanager
    def connected(self) -> Iterator[HTTPConnection]:
        with closing(HTTPConnection("127.0.0.1", self.proxy.port, timeout=TIMEOUT_S)) as connection:
            yield connection

    def post(self, connection: HTTPConnection, name: str, model: str = "tiny", **more: Any) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": "go"}], **more}
        headers = {**self.key.headers, "x-request-id": name, "content-type": "application/json"}
        connection.request("POST", CHAT, json.dumps(body), headers)

    def ask(self, name: str, model: str = "tiny", on: HTTPConnection | None = None) -> tuple[int, str | None]:
        """The status, and which server answered."""
        with contextlib.ExitStack() as stack:
            connection = on or stack.enter_context(self.connected())
            self.post(connection, name, model)
            response = connection.getresponse()
            response.read()
            return response.status, response.getheader("x-llmproxy-server")

    def row(self, name: str) -> Json:
        (row,) = self.proxy.query("select * from requests where client_request_id = ?", name)
        return row


@contextmanager
def streaming(rig: Rig, upstream: Upstream, name: str = "stream") -> Iterator[HTTPResponse]:
    """A stream that has begun and goes on when `upstream` is released."""
    with rig.connected() as connection:
        upstream.plan(HELD_STREAM)
        rig.post(connection, name, stream=True)
        response = connection.getresponse()
        assert response.read1(1000) == EVENT.encode()
        upstream.wait_stalled()
        yield response


@pytest.fixture
def other(start_upstream: StartUpstream) -> Upstream:
    return start_upstream()


@pytest.fixture
def rig(start_proxy: StartProxy, upstream: Upstream) -> Rig:
    return Rig(start_proxy([server("a", upstream)]))


# --- how it comes to be read


def replace_file(proxy: Proxy) -> None:
    """As editors save: another file takes the name."""
    new = proxy.config_path.with_name("new")
    new.write_bytes(proxy.config_path.read_bytes())
    new.replace(proxy.config_path)


WAYS: dict[str, Callable[[Proxy], None]] = {
    "SIGHUP": Proxy.hang_up,
    "its file has changed": lambda proxy: None,
    "replaced": replace_file,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_server_and_an_alias_more(rig: Rig, upstream: Upstream, other: Upstream, way: str) -> None:
    before = rig.config()
    assert before == {"ok": True, "loaded_at": before["loaded_at"]}
    assert rig.ask("early", "new")[0] == 404
    servers = [server("a", upstream), server("b", other, models=["new"])]
    rig.proxy.write_config(servers=servers, aliases={"fast": "new"})
    WAYS[way](rig.proxy)
    eventually(lambda: rig.config() != before, "the reload")
    assert [rig.ask("new", "new"), rig.ask("fast", "fast"), rig.ask("old")] == [(200, "b"), (200, "b"), (200, "a")]
    assert rig.health()["servers"] == {"total": 2, "up": 2, "states": {"a": "up", "b": "up"}}
    reason = "SIGHUP" if way == "SIGHUP" else "its file has changed"
    assert f"config.yaml was read again ({reason}): server b is new; alias fast" in rig.proxy.log()


def test_hanging_up_again_and_again(rig: Rig) -> None:
    """Whatever comes while it reads is one more reading."""
    for _ in range(50):
        rig.proxy.hang_up()
    eventually(lambda: "was read again (SIGHUP): nothing is different" in rig.proxy.log(), "a reload")
    assert rig.ask("after") == (200, "a")


def test_the_file_is_gone_for_longer(rig: Rig) -> None:
    text = rig.proxy.config_path.read_text()
    before = rig.config()
    rig.proxy.config_path.unlink()
    eventually(lambda: not rig.config()["ok"], "the complaint")
    now = rig.config()
    assert now["problem"] == "config.yaml: can't be read: No such file or directory"
    assert now["loaded_at"] == before["loaded_at"]
    rig.proxy.config_path.write_text(text)
    eventually(lambda: rig.config()["ok"], "the end of the complaint")
    assert rig.ask("after") == (200, "a")


# --- what is wrong with it

SECRET = "sk-nobodys-business"
BAD: dict[str, tuple[str, str]] = {
    "not YAML": (f"servers:\n- name: a\n  api_key: {SECRET}: x\n", "is not YAML: line 3, column "),
    "empty": ("", "expected a mapping that begins with 'servers:', got nothing"),
    "unknown key": ('{"server": []}', "server: unknown key; did you mean 'servers'?"),
    "wrong type": ('{"servers": [{"name": "a", "url": "http://a", "weight": "much"}]}', "servers[0].weight: "),
    "no such variable": (
        '{"servers": [{"name": "a", "url": "http://a", "api_key": "${NO_SUCH_VARIABLE}"}]}',
        "servers[0].api_key: the environment variable NO_SUCH_VARIABLE is not set",
    ),
    "no such CA file": (
        '{"servers": [{"name": "a", "url": "https://a", "ca_file": "no-such.pem"}]}',
        "servers[0].ca_file: ",
    ),
    "an alias of nothing": (
        '{"servers": [{"name": "a", "url": "http://a", "models": ["m"]}], "aliases": {"x": "n"}}',
        "aliases.x: ",
    ),
}


def test_a_bad_file_changes_nothing(rig: Rig, upstream: Upstream) -> None:
    good = rig.proxy.config_path.read_text()
    before = rig.health()
    with streaming(rig, upstream) as stream:
        for name, (text, problem) in BAD.items():
            rig.proxy.config_path.write_text(text)
            said = rig.hang_up()
            assert said["problem"].startswith(f"config.yaml: {problem}"), name
            assert (said["ok"], said["loaded_at"]) == (False, before["config"]["loaded_at"])
            assert f"was read again (SIGHUP) and not taken over: {said['problem']}" in rig.proxy.log()
            assert rig.health() == {**before, "running": 1, "config": said}
            assert rig.ask(name) == (200, "a")
        upstream.release()
        assert stream.read() == (LAST + DONE).encode()
    rig.proxy.config_path.write_text(good)
    said = rig.hang_up()
    assert said == {"ok": True, "loaded_at": said["loaded_at"]}
    assert said["loaded_at"] > before["config"]["loaded_at"]
    assert SECRET not in rig.proxy.log()


def test_what_takes_a_restart_is_told(rig: Rig) -> None:
    said = rig.reload(listen="127.0.0.1:1", data="elsewhere", default_model="tiny")
    assert said == {"ok": True, "loaded_at": said["loaded_at"], "needs_restart": ["listen", "data"]}
    assert "default_model. Changed, and takes a restart: listen, data" in rig.proxy.log()
    assert rig.ask("after") == (200, "a")
    assert [row["outcome"] for row in rig.proxy.wait_rows(1)] == ["ok"]


# --- what runs on


def test_a_stream_ends_on_a_server_that_is_gone(rig: Rig, upstream: Upstream, other: Upstream) -> None:
    with streaming(rig, upstream) as stream:
        rig.reload(servers=[server("b", other)])
        assert [rig.ask(f"new-{number}") for number in range(5)] == [(200, "b")] * 5
        health = rig.health()
        assert (health["running"], health["servers"]["states"]) == (1, {"b": "up"})
        upstream.release()
        assert stream.read() == (LAST + DONE).encode()
    rows = rig.proxy.wait_rows(6)
    assert Counter((row["server"], row["outcome"]) for row in rows) == {("a", "ok"): 1, ("b", "ok"): 5}
    assert rig.health()["running"] == 0
    events = rig.proxy.query("select server, state, previous, reason from server_events order by id")
    assert {"server": "a", "state": "removed", "previous": "up", "reason": "the config has it no more"} in events
    asked = len(upstream.requests)
    rig.reload(default_model="tiny")
    assert len(upstream.requests) == asked, "it is still probed"


def test_a_real_stream_ends_on_a_server_that_is_gone(
    start_proxy: StartProxy, endless: LlamaServer, upstream: Upstream
) -> None:
    rig = Rig(start_proxy([{"name": "real", "url": endless.url, "models": ["endless"]}]))
    with rig.connected() as connection:
        rig.post(connection, "stream", "endless", stream=True, max_tokens=100)
        response = connection.getresponse()
        data = response.read1(1000)
        rig.reload(servers=[server("b", upstream)])
        assert rig.ask("new") == (200, "b")
        assert rig.ask("old", "endless")[0] == 404
        data += response.read()
    assert data.endswith(DONE.encode())
    rig.proxy.wait_rows(3)
    assert {name: rig.row("stream")[name] for name in ("server", "outcome", "completion_tokens")} == {
        "server": "real",
        "outcome": "ok",
        "completion_tokens": 100,
    }


def test_what_fails_on_a_server_that_is_gone_is_tried_where_the_new_config_says(
    rig: Rig, upstream: Upstream, other: Upstream
) -> None:
    upstream.plan((STALL, CLOSE))
    with rig.connected() as connection:
        rig.post(connection, "moved")
        upstream.wait_stalled()
        rig.reload(servers=[server("b", other)])
        upstream.release()
        response = connection.getresponse()
        response.read()
    assert (response.status, response.getheader("x-llmproxy-server")) == (200, "b")
    rig.proxy.wait_rows(1)
    assert (rig.row("moved")["attempts"], rig.row("moved")["server"]) == (2, "b")


def test_the_same_name_at_another_place(rig: Rig, upstream: Upstream, other: Upstream) -> None:
    with streaming(rig, upstream) as stream:
        rig.reload(servers=[server("a", other)])
        assert rig.ask("new") == (200, "a")
        assert [request.path for request in other.asked] == [CHAT]
        with rig.proxy.client() as client:
            assert 'llmproxy_running{server="a"} 1' in client.get("/metrics").text
        upstream.release()
        assert stream.read() == (LAST + DONE).encode()
    eventually(lambda: rig.health()["running"] == 0, "the stream's end")
    assert "removed" not in {row["state"] for row in rig.proxy.query("select state from server_events")}


def test_another_key_for_a_server(start_proxy: StartProxy, upstream: Upstream) -> None:
    """The next request has it; the stream that runs ends well on the old one."""
    rig = Rig(start_proxy([server("a", upstream, api_key="sk-old")]))
    with streaming(rig, upstream) as stream, rig.connected() as kept:
        assert rig.ask("before", on=kept) == (200, "a")
        rig.reload(servers=[server("a", upstream, api_key="sk-new")])
        assert rig.ask("after", on=kept) == (200, "a")
        upstream.release()
        assert stream.read() == (LAST + DONE).encode()
    keys = {request.values("x-request-id")[0]: request.values("authorization")[0] for request in upstream.asked}
    assert keys == {"stream": "Bearer sk-old", "before": "Bearer sk-old", "after": "Bearer sk-new"}
    eventually(lambda: upstream.requests[-1].values("authorization") == ["Bearer sk-new"], "a probe with it")


def test_who_waits_gets_the_new_server(start_proxy: StartProxy, upstream: Upstream, other: Upstream) -> None:
    rig = Rig(start_proxy([server("a", upstream, slots=1)]))
    with streaming(rig, upstream) as stream, rig.connected() as first, rig.connected() as second:
        for number, connection in enumerate((first, second)):
            rig.post(connection, f"waits-{number}")
        eventually(lambda: rig.health()["waiting"] == 2, "two that wait")
        rig.reload(servers=[server("a", upstream, slots=1), server("b", other, slots=1)])
        for connection in (first, second):
            response = connection.getresponse()
            response.read()
            assert (response.status, response.getheader("x-llmproxy-server")) == (200, "b")
        upstream.release()
        assert stream.read() == (LAST + DONE).encode()
    eventually(lambda: rig.health()["running"] == 0, "the stream's end")


def test_who_waits_for_a_model_that_is_gone_is_refused(
    start_proxy: StartProxy, upstream: Upstream, other: Upstream
) -> None:
    rig = Rig(start_proxy([server("a", upstream, slots=1)]))
    with streaming(rig, upstream) as stream, rig.connected() as waiting:
        rig.post(waiting, "waits")
        eventually(lambda: rig.health()["waiting"] == 1, "one that waits")
        rig.reload(servers=[server("b", other, models=["new"])])
        response = waiting.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (503, "no_server_available")
        assert rig.ask("late")[0] == 404
        upstream.release()
        assert stream.read() == (LAST + DONE).encode()


def test_another_weight(rig: Rig, upstream: Upstream, other: Upstream) -> None:
    for weights, expected in (((1, 1), {"a": 10, "b": 10}), ((1, 3), {"a": 5, "b": 15})):
        both = [server("a", upstream, weight=weights[0]), server("b", other, weight=weights[1])]
        rig.reload(servers=both, routing={"strategy": "round-robin"})
        assert Counter(rig.ask("weighed")[1] for _ in range(20)) == expected


def test_tls_that_was_not_verified_is_not_used_once_it_shall_be(start_proxy: StartProxy, tmp_path: Path) -> None:
    """Also over a connection that a client has left open."""
    authority = Authority(tmp_path / "authority")
    with TlsUpstream(authority.context("elsewhere.example")) as upstream:
        upstream.always(CHAT, OK)
        rig = Rig(start_proxy([server("a", upstream, verify_tls=False)]))
        with rig.connected() as kept:
            assert [rig.ask("one", on=kept), rig.ask("two", on=kept)] == [(200, "a")] * 2
            connections = {request.connection for request in upstream.asked}
            assert len(connections) == 1, "it is not kept, so this test shows nothing"
            rig.reload(servers=[server("a", upstream, ca_file=str(authority.ca_file))], routing={"max_attempts": 1})
            assert rig.ask("three", on=kept)[0] in (502, 503)
        assert [request.values("x-request-id") for request in upstream.asked] == [["one"], ["two"]]


def test_what_runs_over_a_connection_that_is_not_used_again_ends_well(start_proxy: StartProxy, tmp_path: Path) -> None:
    """An HTTP/2 client's requests share their connections, and the next of them cleans up."""
    authority = Authority(tmp_path / "authority")
    with TlsUpstream(authority.context("127.0.0.1")) as upstream:
        rig = Rig(start_proxy([server("a", upstream, verify_tls=False)]))
        body = {"model": "tiny", "messages": []}
        with Http2(rig.proxy.port) as client:
            upstream.plan((STALL, OK))
            first = client.post(CHAT, rig.key, body)
            upstream.wait_stalled()
            rig.reload(servers=[server("a", upstream, ca_file=str(authority.ca_file))])
            assert client.answer(client.post(CHAT, rig.key, body)).status == 200
            upstream.release()
            assert client.answer(first).status == 200
    assert [(row["outcome"], row["attempts"]) for row in rig.proxy.wait_rows(2)] == [("ok", 1)] * 2


# --- who may use how much


def test_counters_go_on_under_other_limits(rig: Rig) -> None:
    rig.reload(limits={"key": {"rpm": 5}})
    assert [rig.ask(f"five-{number}")[0] for number in range(3)] == [200] * 3
    rig.reload(limits={"key": {"rpm": 4}})
    assert [rig.ask(f"four-{number}")[0] for number in range(3)] == [200, 429, 429]
    rig.reload(limits={"key": {"rpm": 6}})
    assert [rig.ask(f"six-{number}")[0] for number in range(3)] == [200, 200, 429]


def test_another_price_is_for_what_comes(rig: Rig) -> None:
    for number, price in enumerate((1000, 3000)):
        rig.reload(prices={"currency": "EUR", "models": {"tiny": {"completion": price}}})
        rig.ask(f"priced-{number}")
    rows = rig.proxy.wait_rows(2)
    assert [(row["cost_micros"], row["currency"]) for row in rows] == [(1000, "EUR"), (3000, "EUR")]


def test_another_key_source(rig: Rig) -> None:
    digest = hashlib.sha256(b"sk-of-another-source").hexdigest()
    sources = [{"type": "local"}, {"type": "static", "keys": [{"name": "ci", "sha256": digest}]}]
    ours, rig.key = rig.key, Key(0, "ci", "sk-of-another-source")
    assert rig.ask("early")[0] == 401
    rig.reload(auth={"sources": sources})
    assert rig.ask("theirs") == (200, "a")
    rig.key = ours
    assert rig.ask("ours") == (200, "a")
    rig.reload(auth={})
    rig.key = Key(0, "ci", "sk-of-another-source")
    assert rig.ask("late")[0] == 401


def test_a_source_that_cant_be_set_up_changes_nothing(rig: Rig, upstream: Upstream, other: Upstream) -> None:
    servers = [server("a", upstream), server("b", other, models=["new"])]
    said = rig.reload(servers=servers, auth={"sources": [{"type": "file", "path": "no-such.yaml"}]})
    assert not said["ok"]
    assert "auth.sources[0]" in said["problem"]
    assert rig.health()["servers"]["states"] == {"a": "up"}
    assert [rig.ask("old"), rig.ask("new", "new")[0]] == [(200, "a"), 404]
    assert len(other.requests) == 0, "a server that was not taken over is asked"


# --- the admin API


def test_the_admin_api_reads_it_again(start_proxy: StartProxy, upstream: Upstream, other: Upstream) -> None:
    rig = Rig(start_proxy([server("a", upstream)], admin_key="admin-secret", drain_s=5))
    with rig.proxy.client(Key(0, "admin", "admin-secret")) as admin:
        rig.proxy.write_config(servers=[server("a", upstream), server("b", other, models=["new"])], drain_s=6)
        done = admin.post("/admin/config/reload")
        said = done.json()
        assert (done.status_code, rig.ask("new", "new")) == (200, (200, "b"))
        assert said == {
            "at": rig.config()["loaded_at"],
            "ok": True,
            "problem": None,
            "changed": ["server b is new"],
            "needs_restart": ["drain_s"],
        }
        rig.proxy.config_path.write_text("servers: [")
        done = admin.post("/admin/config/reload")
        assert (done.status_code, done.json()["problem"]) == (400, rig.config()["problem"])
        assert rig.ask("still", "new") == (200, "b")
        rig.proxy.write_config(admin_key="another-secret")
        assert admin.post("/admin/config/reload").status_code == 200
        assert admin.post("/admin/config/reload").status_code == 403


def test_what_another_worker_made(rig: Rig, other: Upstream) -> None:
    """Also while the file is bad; and it stays when the file is read again."""
    good = rig.proxy.config_path.read_text()
    rig.proxy.config_path.write_text("servers: [")
    assert not rig.hang_up()["ok"]
    registry = Registry(rig.proxy.folder / "data" / "keys.db")
    with closing(registry):
        registry.create_server(Server("made", other.url, models=("new",)), actor="test")
    eventually(lambda: rig.ask("made", "new") == (200, "made"), "the server that was made")
    assert not rig.config()["ok"]
    rig.proxy.config_path.write_text(good)
    assert rig.hang_up()["ok"]
    assert rig.ask("stays", "new") == (200, "made")
    rig.proxy.restart()
    assert rig.ask("restarted", "new") == (200, "made")


# --- more than one worker


def test_each_worker_watches_by_itself(start_proxy: StartProxy, upstream: Upstream, other: Upstream) -> None:
    first = start_proxy([server("a", upstream)])
    port = free_port()
    second = start_proxy([], start=False, arguments=["--mode", f"reverse:http://no-route.invalid@127.0.0.1:{port}"])
    second.config_path, second.usage_db, second.port = first.config_path, first.usage_db, port
    second.start()
    rigs = [Rig(first), Rig(second)]

    def both(config: Json) -> bool:
        return all({**rig.health()["servers"]["states"], "ok": rig.config()["ok"]} == config for rig in rigs)

    first.write_config(servers=[server("b", other)])
    eventually(lambda: both({"b": "up", "ok": True}), "the reloads")
    first.config_path.write_text("servers: [")
    eventually(lambda: both({"b": "up", "ok": False}), "the complaints")
    assert [rig.ask(f"after-{number}") for number, rig in enumerate(rigs)] == [(200, "b")] * 2


# --- all of it at once

STREAMS, RELOADS, EVENTS = 50, 100, 40
PACED: list[Step] = [part for _ in range(EVENTS) for part in (chunk(EVENT), Pause(0.1))]


def talk(request: Request) -> Steps:
    wanted = request.json()
    if not wanted.get("stream"):
        return OK
    return [HEAD, *PACED, STALL, chunk(LAST), chunk(DONE), chunk(b"")]


def resources(pid: int) -> dict[str, int]:
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "files": len([*(process / "fd").iterdir()]),
        "threads": int(status["Threads"]),
        "kB": int(status["VmRSS"].split()[0]),
    }


def files(upstream: Upstream, other: Upstream) -> list[Json]:
    """Good configs, each unlike the one before."""
    a, b = server("a", upstream), server("b", other)
    return [
        {"servers": [a, b], "aliases": {"fast": "tiny"}},
        {"servers": [{**a, "weight": 3, "api_key": "sk-other"}, b], "aliases": {}},
        {"servers": [b], "routing": {"strategy": "latency"}},
        {"servers": [a], "prices": {"models": {"tiny": {"prompt": 2}}}},
        {"servers": [{**b, "name": "a"}, {**a, "name": "b"}], "routing": {}, "prices": {}},
        {"servers": [a, {**b, "slots": 4}], "limits": {"key": {"rpm": 100000}}, "health": {"interval_s": 1}},
    ]


def test_100_reloads_under_50_streams(start_proxy: StartProxy, upstream: Upstream, other: Upstream) -> None:
    for each in (upstream, other):
        each.always(CHAT, talk)
    rig = Rig(start_proxy([server("a", upstream), server("b", other)]))
    data, began = [b""] * STREAMS, [threading.Event() for _ in range(STREAMS)]

    def run(number: int) -> None:
        with rig.connected() as connection:
            rig.post(connection, f"stream-{number}", stream=True)
            response = connection.getresponse()
            while piece := response.read1(1 << 16):
                data[number] += piece
                began[number].set()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(STREAMS)]
    for thread in threads:
        thread.start()
    for event in began:
        assert event.wait(TIMEOUT_S)
    good, said, grown = files(upstream, other), [], []
    with rig.connected() as kept:
        for number in range(RELOADS):
            if number % 2:
                rig.proxy.config_path.write_text("servers: [")
                said.append(rig.hang_up()["ok"])
            else:
                said.append(rig.reload(**good[number // 2 % len(good)])["ok"])
            assert rig.ask(f"short-{number}", on=kept)[0] == 200
            if number >= RELOADS // 4:
                grown.append(resources(rig.proxy.pid))
    assert said == [True, False] * (RELOADS // 2)
    assert rig.health()["running"] == STREAMS
    for each in (upstream, other):
        each.wait_stalled(sum(request.json().get("stream", False) for request in each.asked), TIMEOUT_S)
        each.release()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert set(data) == {(EVENT * EVENTS + LAST + DONE).encode()}
    rows = rig.proxy.wait_rows(STREAMS + RELOADS)
    assert Counter((row["outcome"], row["attempts"]) for row in rows) == {("ok", 1): STREAMS + RELOADS}
    health = rig.health()
    assert (health["running"], health["waiting"]) == (0, 0)
    quarter = len(grown) // 3
    for name, spare in (("files", 4), ("threads", 4), ("kB", 6000)):
        early, late = (min(each[name] for each in part) for part in (grown[:quarter], grown[-quarter:]))
        assert late <= early + spare, f"{name} grew from {early} to {late}"
