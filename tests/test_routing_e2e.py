"""Which server a request goes to, end to end: models, aliases, keys, servers that come and go, every refusal."""

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from conftest import StartLlama, StartProxy
from llama import LlamaServer, Model
from pairs import FIRST_ALWAYS, SCRIPTED
from proxy import Key, Proxy, Row, free_port
from rawhttp import Answer, Connection, ask, post, request
from upstream import (
    CLOSE,
    MODELS,
    OK,
    RESET,
    STALL,
    Behaviour,
    Pause,
    Request,
    Upstream,
    chunk,
    cut,
    head,
    reply,
    stream,
)
from waiting import eventually

CHAT = "/v1/chat/completions"
MESSAGES: list[dict[str, str]] = [{"role": "user", "content": "tell me about the world"}]


def chat(port: int, key: Key, model: object, **more: Any) -> Answer:
    return post(port, CHAT, key, {"model": model, "messages": MESSAGES, "max_tokens": 3} | more)


def names(port: int, key: Key) -> set[str]:
    return {model["id"] for model in ask(port, request("GET", "/v1/models", key)).json()["data"]}


def last(proxy: Proxy, *columns: str) -> tuple[object, ...]:
    (row,) = proxy.query(f"select {', '.join(columns)} from requests order by id desc limit 1")
    return tuple(row.values())


# -- models, aliases, keys ---------------------------------------------------------------------------------------------

ALIASES = {
    "fast": "tiny",
    "gpt-*": "tiny",
    "gpt-thinks": "think",
    "/claude-[0-9]+(-.*)?/": "think",
    "?ny": "think",
    "tiny": "think",  # an alias wins over a model of its name
    "so/mixed:*": "named",
}


@pytest.fixture(scope="module")
def other() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def proxy(
    tmp_path_factory: pytest.TempPathFactory, confdir: Path, llama: Callable[[str], LlamaServer], other: Upstream
) -> Iterator[Proxy]:
    servers: list[dict[str, Any]] = [
        {"name": f"real {name}", "url": llama(name).url} for name in ("tiny", "think", "embeddings")
    ]
    servers.append({"name": "other", "url": other.url, "models": ["named", "second", "gpt-4"], "type": "llama.cpp"})
    folder = tmp_path_factory.mktemp("routing")
    with Proxy(folder, servers, aliases=ALIASES, max_body_mb=0.02, confdir=confdir) as proxy:
        yield proxy
    assert "Traceback" not in proxy.log()


@pytest.fixture(scope="module")
def alice(proxy: Proxy) -> Key:
    return proxy.create_key("alice")


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ("think", "think"),
        ("embeddings", "embeddings"),
        ("named", "named"),
        ("fast", "tiny"),
        ("gpt-5-mini", "tiny"),
        ("gpt-", "tiny"),
        ("gpt-4", "gpt-4"),  # exact names win over patterns
        ("gpt-thinks", "think"),
        ("claude-4", "think"),
        ("claude-4-opus\nnew", None),
        ("xclaude-4", None),
        ("claude-", None),
        ("any", "think"),
        ("tiny", "think"),
        ("so/mixed:1", "named"),
        ("GPT-4", None),
        ("", None),
        ("x" * 500, None),
        ("gpt-\u65e5\u672c", "tiny"),
    ],
)
def test_models_and_aliases(proxy: Proxy, alice: Key, other: Upstream, asked: str, served: str | None) -> None:
    path, body = CHAT, {"messages": MESSAGES, "max_tokens": 3}
    if served == "embeddings":
        path, body = "/v1/embeddings", {"input": "a"}
    answer = post(proxy.port, path, alice, {"model": asked, **body})
    row = last(proxy, "model", "served_model", "outcome", "status", "error_code")
    if served is None:
        assert (answer.status, answer.code) == (404, "model_not_found")
        assert row == (asked, None, "refused", 404, "model_not_found")
        return
    assert answer.status == 200
    assert row == (asked, served, "ok", 200, None)
    server = "other" if served in ("named", "gpt-4") else f"real {served}"
    assert last(proxy, "server") == (server,)
    if server == "other":
        assert other.asked[-1].json()["model"] == served


