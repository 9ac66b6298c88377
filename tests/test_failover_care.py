"""What must not happen on the way from a failed server to another: a mix of answers, a stall, a secret told."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from conftest import StartProxy
from pairs import SSE, good_body, good_reply
from proxy import Key, Proxy
from rawhttp import Connection, ask, post, request
from upstream import CLOSE, STALL, Upstream, chunk, head, reply
from waiting import eventually

CHAT = "/v1/chat/completions"
STREAMED = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "go"}]}
FIRST = 1000
SECRET = b"ALICES-OWN-WORDS are here\r\n\r\n"

type Two = tuple[Proxy, Key, Upstream, Upstream]


@pytest.fixture
def two(start_proxy: StartProxy, start_upstream: Callable[[], Upstream]) -> Two:
    return start_two(start_proxy, start_upstream)


def start_two(start_proxy: StartProxy, start_upstream: Callable[[], Upstream], **more: Any) -> Two:
    """Every request goes to the first, as long as it is well."""
    first, second = start_upstream(), start_upstream()
    servers = [
        {"name": name, "url": upstream.url, "models": ["tiny"], "type": "llama.cpp", "weight": weight}
        for name, upstream, weight in (("first", first, FIRST), ("second", second, 0.001))
    ]
    proxy = start_proxy(servers, **{"routing": {"strategy": "round-robin", "backoff_s": 0.01}, **more})
    return proxy, proxy.create_key("alice"), first, second


def test_nobody_hears_what_a_broken_server_sent_to_another(two: Two) -> None:
    proxy, alice, first, second = two
    bob = proxy.create_key("bob")
    first.plan(*[(SECRET, CLOSE)] * 10)
    second.plan(*[(SECRET, CLOSE)] * 10)
    told = b"".join(post(proxy.port, CHAT, key, STREAMED).body for key in (alice, alice, bob, bob))
    assert b"ALICES" not in told
    eventually(lambda: proxy.query("select * from server_events where state = 'ejected'"), "an ejection")
    assert "ALICES" not in json.dumps(proxy.query("select * from server_events"))
    assert "ALICES" not in proxy.log()


def test_half_a_comment_swallows_nothing(two: Two) -> None:
    proxy, alice, first, second = two
    first.plan((SSE, chunk(": ping\n\n"), chunk(": pi"), CLOSE))
    second.plan((SSE, chunk("data: 1\n\n"), chunk("data: [DONE]\n\n"), chunk(b"")))
    answer = post(proxy.port, CHAT, alice, STREAMED)
    assert answer.body == b": ping\n\n: pi\n\ndata: 1\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize(
    ("path", "last"), [(CHAT, "data: [DONE]\n\n"), ("/v1/messages", 'data: {"type":"message_stop"}\n\n')]
)
def test_no_error_after_the_last_word(two: Two, path: str, last: str) -> None:
    proxy, alice, first, _ = two
    first.plan((SSE, chunk("data: {}\n\n"), chunk(last), CLOSE))
    answer = post(proxy.port, path, alice, STREAMED)
    assert (answer.body, answer.complete) == (b"data: {}\n\n" + last.encode(), False)


def test_an_error_event_fills_no_content_length(two: Two) -> None:
    proxy, alice, first, _ = two
    first.plan((head(200, "Content-Type: text/event-stream", "Content-Length: 200"), b"data: 1\n\n", CLOSE))
    answer = post(proxy.port, CHAT, alice, STREAMED)
    assert (answer.body, answer.complete) == (b"data: 1\n\n", False)


def test_a_refusal_closes_http_1_0(two: Two) -> None:
    proxy, alice, first, second = two
    first.plan(CLOSE, CLOSE, CLOSE)
    second.plan(CLOSE, CLOSE, CLOSE)
    with Connection(proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, alice, json.dumps(STREAMED).encode(), version="1.0"))
        assert b"upstream_unreachable" in connection.rest()


def test_a_refused_head_has_no_body(two: Two) -> None:
    proxy, _, _, _ = two
    with Connection(proxy.port) as connection:
        connection.sock.sendall(request("HEAD", "/v1/nothing", Key(0, "", "sk-x")))
        assert connection.until(b"\r\n\r\n").startswith(b"HTTP/1.1 401")
        connection.sock.sendall(request("GET", "/health"))
        assert connection.until(b"\r\n").startswith(b"HTTP/1.1 200")


def test_an_error_in_ten_thousand_pieces_stalls_nobody(two: Two) -> None:
    """Its pieces are looked at once: nothing here is measured but that others are served meanwhile."""
    proxy, alice, first, _ = two
    pieces = b"".join(chunk(b"x") for _ in range(20_000))
    first.plan((head(503, "Transfer-Encoding: chunked"), pieces, chunk(b"")))
    began = time.monotonic()
    assert post(proxy.port, CHAT, alice, STREAMED).status == 200
    assert time.monotonic() - began < 10


def test_a_fallback_makes_nothing_less_available(
    start_proxy: StartProxy, start_upstream: Callable[[], Upstream]
) -> None:
    """The wanted model's server loads, the fallback's is gone: the wanted one is waited for."""
    big, small = start_upstream(), start_upstream()
    big.always("/health", reply({"error": {"message": "Loading model"}}, 503))
    big.always(CHAT, good_reply("big"))
    small.refuse()
    servers = [
        {"name": name, "url": upstream.url, "models": [name], "type": "openai"}
        for name, upstream in (("big", big), ("small", small))
    ]
    proxy = start_proxy(servers, fallbacks={"big": ["small"]}, health={"interval_s": 0.2})
    key = proxy.create_key("alice")
    with Connection(proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, key, b'{"model":"big"}'))
        eventually(lambda: json.loads(ask(proxy.port, request("GET", "/health")).body)["waiting"] == 1, "a wait")
        big.always("/health", reply({"status": "ok"}))
        assert b'"big"' in connection.until(good_body("big"))
    row = proxy.wait_rows(1)[0]
    assert (row["outcome"], row["served_model"], row["fallback_from"]) == ("ok", "big", None)


def test_who_leaves_before_the_first_probe_does_not_wait(
    start_proxy: StartProxy, start_upstream: Callable[[], Upstream]
) -> None:
    upstream = start_upstream()
    upstream.plan((STALL, reply({"status": "ok"})), path="/health")
    proxy = start_proxy([{"name": "a", "url": upstream.url, "models": ["tiny"], "slots": 1}], health={"timeout_s": 20})
    key = proxy.create_key("alice")
    upstream.wait_stalled()
    connections = [Connection(proxy.port) for _ in range(3)]
    for connection in connections:
        connection.sock.sendall(request("POST", CHAT, key, b'{"model":"tiny"}'))
    proxy.wait_rows(3, settled=False)
    for connection in connections:
        connection.reset()
    upstream.release()
    rows = proxy.wait_rows(3)
    assert {row["outcome"] for row in rows} == {"client_closed"}
    health = json.loads(ask(proxy.port, request("GET", "/health")).body)
    assert (health["running"], health["waiting"]) == (0, 0)
