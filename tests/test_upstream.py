"""The scripted upstream does what its scripts say: a fault that isn't there would let every test of a fault pass."""

import socket
import struct
import time

import httpx
import pytest

from upstream import (
    CLOSE,
    OK,
    RESET,
    STALL,
    Behaviour,
    Request,
    Upstream,
    chunk,
    cut,
    head,
    paced,
    pieces,
    reply,
    stream,
)
from waiting import eventually

POST = b"POST /v1/chat/completions?a=1 HTTP/1.1\r\nHost: x\r\n"


def talk(upstream: Upstream) -> socket.socket:
    return socket.create_connection(("127.0.0.1", upstream.port), timeout=10)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the end of the connection."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def ask(upstream: Upstream) -> bytes:
    with talk(upstream) as sock:
        sock.sendall(POST + b"Content-Length: 2\r\n\r\n{}")
        return read_all(sock)


def ask_once(upstream: Upstream) -> int:
    return httpx.post(f"{upstream.url}/x", json={}).status_code


@pytest.mark.parametrize(
    ("body", "content"),
    [
        pytest.param(b"Content-Length: 5\r\n\r\nhello", b"hello", id="length"),
        pytest.param(b"\r\n", b"", id="none"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", b"hello", id="chunked"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n1\r\nh\r\n0\r\nA: b\r\nC: d\r\n\r\n", b"h", id="trailers"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_requests_are_kept_to_the_byte(upstream: Upstream, body: bytes, content: bytes, size: int) -> None:
    with talk(upstream) as sock:
        for piece in pieces((POST + body) * 2, size):
            sock.sendall(piece)
        first, second = upstream.wait_requests(2)
    assert first == second == Request(0, first.head, first.raw_body, content)
    assert first.head + first.raw_body == POST + body
    assert (first.method, first.path, first.target) == ("POST", "/v1/chat/completions", "/v1/chat/completions?a=1")
    assert first.values("HOST") == ["x"]
    assert upstream.connections == 1


@pytest.mark.parametrize(
    ("behaviour", "answer"),
    [
        pytest.param(CLOSE, b"", id="no byte"),
        pytest.param((OK, CLOSE), OK, id="closed after the reply"),
        pytest.param((b"HTTP/1.1 200 OK\r\nCont", CLOSE), b"HTTP/1.1 200 OK\r\nCont", id="partial head"),
        pytest.param(
            (*stream("data: 1\n\n")[:2], CLOSE),
            head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked") + chunk("data: 1\n\n"),
            id="cut stream",
        ),
        pytest.param((b"\x00\xff garbage", CLOSE), b"\x00\xff garbage", id="garbage"),
        pytest.param((*pieces(OK, 10), CLOSE), OK, id="pieces"),
        pytest.param((*cut(OK, 3, 17), CLOSE), OK, id="cut"),
        pytest.param(lambda request: [reply(request.json()), CLOSE], reply({}), id="from the request"),
    ],
)
def test_behaviours(upstream: Upstream, behaviour: Behaviour, answer: bytes) -> None:
    upstream.plan(behaviour)
    assert ask(upstream) == answer
    assert not upstream.left


@pytest.mark.parametrize("steps", [RESET, (b"HTTP/1.1 200 OK\r\n", RESET)])
def test_reset(upstream: Upstream, steps: Behaviour) -> None:
    upstream.plan(steps)
    with pytest.raises(ConnectionResetError):
        ask(upstream)


def test_plans_come_before_what_is_always_so(upstream: Upstream) -> None:
    upstream.plan(reply({"error": 1}, status=503))
    upstream.plan(reply({"a": 1}), path="/a")
    upstream.always("/b", reply({"b": 1}))
    with httpx.Client(base_url=upstream.url) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert client.post("/a", content=b"").json() == {"a": 1}
        assert client.post("/b", content=b"").status_code == 503
        assert client.post("/b", content=b"").json() == {"b": 1}
        assert client.post("/c", content=iter([b"x", b"y"])).json()["usage"]["prompt_tokens"] == 3
    assert upstream.requests[-1].body == b"xy"
    assert upstream.connections == 1


def test_pace_and_keep_alive(upstream: Upstream) -> None:
    upstream.plan(paced(stream("data: 1\n\n", "data: 2\n\n"), 0.02))
    with httpx.Client(base_url=upstream.url) as client:
        start = time.monotonic()
        assert client.post("/x").text == "data: 1\n\ndata: 2\n\n"
        assert time.monotonic() - start >= 0.06
        client.post("/x")
    assert upstream.connections == 1


def test_stall_until_released(upstream: Upstream) -> None:
    begin, event, end = stream("data: 1\n\n")
    upstream.plan((begin, STALL, event, end, CLOSE))
    with talk(upstream) as sock:
        sock.sendall(POST + b"\r\n")
        upstream.wait_stalled()
        assert sock.recv(65536) == begin
        upstream.release()
        assert read_all(sock) == chunk("data: 1\n\n") + chunk(b"")


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_is_noticed(upstream: Upstream, reset: bool) -> None:
    upstream.plan(STALL)
    with talk(upstream) as sock:
        sock.sendall(POST + b"\r\n")
        upstream.wait_stalled()
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert upstream.wait_left()[0].method == "POST"
    eventually(lambda: upstream.open == 0)


def test_connections_can_end_before_a_request(upstream: Upstream) -> None:
    upstream.plan_connections(CLOSE, RESET)
    with talk(upstream) as sock:
        assert sock.recv(1) == b""
    with pytest.raises(ConnectionResetError), talk(upstream) as sock:
        sock.recv(1)
    assert ask_once(upstream) == 200


def test_refuse_and_listen_again(upstream: Upstream) -> None:
    upstream.plan(STALL)
    with talk(upstream) as sock:
        sock.sendall(POST + b"\r\n")
        upstream.wait_stalled()
        upstream.refuse()
        assert read_all(sock) == b""
    assert not upstream.left
    with pytest.raises(ConnectionRefusedError):
        talk(upstream)
    upstream.listen()
    assert ask_once(upstream) == 200


def test_dropped_connections(upstream: Upstream) -> None:
    with talk(upstream) as sock:
        sock.sendall(POST + b"\r\n")
        assert sock.recv(65536) == OK
        upstream.drop_connections()
        assert sock.recv(1) == b""
    assert ask_once(upstream) == 200


@pytest.mark.parametrize("sent", [b"POST / HT", b"nonsense\r\n\r\n", POST + b"Content-Length: 9\r\n\r\nhel"])
def test_what_is_no_request_is_kept_too(upstream: Upstream, sent: bytes) -> None:
    with talk(upstream) as sock:
        sock.sendall(sent)
    eventually(lambda: upstream.incomplete == [sent])
    assert not upstream.requests