def test_models_are_listed_per_key(proxy: Proxy, alice: Key) -> None:
    everything = {"tiny", "think", "embeddings", "named", "second", "gpt-4", "fast", "gpt-thinks"}
    assert names(proxy.port, alice) == everything
    for number, (patterns, visible) in enumerate(
        [
            (["named"], {"named"}),
            (["think"], {"think", "gpt-thinks", "tiny"}),  # aliases of what is allowed
            (["fast"], {"fast"}),
            (["*e*"], {"embeddings", "named", "second"}),
            (["/n.*|s.*/"], {"named", "second"}),
            (["nothing"], set()),
        ]
    ):
        key = proxy.create_key(f"lists-{number}", *(part for pattern in patterns for part in ("--model", pattern)))
        assert names(proxy.port, key) == visible, patterns
    listed = ask(proxy.port, request("GET", "/v1/models?x=1", alice)).json()
    assert listed["object"] == "list"
    assert {model["object"] for model in listed["data"]} == {"model"}


@pytest.mark.parametrize(
    ("allowed", "asked", "status"),
    [
        ("named", "named", 200),
        ("named", "second", 403),
        ("named", "so/mixed:x", 200),  # an alias of what is allowed
        ("so/*", "so/mixed:x", 200),  # an allowed alias
        ("so/*", "named", 403),  # the same model by its own name
        ("n*", "named", 200),
        ("/na.ed/", "named", 200),
        ("/na/", "named", 403),
        ("named", "unknown", 404),
    ],
)
def test_allowed_models(proxy: Proxy, allowed: str, asked: str, status: int) -> None:
    key = proxy.create_key(f"allowed {allowed} {asked}", "--model", allowed)
    answer = chat(proxy.port, key, asked)
    assert answer.status == status
    if status == 403:
        assert answer.json()["error"] == {
            "message": f"This API key may not use '{asked}'.",
            "type": "permission_error",
            "param": "model",
            "code": "model_not_allowed",
        }
        assert last(proxy, "outcome", "error_code", "server") == ("refused", "model_not_allowed", None)


def test_a_change_of_keys_acts_at_the_next_request(proxy: Proxy) -> None:
    """On one connection, without a restart."""
    key = proxy.create_key("bob")
    with Connection(proxy.port) as connection:

        def tried(holder: Key) -> tuple[int, str | None]:
            answer = connection.ask(request("POST", CHAT, holder, json.dumps({"model": "named"}).encode()))
            return answer.status, answer.code if answer.status != 200 else None

        assert tried(key) == (200, None)
        proxy.keys("disable", "bob")
        assert tried(key) == (403, "key_disabled")
        proxy.keys("enable", "bob")
        assert tried(key) == (200, None)
        rotated = Key(**proxy.keys("rotate", "bob"))
        assert (tried(key), tried(rotated)) == ((401, "invalid_api_key"), (200, None))
        assert rotated.id == key.id
        proxy.keys("revoke", "bob")
        assert tried(rotated) == (401, "invalid_api_key")
    rows = proxy.query("select outcome, status from requests where key_name = 'bob' order by id")
    assert [tuple(row.values()) for row in rows] == [("ok", 200)] * 3  # no row for who was not let in


# -- refusals before a server ------------------------------------------------------------------------------------------

