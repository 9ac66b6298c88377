"""Clients get what they would have got without us, servers what they would have been sent: every byte and header.

The upstream is scripted: it repeats what a server said, in pieces that no server would choose.
"""

import hashlib
import json
import select
import socket
import ssl
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx
import pytest

from dialects import error_in
from proxy import Key, Proxy
from rawhttp import Connection, ask, post, request
from recordings import load
from upstream import CLOSE, STALL, Request, Upstream, chunk, cut, head, pieces, reply, stream
from waiting import eventually

CHAT = "/v1/chat/completions"
BODY = b'{ "model" : "tiny",\t"messages":[{"role":"user","content":"caf\xc3\xa9 \\u00e9 1.0"}] , "x":1e2 }'


@pytest.fixture(scope="module")
def server() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, confdir: Path, server: Upstream) -> Iterator[Proxy]:
    servers = [
        {"name": "one", "url": server.url, "models": ["tiny"], "api_key": "sk-of-the-server", "type": "llama.cpp"},
    ]
    folder = tmp_path_factory.mktemp("transparency")
    with Proxy(folder, servers, aliases={"small": "tiny"}, default_model="tiny", confdir=confdir) as proxy:
        yield proxy
    assert "Traceback" not in proxy.log()


@pytest.fixture(scope="module")
def alice(proxy: Proxy) -> Key:
    return proxy.create_key("alice")


def last(server: Upstream) -> Request:
    return server.asked[-1]


# -- answers -----------------------------------------------------------------------------------------------------------

STREAM = load("chat_stream").response
WHOLE = load("chat").response
ANSWERS = {
    "stream, as it was": [STREAM.raw],
    "stream, byte by byte": pieces(STREAM.raw, 1),
    "stream, by 7": pieces(STREAM.raw, 7),
    "stream, cut within CRLFs": cut(STREAM.raw, *(at + 1 for at in range(len(STREAM.raw)) if STREAM.raw[at] == 13)),
    "whole, as it was": [WHOLE.raw],
    "whole, byte by byte": pieces(WHOLE.raw, 1),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_in_pieces(proxy: Proxy, alice: Key, server: Upstream, name: str) -> None:
    server.plan(ANSWERS[name])
    answer = post(proxy.port, CHAT, alice, BODY)
    assert (answer.status, answer.complete) == (200, True)
    assert answer.body == (STREAM if name.startswith("stream") else WHOLE).body


BODIES = {
    "no JSON": (b"\x00\xff\xfe garbage", "application/octet-stream"),
    "JSON of no format": (b'[1, null, {"usage": "a lot"}]', "application/json"),
    "cut JSON": (b'{"usage": {"prompt_tokens": ', "application/json"),
    "empty": (b"", "application/json"),
    "no JSON in a stream": (
        b"data: {\r\rnonsense\n\n\n:\n\ndata\n\ndata: \xff\xe2\x80\xa8x\r\n\r\n",
        "text/event-stream",
    ),
    "stream without its last blank line": (b'data: {"a":1}\n\ndata: [DONE]', "text/event-stream"),
    "stream with a BOM": (b"\xef\xbb\xbfdata: [DONE]\n\n", "text/event-stream"),
    "much after the end": (b"data: [DONE]\n\n" + b"data: more\n\n" * 1000, "text/event-stream"),
    "an event of 10 MB": (b"data: " + b"x" * 10_000_000 + b"\n\ndata: [DONE]\n\n", "text/event-stream"),
    "a body of 20 MB": (b"{" + b" " * 20_000_000 + b"}", "application/json"),
}


@pytest.mark.parametrize("framing", ["length", "chunked", "until the connection ends"])
@pytest.mark.parametrize("name", BODIES)
def test_any_bytes_pass(proxy: Proxy, alice: Key, server: Upstream, name: str, framing: str) -> None:
    body, content_type = BODIES[name]
    if framing == "length":
        server.plan(reply(body, content_type=content_type))
    elif framing == "chunked":
        begin = head(200, f"Content-Type: {content_type}", "Transfer-Encoding: chunked")
        server.plan((begin, *([chunk(body)] if body else []), chunk(b"")))
    else:
        server.plan((head(200, f"Content-Type: {content_type}") + body, CLOSE))
    answer = post(proxy.port, CHAT, alice, BODY)
    assert (answer.status, answer.complete) == (200, True)
    assert hashlib.sha256(answer.body).digest() == hashlib.sha256(body).digest()


def test_each_event_arrives_at_once(proxy: Proxy, alice: Key, server: Upstream) -> None:
    """The server says nothing more until the client has what was said so far, of all formats of events."""
    first = STREAM.body.index(b"\n\n") + 2  # until it is whole, another server can still take over
    parts = [STREAM.body[:first], STREAM.body[first:1300], *pieces(STREAM.body[1300:], 200)]
    begin = head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
    server.plan((begin, *(step for part in parts for step in (chunk(part), STALL)), chunk(b"")))
    with Connection(proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, alice, BODY))
        assert connection.head()[0] == 200
        for part in parts:
            assert connection.until(part + b"\r\n").endswith(chunk(part))
            server.wait_stalled()
            server.release()
        assert connection.until(b"0\r\n\r\n") == b"0\r\n\r\n"