PRIVATE = [
    "/slots",
    "/slots/0?action=erase",
    "/SLOTS",
    "//slots",
    "/./slots",
    "/v1/../slots",
    "/%73lots",
    "/slots/",
    "/slots;x",
    "/%2e%2e/slots",
    "/slots%2f0",
    "/props",
    "/lora-adapters",
    "/v1/stream?conv_id=x",
    "/v1/streams/lookup",
    "/v1/chat/completions/control",
    "/models/load",
    "/\\slots",
    "/%5cslots",
    "/slots%3fx",
]
RESERVED = ["/metrics/", "/V1/usage", "/usage/nothing"]
ADMIN = ["/admin", "/admin/keys", "/admin/../admin/x", "//admin", "/%61dmin/keys", "/Admin/"]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("target", PRIVATE + RESERVED)
def test_paths_that_are_not_for_plain_keys(proxy: Proxy, alice: Key, other: Upstream, target: str, method: str) -> None:
    before = len(other.asked)
    answer = ask(proxy.port, request(method, target, alice, b'{"model":"named"}'))
    expected = (403, "endpoint_not_allowed") if target in PRIVATE else (404, "not_found")
    assert (answer.status, answer.code) == expected
    assert last(proxy, "outcome", "status", "endpoint") == ("refused", expected[0], target.partition("?")[0])
    assert len(other.asked) == before


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("target", ADMIN)
def test_admin_paths_are_no_business_of_keys(
    proxy: Proxy, alice: Key, other: Upstream, target: str, method: str
) -> None:
    """There is no admin key. Whatever a user's key may do, no server is asked and nothing is booked."""
    before = len(other.asked), proxy.rows()
    answer = ask(proxy.port, request(method, target, alice, b'{"model":"named"}'))
    assert (answer.status, answer.code) == (404, "not_found")
    assert (len(other.asked), proxy.rows()) == before


REFUSALS = {
    "no key": (request("POST", CHAT, None, b"{}"), 401, "invalid_api_key", None),
    "no key at an unknown path": (request("GET", "/nothing"), 401, "invalid_api_key", None),
    "unknown key": (request("POST", CHAT, Key(0, "", "sk-x"), b"{}"), 401, "invalid_api_key", None),
    "another scheme": (request("POST", CHAT, None, b"{}", "Authorization: Basic YTpi"), 401, "invalid_api_key", None),
    "body no object": (b"[1]", 400, "invalid_request", "body"),
    "body no JSON": (b'{"model":', 400, "invalid_request", "body"),
    "body text": (b"hello", 400, "invalid_request", "body"),
    "model a number": (b'{"model":7}', 400, "invalid_request", "model"),
    "model a list": (b'{"model":["named"]}', 400, "invalid_request", "model"),
    "model given twice": (b'{"model":"named","model":"second"}', 400, "invalid_request", "model"),
    "model unknown": (b'{"model":"no such"}', 404, "model_not_found", "model"),
    "model missing": (b'{"messages":[]}', 404, "model_not_found", "model"),
    "model null": (b'{"model":null}', 404, "model_not_found", "model"),
    "body too large": (b'{"model":"named","x":"' + b"x" * 20_000 + b'"}', 413, "request_too_large", "body"),
}


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(proxy: Proxy, alice: Key, other: Upstream, name: str, dialect: str) -> None:
    sent, status, code, param = REFUSALS[name]
    path = CHAT if dialect == "openai" else "/v1/messages"
    is_request = b" HTTP/1.1\r\n" in sent
    data = sent.replace(CHAT.encode(), path.encode()) if is_request else request("POST", path, alice, sent)
    if is_request and b"/nothing" in sent:
        dialect = "openai"
    before = len(other.asked), len(proxy.rows())
    answer = ask(proxy.port, data)
    error = answer.json()["error"]
    assert (answer.status, error["code"], error["param"]) == (status, code, param)
    assert set(error) == {"message", "type", "code", "param"}
    assert answer.json().get("type") == (None if dialect == "openai" else "error")
    assert answer.value("content-type") == "application/json"
    assert len(other.asked) == before[0]
    assert len(proxy.rows()) - before[1] == (0 if status == 401 else 1)
    if status != 401:
        assert last(proxy, "outcome", "status", "error_code", "attempts") == ("refused", status, code, 0)


def test_too_large_without_a_length(proxy: Proxy, alice: Key) -> None:
    begin = request("POST", CHAT, alice, None, "Transfer-Encoding: chunked")
    answer = ask(
        proxy.port, begin + chunk(b'{"model":"named","x":"') + chunk(b"x" * 25_000) + chunk(b'"}') + chunk(b"")
    )
    assert (answer.status, answer.code) == (413, "request_too_large")


# -- servers that close, refuse and die --------------------------------------------------------------------------------


def servers_at(first: Upstream, second: Upstream) -> list[dict[str, Any]]:
    """Two of one model. As long as both have nothing to do, the first is taken."""
    return [
        {"name": "first", "url": first.url, "models": ["tiny"], "weight": FIRST_ALWAYS, **SCRIPTED},
        {"name": "second", "url": second.url, "models": ["tiny"], **SCRIPTED},
    ]