def test_a_stream_is_not_held_back_by_a_broken_one(proxy: Proxy, alice: Key, server: Upstream) -> None:
    server.plan((*stream("data: 1\n\n")[:2], STALL, CLOSE))
    with Connection(proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, alice, BODY))
        connection.until(b"data: 1\n\n\r\n")
        server.wait_stalled()
        server.release()
        told = connection.rest()  # what happened, but no end of the chunks: the client sees that it was cut
    size, _, event = told.partition(b"\r\n")
    assert len(event) == int(size, 16) + 2
    assert error_in(CHAT, event)


# -- headers -----------------------------------------------------------------------------------------------------------

KEPT = [
    "X-One: 1",
    "x-ONE: 2",
    "Cookie: a=b",
    "X-Empty:",
    "Accept: text/*;q=0.5",
    "User-Agent: me/1",
    "X-Long: " + "l" * 8000,
    "Content-Type: application/json; charset=utf-8",
    "Via: 1.0 here",
    "Forwarded: for=1.2.3.4",
    "X-Latin: \xe9",
]
DROPPED = [
    "Connection: X-Hop, keep-alive",
    "X-Hop: 1",
    "Keep-Alive: timeout=5",
    "Proxy-Connection: keep-alive",
    "TE: trailers",
    "Proxy-Authorization: Basic abc",
    "X-Conversation-Id: mine",
    "Accept-Encoding: gzip",
    "X-Api-Key: sk-other",
    "Api-Key: sk-third",
]


def test_headers_to_the_server(proxy: Proxy, alice: Key, server: Upstream) -> None:
    mixed = [line for pair in zip(KEPT, DROPPED, strict=False) for line in pair] + KEPT[len(DROPPED) :]
    answer = post(proxy.port, CHAT, alice, BODY, [*mixed, "X-Request-ID: the-clients"])
    assert answer.status == 200
    lines = last(server).head.decode("latin-1").split("\r\n")[1:-2]
    assert [line.replace(": ", ":", 1) for line in lines] == [
        line.replace(": ", ":", 1)
        for line in (
            f"Host: 127.0.0.1:{server.port}",
            *KEPT,
            "X-Request-ID: the-clients",
            f"Content-Length: {len(BODY)}",
            "Accept-Encoding: identity",
            "Authorization: Bearer sk-of-the-server",
        )
    ]


@pytest.mark.parametrize(
    "header", ["Authorization: Bearer {}", "Authorization: bEaReR {}", "x-api-key: {}", "Api-Key: {}"]
)
def test_a_users_key_never_reaches_a_server(proxy: Proxy, alice: Key, server: Upstream, header: str) -> None:
    answer = ask(proxy.port, request("POST", CHAT, None, BODY, header.format(alice.key)))
    assert answer.status == 200
    got = last(server)
    assert alice.key.encode() not in got.head + got.raw_body
    assert got.values("authorization") == ["Bearer sk-of-the-server"]
    assert got.values("x-api-key") == got.values("api-key") == []


def test_headers_to_the_client(proxy: Proxy, alice: Key, server: Upstream) -> None:
    kept = [
        "X-One: 1",
        "x-ONE: 2",
        "Set-Cookie: a=1",
        "Set-Cookie: b=2",
        "Server: llama.cpp",
        "X-Empty: ",
        "X-Latin: \xe9",
    ]
    dropped = ["Connection: X-Hop", "X-Hop: 1", "Keep-Alive: timeout=5, max=100", "X-Request-ID: the-servers"]
    mixed = [kept[0], *dropped, *kept[1:]]
    server.plan(reply(b'{"a":1}', headers=mixed, content_type="application/json; charset=utf-8"))
    answer = post(proxy.port, CHAT, alice, BODY)
    (row,) = proxy.query("select id from requests order by id desc limit 1")
    assert [f"{name}: {value}" for name, value in answer.headers] == [
        "Content-Type: application/json; charset=utf-8",
        "Content-Length: 7",
        *kept,
        f"x-request-id: {row['id']}",
        "x-llmproxy-server: one",
        "x-llmproxy-route: only",
    ]


def test_request_ids(proxy: Proxy, alice: Key, server: Upstream) -> None:
    """The client gets ours; the server gets the client's, or ours when it has none; the row has both."""
    without = post(proxy.port, CHAT, alice, BODY)
    assert last(server).values("x-request-id") == without.values("x-request-id")
    given = post(proxy.port, CHAT, alice, BODY, ["X-Request-ID: mine"])
    assert last(server).values("x-request-id") == ["mine"]
    rows = proxy.query("select id, client_request_id from requests order by id desc limit 2")
    assert rows == [
        {"id": given.value("x-request-id"), "client_request_id": "mine"},
        {"id": without.value("x-request-id"), "client_request_id": None},
    ]


# -- requests ----------------------------------------------------------------------------------------------------------

TARGETS = [
    "/v1/chat/completions?a=1&b=%20&a=2?x",
    "/v1/nothing",
    "/v1/%63hat/completions",
    "/a%2Fb/%7Euser/%e2%82%ac",
    "/v1//double///slashes",
    "/with;semicolon=1/and,comma",
    "/?",
    "/tokenize?x=/slots",
]


@pytest.mark.parametrize("target", TARGETS)
def test_targets_pass_verbatim(proxy: Proxy, alice: Key, server: Upstream, target: str) -> None:
    answer = post(proxy.port, target, alice, BODY)
    assert answer.status == 200
    assert (last(server).target, last(server).body) == (target, BODY)
    (row,) = proxy.query("select endpoint, outcome from requests order by id desc limit 1")
    assert row == {"endpoint": target.partition("?")[0], "outcome": "ok"}


@pytest.mark.parametrize("body", [None, b"", b"not JSON", BODY], ids=["none", "empty", "text", "JSON"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "POST", "PURGE"])
def test_methods_pass(proxy: Proxy, alice: Key, server: Upstream, method: str, body: bytes | None) -> None:
    answer = ask(proxy.port, request(method, "/v1/files/7", alice, body))
    got = last(server)
    assert (answer.status, got.method, got.body) == (200, method, body or b"")
    assert got.values("content-length") == ([] if body is None else [str(len(body))])


def test_head(proxy: Proxy, alice: Key, server: Upstream) -> None:
    server.plan(head(200, "Content-Type: text/plain", "Content-Length: 1234", "X-A: 1"), path="/v1/thing")
    with Connection(proxy.port) as connection:
        answer = connection.ask(request("HEAD", "/v1/thing", alice), head_only=True)
        assert (answer.status, answer.value("content-length"), answer.value("x-a")) == (200, "1234", "1")
        assert connection.ask(request("POST", CHAT, alice, BODY)).status == 200  # no byte came too much
    rows = proxy.query("select endpoint, outcome, response_bytes from requests order by id desc limit 2")
    assert rows[1] == {"endpoint": "/v1/thing", "outcome": "ok", "response_bytes": 0}


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics"])
def test_head_of_our_own_answers(proxy: Proxy, alice: Key, path: str) -> None:
    with Connection(proxy.port) as connection:
        assert connection.ask(request("HEAD", path, alice), head_only=True).status == 200
        assert connection.ask(request("GET", path, alice)).status == 200


@pytest.mark.parametrize("status", [204, 304])
def test_answers_without_a_body(proxy: Proxy, alice: Key, server: Upstream, status: int) -> None:
    server.plan(head(status, "X-A: 1"))
    with Connection(proxy.port) as connection:
        answer = connection.ask(request("DELETE", "/v1/files/7", alice))
        assert (answer.status, answer.value("x-a"), answer.body) == (status, "1", b"")
        assert connection.ask(request("POST", CHAT, alice, BODY)).status == 200
    rows = proxy.query("select status, outcome from requests order by id desc limit 2")
    assert rows[1] == {"status": status, "outcome": "ok"}