@dataclass(frozen=True)
class Pair:
    """A proxy in front of two servers of one model. As long as both have nothing to do, the first is taken."""

    proxy: Proxy
    key: Key
    first: Upstream
    second: Upstream
    before: dict[Upstream, int]

    def sent(self, server: Upstream) -> list[Request]:
        """What this test sent to it."""
        return server.asked[self.before[server] :]

    def settled(self) -> Row:
        """The last row, when it is settled."""
        return self.proxy.wait_rows(len(self.proxy.rows()))[-1]


# Servers fail here on purpose, request by request: none is left alone for that.
PATIENT: dict[str, Any] = {"routing": {"backoff_s": 0.01}, "health": {"eject_after": 1_000_000}}


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[Pair]:
    with Upstream() as first, Upstream() as second:
        with Proxy(tmp_path_factory.mktemp("pair"), servers_at(first, second), confdir=confdir, **PATIENT) as proxy:
            yield Pair(proxy, proxy.create_key("alice"), first, second, {})
        assert "Traceback" not in proxy.log()


@pytest.fixture
def pair(long_lived: Pair) -> Pair:
    """The same for all tests: they leave no server down, and nothing running."""
    before = {server: len(server.asked) for server in (long_lived.first, long_lived.second)}
    return replace(long_lived, before=before)


@pytest.fixture(scope="module")
def long_alone(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[Pair]:
    with Upstream() as only:
        servers = [{"name": "only", "url": only.url, "models": ["tiny"], **SCRIPTED}]
        with Proxy(tmp_path_factory.mktemp("alone"), servers, confdir=confdir, **PATIENT) as proxy:
            yield Pair(proxy, proxy.create_key("alice"), only, only, {})
        assert "Traceback" not in proxy.log()


@pytest.fixture
def alone(long_alone: Pair) -> Pair:
    """A pair without a second server."""
    return replace(long_alone, before={long_alone.first: len(long_alone.first.asked)})


def test_200_streams_over_one_connection(start_proxy: StartProxy, start_llama: StartLlama) -> None:
    """llama-server closes its connection after each of them, and says that it keeps it."""
    server = start_llama(Model(), "--alias", "tiny")
    proxy = start_proxy([{"name": "real", "url": server.url}])
    key = proxy.create_key("alice")
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "stream": True}).encode()
    with Connection(proxy.port) as connection:
        for _ in range(200):
            answer = connection.ask(request("POST", CHAT, key, body))
            assert (answer.status, answer.complete) == (200, True)
            assert answer.body.endswith(b"data: [DONE]\n\n")
    rows = proxy.query("select outcome, attempts, count(*) as requests from requests group by 1, 2")
    assert rows == [{"outcome": "ok", "attempts": 1, "requests": 200}]


def test_streams_and_whole_answers_in_turn(start_proxy: StartProxy, start_llama: StartLlama) -> None:
    server = start_llama(Model(), "--alias", "tiny")
    proxy = start_proxy([{"name": "real", "url": server.url}])
    key = proxy.create_key("alice")
    with Connection(proxy.port) as connection:
        for number in range(60):
            body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "stream": number % 2 == 0}
            assert connection.ask(request("POST", CHAT, key, json.dumps(body).encode())).status == 200
    rows = proxy.query("select outcome, count(*) as requests from requests group by 1")
    assert rows == [{"outcome": "ok", "requests": 60}]


FAULTS: dict[str, Behaviour] = {"closed": CLOSE, "reset": RESET}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_used_connection_that_closes_is_tried_again(pair: Pair, fault: str) -> None:
    """The server had kept it after the last answer; the request goes to the same server, over a fresh one."""
    pair.first.plan(OK, FAULTS[fault], OK)
    with Connection(pair.proxy.port) as connection:
        for attempts in (1, 2):
            assert connection.ask(request("POST", CHAT, pair.key, b'{"model":"tiny"}')).status == 200
            assert last(pair.proxy, "outcome", "attempts", "server") == ("ok", attempts, "first")
    first, second, third = pair.sent(pair.first)
    assert first.connection == second.connection != third.connection
    assert second.body == third.body
    assert not pair.sent(pair.second)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fresh_connection_that_closes_is_tried_on_another_server(pair: Pair, fault: str) -> None:
    pair.first.plan(FAULTS[fault])
    assert chat(pair.proxy.port, pair.key, "tiny").status == 200
    assert last(pair.proxy, "outcome", "attempts", "server", "status") == ("ok", 2, "second", 200)
    (one,), (other,) = pair.sent(pair.first), pair.sent(pair.second)
    assert one.body == other.body