def test_a_chunked_request(proxy: Proxy, alice: Key, server: Upstream) -> None:
    framed = b"".join(chunk(piece) for piece in pieces(BODY, 9)) + chunk(b"")
    data = request("POST", CHAT, alice, None, "Transfer-Encoding: chunked") + framed
    with Connection(proxy.port) as connection:
        for piece in pieces(data, 13):
            connection.sock.sendall(piece)
        assert connection.answer().status == 200
    assert last(server).raw_body == BODY


def test_a_large_body(proxy: Proxy, alice: Key, server: Upstream) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "wörd " * 4_000_000}], "model": "tiny"}).encode()
    assert len(body) > 20_000_000
    assert post(proxy.port, CHAT, alice, body).status == 200
    assert last(server).body == body
    (row,) = proxy.query("select request_bytes from requests order by id desc limit 1")
    assert row == {"request_bytes": len(body)}


# name -> body, and the same as it shall reach the server
ALIASED = {
    "spaces and order": (b'{ "x" : [1.0, 1e400] ,\n "model" :  "small" , "y":"\\u00e9"}\n', b'"small"', b'"tiny"'),
    "nested models stay": (b'{"a":{"model":"small"},"model":"small","m":"model"}', b'}, "', b'}, "'),
    "escaped": (b'{"mo\\u0064el":"sm\\u0061ll","z":0}', b'"sm\\u0061ll"', b'"tiny"'),
    "in text": (
        b'{"messages":[{"content":"\\"model\\":\\"small\\""}],"model":"small"}',
        b'"model":"small"',
        b'"model":"tiny"',
    ),
    "missing": (b'{ "a":1}', b'{ "a"', b'{"model":"tiny", "a"'),
    "missing, empty": (b"{ }", b"{ }", b'{"model":"tiny" }'),
}


@pytest.mark.parametrize("name", ALIASED)
def test_an_alias_changes_the_models_bytes_only(proxy: Proxy, alice: Key, server: Upstream, name: str) -> None:
    body, old, new = ALIASED[name]
    expected = b'{"a":{"model":"small"},"model":"tiny","m":"model"}' if "nested" in name else body.replace(old, new)
    assert post(proxy.port, CHAT, alice, body).status == 200
    assert last(server).body == expected


AUDIO = bytes(range(256)) * 40 + b"\r\n--other\r\nname=model\r\n\r\nsmall\r\n--bound"
FORM = (
    b'preamble\r\n--bound\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\n"
    + AUDIO
    + b'\r\n--bound\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--bound\r\n'
    b'Content-Disposition: form-data; name="language"\r\n\r\nsmall\r\n--bound--\r\nepilogue'
)


@pytest.mark.parametrize(("asked", "sent"), [(b"small", b"tiny"), (b"tiny", b"tiny")])
def test_audio(proxy: Proxy, alice: Key, server: Upstream, asked: bytes, sent: bytes) -> None:
    body, expected = FORM.replace(b"%b", asked), FORM.replace(b"%b", sent)
    server.plan(reply({"text": "hi", "usage": {"type": "tokens", "input_tokens": 7, "output_tokens": 2}}))
    answer = post(
        proxy.port, "/v1/audio/transcriptions", alice, body, ["Content-Type: multipart/form-data; boundary=bound"]
    )
    assert (answer.status, last(server).body) == (200, expected)
    names = "model, served_model, prompt_tokens, completion_tokens, tokens_source, outcome"
    (row,) = proxy.query(f"select {names} from requests order by id desc limit 1")
    assert row == {
        "model": asked.decode(),
        "served_model": "tiny",
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "tokens_source": "usage",
        "outcome": "ok",
    }


# -- connections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["whole", "stream"])
def test_an_http_1_0_client(proxy: Proxy, alice: Key, server: Upstream, behaviour: str) -> None:
    """Knows no chunks: an answer of unknown length ends with its connection."""
    server.plan(WHOLE.raw if behaviour == "whole" else STREAM.raw)
    with Connection(proxy.port) as connection:
        answer = connection.ask(request("POST", CHAT, alice, BODY, version="1.0"))
        assert connection.ended
    assert (answer.status, answer.body) == (200, (WHOLE if behaviour == "whole" else STREAM).body)
    assert answer.values("transfer-encoding") == []
    assert last(server).line[2] == "HTTP/1.1"