def test_a_refused_connection_is_tried_on_another_server(
    start_proxy: StartProxy, start_upstream: Callable[[], Upstream]
) -> None:
    first, second = start_upstream(), start_upstream()
    proxy = start_proxy(servers_at(first, second))
    key = proxy.create_key("alice")
    first.refuse()
    with Connection(proxy.port) as connection:
        for attempts in (2, 1):  # the second time it is known
            assert connection.ask(request("POST", CHAT, key, b'{"model":"tiny"}')).status == 200
            assert last(proxy, "outcome", "attempts", "server") == ("ok", attempts, "second")
    first.listen()
    eventually(
        lambda: chat(proxy.port, key, "tiny").status == 200 and last(proxy, "server") == ("first",), "its return"
    )


BEFORE_AN_EVENT: dict[str, Behaviour] = {
    "closed": CLOSE,
    "one byte": (b"H", CLOSE),
    "partial head": (b"HTTP/1.1 200 OK\r\nContent-Le", CLOSE),
    "partial head, reset": (b"HTTP/1.1 200 OK\r\nContent-Le", RESET),
    "garbage": (b"\x00\xff garbage\r\n\r\n", CLOSE),
    "head only": (head(200, "Content-Length: 10"), CLOSE),
    "stream's head": (stream()[0], CLOSE),
}
AFTER_AN_EVENT: dict[str, Behaviour] = {
    "half a body": (head(200, "Content-Length: 10") + b"12345", CLOSE),
    "half a body, reset": (head(200, "Content-Length: 10") + b"12345", Pause(0.1), RESET),
    "half a stream": (*stream('data: {"choices":[]}\n\n')[:2], CLOSE),
}


@pytest.mark.parametrize("fault", BEFORE_AN_EVENT)
def test_the_only_server_is_not_tried_twice(pair: Pair, alone: Pair, fault: str) -> None:
    """What it failed to answer once, it would most likely fail to answer again; another server may do better."""
    pair.first.plan(BEFORE_AN_EVENT[fault])
    assert chat(pair.proxy.port, pair.key, "tiny").status == 200
    assert (len(pair.sent(pair.first)), len(pair.sent(pair.second))) == (1, 1)
    alone.first.plan(BEFORE_AN_EVENT[fault])
    answer = chat(alone.proxy.port, alone.key, "tiny")
    assert (answer.status, answer.code) == (502, "upstream_unreachable")
    row = alone.settled()
    assert (row["outcome"], row["status"], row["attempts"], row["server"]) == ("unreachable", 502, 1, "only")
    assert len(alone.sent(alone.first)) == 1


@pytest.mark.parametrize("fault", AFTER_AN_EVENT)
def test_nothing_is_sent_twice_after_an_event(pair: Pair, fault: str) -> None:
    pair.first.plan(AFTER_AN_EVENT[fault])
    answer = chat(pair.proxy.port, pair.key, "tiny")
    assert (answer.status, answer.complete) == (200, False)
    row = pair.settled()
    assert (row["outcome"], row["status"], row["attempts"], row["server"]) == ("upstream_cut", 200, 1, "first")
    assert (len(pair.sent(pair.first)), len(pair.sent(pair.second))) == (1, 0)


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_what_another_server_would_answer_too(pair: Pair, status: int) -> None:
    pair.first.plan(reply({"error": {"message": "mine"}}, status))
    answer = chat(pair.proxy.port, pair.key, "tiny")
    assert (answer.status, answer.json()) == (status, {"error": {"message": "mine"}})
    row = pair.settled()
    assert (row["outcome"], row["attempts"], row["server"]) == ("error", 1, "first")
    assert not pair.sent(pair.second)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_the_only_servers_own_error(alone: Pair, status: int) -> None:
    alone.first.plan(reply({"error": {"message": "mine"}}, status))
    answer = chat(alone.proxy.port, alone.key, "tiny")
    assert (answer.status, answer.json()) == (status, {"error": {"message": "mine"}})
    row = alone.settled()
    assert (row["outcome"], row["status"], row["attempts"], row["error_code"]) == ("error", status, 1, "error")
    assert len(alone.sent(alone.first)) == 1


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_502(start_proxy: StartProxy, start_upstream: Callable[[], Upstream], path: str) -> None:
    first, second = start_upstream(), start_upstream()
    proxy = start_proxy(servers_at(first, second), routing={"max_attempts": 2})
    key = proxy.create_key("alice")
    first.refuse()
    second.plan(CLOSE)
    answer = post(proxy.port, path, key, {"model": "tiny"})
    assert (answer.status, answer.code) == (502, "upstream_unreachable")
    assert last(proxy, "outcome", "attempts", "status", "error_code") == ("unreachable", 2, 502, "upstream_unreachable")


def test_504(start_proxy: StartProxy, upstream: Upstream) -> None:
    """The only server is silent for too long. After an event it has all the time it wants."""
    proxy = start_proxy([{"name": "only", "url": upstream.url, "models": ["tiny"]}], first_byte_timeout_s=0.3)
    key = proxy.create_key("alice")
    upstream.plan(STALL)
    answer = chat(proxy.port, key, "tiny")
    assert (answer.status, answer.code) == (504, "upstream_timeout")
    assert last(proxy, "outcome", "attempts", "status", "error_code") == ("unreachable", 1, 504, "upstream_timeout")
    upstream.wait_left()
    assert len(upstream.asked) == 1
    upstream.plan((*stream("data: 1\n\n")[:2], STALL, chunk("data: [DONE]\n\n"), chunk(b"")))
    with Connection(proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, key, b'{"model":"tiny"}'))
        assert connection.head()[0] == 200
        eventually(lambda: _running_s(proxy) > 2, "two sweeps of silence")
        upstream.release()
        assert connection.until(b"0\r\n\r\n").endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def _running_s(proxy: Proxy) -> float:
    rows: list[Row] = proxy.query("select running_s from running")
    return float(rows[0]["running_s"]) if rows else 0.0


def test_503_and_a_server_that_comes_back(start_proxy: StartProxy, start_llama: StartLlama) -> None:
    """Its models are asked for when it comes, and again when it comes back as another."""
    port = free_port()
    proxy = start_proxy([{"name": "real", "url": f"http://127.0.0.1:{port}"}])
    key = proxy.create_key("alice")
    answer = chat(proxy.port, key, "early")
    assert (answer.status, answer.code) == (503, "no_server_available")
    assert int(answer.value("retry-after") or 0) > 0
    assert last(proxy, "outcome", "status", "error_code") == ("refused", 503, "no_server_available")
    assert names(proxy.port, key) == set()
    server = start_llama(Model(), "--alias", "early", port=port)
    eventually(lambda: names(proxy.port, key) == {"early"}, "the server's models")
    assert chat(proxy.port, key, "early").status == 200
    server.kill()
    answer = chat(proxy.port, key, "early")
    assert (answer.status, answer.code) == (502, "upstream_unreachable")
    assert names(proxy.port, key) == set()  # reachable ones only
    start_llama(Model(), "--alias", "late", port=port)
    eventually(lambda: names(proxy.port, key) == {"late"}, "the server's new models")
    assert chat(proxy.port, key, "late").status == 200
    assert chat(proxy.port, key, "early").status == 404


def test_a_server_killed_under_a_stream(start_proxy: StartProxy, start_llama: StartLlama) -> None:
    server = start_llama(Model(mean_len=0), "--alias", "endless")
    proxy = start_proxy([{"name": "real", "url": server.url}])
    key = proxy.create_key("alice")
    body = {"model": "endless", "messages": MESSAGES, "stream": True}
    with Connection(proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, key, json.dumps(body).encode()))
        connection.until(b'"content":"')
        server.kill()
        assert not connection.rest().endswith(b"0\r\n\r\n")
    (row,) = proxy.wait_rows(1)
    assert (row["outcome"], row["status"], row["tokens_source"]) == ("upstream_cut", 200, "counted")
    assert row["completion_tokens"] > 0