@pytest.mark.parametrize("behaviour", ["whole", "stream", "refusal"])
def test_a_client_that_wants_its_connection_closed(proxy: Proxy, alice: Key, server: Upstream, behaviour: str) -> None:
    if behaviour != "refusal":
        server.plan(WHOLE.raw if behaviour == "whole" else STREAM.raw)
    body = BODY if behaviour != "refusal" else b'{"model":"none"}'
    with Connection(proxy.port) as connection:
        answer = connection.ask(request("POST", CHAT, alice, body, "Connection: close"))
        assert connection.ended
    assert (answer.status, answer.complete) == (404 if behaviour == "refusal" else 200, True)
    assert [value.lower() for value in answer.values("connection")] == ["close"]
    if behaviour != "refusal":
        assert not {"close"} & set(last(server).values("connection"))


def test_a_connection_carries_many_requests(proxy: Proxy, alice: Key, server: Upstream) -> None:
    with Connection(proxy.port) as connection:
        for number in range(30):
            # A real server's stream ends its connection; one that speaks by the book is kept.
            server.plan(STREAM.raw if number % 3 == 0 else WHOLE.raw)
            answer = connection.ask(request("POST", CHAT, alice, BODY))
            assert answer.body == (STREAM if number % 3 == 0 else WHOLE).body
        assert connection.ask(request("GET", "/v1/chat", None)).status == 401
        assert connection.ask(request("POST", CHAT, alice, b"[]")).status == 400
        assert connection.ask(request("POST", CHAT, alice, BODY)).status == 200


def test_two_requests_at_once_on_one_connection(proxy: Proxy, alice: Key, server: Upstream) -> None:
    with Connection(proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, alice, BODY) + request("POST", "/second", alice, b"2"))
        assert (connection.answer().status, connection.answer().status) == (200, 200)
    assert [got.target for got in server.asked[-2:]] == [CHAT, "/second"]


def test_expect_100_continue(proxy: Proxy, alice: Key, server: Upstream) -> None:
    data = request("POST", CHAT, alice, BODY, "Expect: 100-continue")
    with Connection(proxy.port, timeout_s=5) as connection:
        connection.sock.sendall(data[: -len(BODY)])
        assert connection.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        connection.sock.sendall(BODY)
        assert connection.answer().status == 200
    assert (last(server).body, last(server).values("expect")) == (BODY, [])


class Http2Context(ssl.SSLContext):
    """httpx offers HTTP/1.1 first, and the first that it can speak is what mitmproxy takes."""

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        super().set_alpn_protocols(["h2"])


def test_http_2(proxy: Proxy, alice: Key, server: Upstream) -> None:
    server.plan(STREAM.raw, WHOLE.raw)
    context = Http2Context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with httpx.Client(http2=True, verify=context, headers=alice.headers, trust_env=False) as client:
        url = proxy.url.replace("http:", "https:") + CHAT
        first, second = client.post(url, content=BODY), client.post(url, content=BODY)
    assert (first.http_version, first.status_code, first.content) == ("HTTP/2", 200, STREAM.body)
    assert (second.http_version, second.status_code, second.content) == ("HTTP/2", 200, WHOLE.body)
    assert last(server).line[2] == "HTTP/1.1"
    rows = proxy.query("select outcome, tokens_source from requests order by id desc limit 2")
    assert rows == [{"outcome": "ok", "tokens_source": "usage"}, {"outcome": "ok", "tokens_source": "timings"}]


def test_a_slow_client_loses_nothing(proxy: Proxy, alice: Key, server: Upstream) -> None:
    """It begins to read when the server, the proxy and the kernel can hold no more of the answer."""
    events = [f'data: {{"choices":[],"n":{number},"x":"{"y" * 4000}"}}\n\n' for number in range(4000)]
    server.plan(stream(*events, "data: [DONE]\n\n"))
    with Connection(proxy.port) as connection:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        connection.sock.sendall(request("POST", CHAT, alice, BODY))
        assert select.select([connection.sock], [], [], 10)[0]
        latest = "select outcome from requests order by id desc limit 1"
        eventually(lambda: proxy.query(latest) == [{"outcome": "open"}], "the open row")
        answer = connection.answer()
    assert answer.complete
    assert answer.body == "".join([*events, "data: [DONE]\n\n"]).encode()