def test_the_least_busy_server_is_taken(pair: Pair) -> None:
    """However much it is worth: one request for all of the first's weight is more than none for the second's."""
    pair.first.plan((STALL, OK))
    pair.second.plan((STALL, OK))
    data = request("POST", CHAT, pair.key, b'{"model":"tiny"}')
    with Connection(pair.proxy.port) as one, Connection(pair.proxy.port) as other:
        for connection, server in ((one, pair.first), (other, pair.second)):
            connection.sock.sendall(data)
            server.wait_stalled()
        pair.first.release()
        pair.second.release()
        assert (one.answer().status, other.answer().status) == (200, 200)


def test_models_with_a_servers_key(start_proxy: StartProxy, start_llama: StartLlama) -> None:
    server = start_llama(Model(), "--alias", "locked", "--api-key", "sk-of-the-server")
    proxy = start_proxy([{"name": "real", "url": server.url, "api_key": "sk-of-the-server"}])
    key = proxy.create_key("alice")
    assert names(proxy.port, key) == {"locked"}
    assert chat(proxy.port, key, "locked").status == 200


def test_default_model(start_proxy: StartProxy, upstream: Upstream) -> None:
    servers = [{"name": "one", "url": upstream.url, "models": ["a", "b"]}]
    proxy = start_proxy(servers, default_model="b")
    key = proxy.create_key("alice")
    narrow = proxy.create_key("narrow", "--model", "a")
    assert post(proxy.port, CHAT, key, b'{"messages":[]}').status == 200
    assert upstream.asked[-1].body == b'{"model":"b","messages":[]}'
    assert post(proxy.port, CHAT, narrow, b'{"messages":[]}').status == 403


def test_a_path_in_a_servers_url(start_proxy: StartProxy, upstream: Upstream) -> None:
    upstream.always("/deep/er/v1/models", MODELS)
    proxy = start_proxy([{"name": "one", "url": f"{upstream.url}/deep/er/"}])
    key = proxy.create_key("alice")
    assert names(proxy.port, key) == {"tiny"}
    assert post(proxy.port, f"{CHAT}?a=/b", key, {"model": "tiny"}).status == 200
    assert upstream.asked[-1].target == f"/deep/er{CHAT}?a=/b"
    assert last(proxy, "endpoint") == (CHAT,)


def test_health(proxy: Proxy) -> None:
    for path in ("/health", "/v1/health"):
        answer = ask(proxy.port, request("GET", path))
        assert (answer.status, answer.json()["status"]) == (200, "ok")
        states = dict.fromkeys(["real tiny", "real think", "real embeddings", "other"], "up")
        assert answer.json()["servers"] == {"total": 4, "up": 4, "states": states}
        assert (answer.json()["running"], answer.json()["waiting"]) == (0, 0)


def test_a_client_leaves_before_the_first_byte(pair: Pair) -> None:
    """Its server learns of it at once, no other server is bothered, and its claim is given back."""
    pair.first.plan(STALL)
    left = len(pair.first.left)
    with Connection(pair.proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, pair.key, b'{"model":"tiny"}'))
        pair.first.wait_stalled()
    pair.first.wait_left(left + 1)
    row = pair.settled()
    assert (row["outcome"], row["attempts"], row["status"]) == ("client_closed", 1, None)
    assert ask(pair.proxy.port, request("GET", "/health")).json()["running"] == 0
    assert not pair.sent(pair.second)


def test_pieces_of_a_head(pair: Pair) -> None:
    """A request and an answer that come one byte after the other are what they are."""
    pair.first.plan(cut(OK, *range(1, len(OK))))
    with Connection(pair.proxy.port) as connection:
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request("POST", CHAT, pair.key, b'{"model":"tiny"}'):
            connection.sock.sendall(bytes([byte]))
        assert connection.answer().body == OK.partition(b"\r\n\r\n")[2]
