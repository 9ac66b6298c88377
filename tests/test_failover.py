"""A request whose server fails goes to the other server of its model, as long as no event has reached the client. After
that, the client is told within the stream.
"""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from conftest import StartProxy
from dialects import CHAT, MESSAGES, PATHS, error_in, events, has_end_mark, stream_of
from pairs import (
    CALM,
    OVERLOADED,
    SCRIPTED,
    SSE,
    Pair,
    good_body,
    good_reply,
    health,
    pairs,
    paused_for,
    row_of,
    states,
)
from rawhttp import Answer, Connection, post, request
from upstream import CLOSE, RESET, STALL, Act, Behaviour, Pause, Request, Step, Steps, Upstream, chunk, head, reply
from waiting import eventually

COMMENT = chunk(":\n\n")  # llama-server's ping
STATUSES = (502, 503, 504, 429)
FIRST_BYTE_TIMEOUT_S = 0.3
MAX_ATTEMPTS = 3


def refusal(status: int) -> bytes:
    return reply({"error": {"message": "from the first"}}, status, headers=["X-From: first"])


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("failover")
    more: dict[str, Any] = {
        "aliases": {"a-name-of-its-own": "tiny"},
        "routing": CALM["routing"] | {"max_attempts": MAX_ATTEMPTS},
    }
    with pairs(folder, confdir, ["tiny"], first_byte_timeout_s=FIRST_BYTE_TIMEOUT_S, **more) as made:
        yield made["tiny"]


@pytest.fixture
def pair(long_lived: Pair) -> Iterator[Pair]:
    """The same for all tests, with nothing planned. No test leaves anything running."""
    for actor in (long_lived.first, long_lived.second):
        actor.reset()
    yield long_lived
    eventually(lambda: health(long_lived.proxy)["running"] == 0, "the end of all claims")
    assert health(long_lived.proxy)["waiting"] == 0


# -- before the first event --------------------------------------------------------------------------------------------

FAULTS: dict[str, Behaviour] = {
    "closed": CLOSE,
    "reset": RESET,
    "one byte": (b"H", CLOSE),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-Le", CLOSE),
    "half a head, reset": (b"HTTP/1.1 200 OK\r\nContent-Le", RESET),
    "garbage": (b"\x00\xff garbage\r\n\r\n", CLOSE),
    "silent": STALL,
    **{str(status): refusal(status) for status in STATUSES},
    "503 in HTML": reply(b"<h1>no</h1>", 503, "text/html"),
    "two lengths": (head(200, "Content-Length: 2", "Transfer-Encoding: chunked"), b"2\r\n{}\r\n0\r\n\r\n", CLOSE),
    "a bad header": (head(200, "Bad Name: x", "Content-Length: 2"), b"{}"),
    "an interim answer": (b"HTTP/1.1 103 Early Hints\r\n\r\n", CLOSE),
    "later, in words": paused_for("soon"),
    "later, in the year 99999999999999": paused_for("Mon, 01 Jan 99999999999999 00:00:00 GMT"),
}
STREAM_FAULTS: dict[str, Behaviour] = {
    "head": (SSE, CLOSE),
    "head, reset": (SSE, RESET),
    "head and garbage": (SSE, b"zz\r\n\r\n", CLOSE),
    "head and half an event": (SSE, chunk('data: {"cho'), CLOSE),
    "head, then silent": (SSE, STALL),
    "head and a clean end": (SSE, chunk(b"")),
    "head, half an event and a clean end": (SSE, chunk('data: {"cho'), chunk(b"")),
}
WHOLE_FAULTS: dict[str, Behaviour] = {
    "head": (head(200, "Content-Type: application/json", "Content-Length: 10"), CLOSE),
    "head, reset": (head(200, "Content-Type: application/json", "Content-Length: 10"), RESET),
    "chunked head": (head(200, "Content-Type: application/json", "Transfer-Encoding: chunked"), CLOSE),
}


def moved(pair: Pair, answer: Answer, streamed: bool, path: str = CHAT) -> None:
    """The client has exactly what the second server said, and one row tells of both attempts."""
    assert (answer.status, answer.complete, answer.body) == (200, True, good_body("tiny second", path, streamed))
    assert answer.values("x-from") == ["tiny second"]
    assert answer.values("x-llmproxy-server") == ["tiny second"]
    assert answer.values("x-llmproxy-route") == ["retry"]
    row = row_of(pair.proxy, answer)
    assert pair.sent() == (1, 1)
    assert (row["outcome"], row["status"], row["attempts"]) == ("ok", 200, 2)
    assert (row["server"], row["route"], row["fallback_from"]) == ("tiny second", "retry", None)
    assert row["error_code"] is None


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_the_other_server_takes_over(pair: Pair, fault: str, streamed: bool) -> None:
    pair.first.plan(FAULTS[fault])
    moved(pair, pair.ask(stream=streamed), streamed)


def test_a_refused_connection(start_proxy: StartProxy, start_upstream: Callable[[], Upstream]) -> None:
    """Once: from then on it is known. The server has to be there first, or the first probe would know."""
    first, second = start_upstream(), start_upstream()
    second.always(CHAT, good_reply("second"))
    servers = [
        {"name": name, "url": upstream.url, "models": ["tiny"], "weight": weight, **SCRIPTED}
        for name, upstream, weight in (("first", first, 1000), ("second", second, 1))
    ]
    proxy = start_proxy(servers, **CALM)
    key = proxy.create_key("alice")
    eventually(lambda: states(proxy) == {"first": "up", "second": "up"}, "the first probes")
    first.refuse()
    for attempts in (2, 1):
        answer = post(proxy.port, CHAT, key, {"model": "tiny"})
        assert (answer.status, answer.complete, answer.body) == (200, True, good_body("second"))
        row = row_of(proxy, answer)
        assert (row["outcome"], row["attempts"], row["server"]) == ("ok", attempts, "second")


@pytest.mark.parametrize("fault", STREAM_FAULTS)
def test_a_streams_head_is_no_event(pair: Pair, fault: str) -> None:
    pair.first.plan(STREAM_FAULTS[fault])
    moved(pair, pair.ask(stream=True), True)


@pytest.mark.parametrize("fault", WHOLE_FAULTS)
def test_a_whole_answers_head_is_nothing_of_it_yet(pair: Pair, fault: str) -> None:
    pair.first.plan(WHOLE_FAULTS[fault])
    moved(pair, pair.ask(), False)


@pytest.mark.parametrize("path", PATHS)
def test_on_each_endpoint(pair: Pair, path: str) -> None:
    pair.first.plan((SSE, CLOSE))
    moved(pair, pair.ask(path, stream=True), True, path)


@pytest.mark.parametrize("fault", [CLOSE, RESET, STALL], ids=["closed", "reset", "silent"])
def test_after_a_comment_the_answer_goes_on(pair: Pair, fault: Act) -> None:
    """The client has a head and a comment of the first server: the second's events follow them."""
    pair.first.plan((SSE, COMMENT, COMMENT, fault))
    answer = pair.ask(stream=True)
    assert (answer.status, answer.complete) == (200, True)
    assert answer.body == b":\n\n:\n\n" + good_body("tiny second", streamed=True)
    assert answer.values("x-llmproxy-server") == ["tiny first"]  # the head was on its way
    row = row_of(pair.proxy, answer)
    assert (row["outcome"], row["attempts"], row["server"]) == ("ok", 2, "tiny second")


AFTER_A_COMMENT: dict[str, Behaviour] = {
    "closed": CLOSE,
    "503": OVERLOADED,
    "400": reply({"error": {"message": "never"}}, 400),
    "head": (SSE, CLOSE),
    "silent": STALL,
}


@pytest.mark.parametrize("fault", AFTER_A_COMMENT)
def test_after_a_comment_nobody_goes_on(pair: Pair, fault: str) -> None:
    """Its status has been sent: what the client can be told, it is told within the stream."""
    pair.first.plan((SSE, COMMENT, CLOSE))
    pair.first.always = pair.second.always = AFTER_A_COMMENT[fault]
    answer = pair.ask(stream=True)
    assert (answer.status, answer.complete) == (200, False)
    assert answer.body.startswith(b":\n\n")
    assert error_in(CHAT, answer.body)
    assert len(events(answer.body)) == 1
    row = row_of(pair.proxy, answer)
    assert row["outcome"] not in ("ok", "client_closed")
    assert row["attempts"] == sum(pair.sent())


def test_a_comment_comes_at_once(pair: Pair) -> None:
    """And with it the head: a client that waits for a long prompt sees that somebody is there."""
    pair.first.plan((SSE, COMMENT, STALL))
    with Connection(pair.proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, pair.key, pair.body(stream=True)))
        assert connection.head()[0] == 200
        assert connection.until(b":\n\n")
        assert pair.sent() == (1, 0)


BODY = '{ "model" :"%s",\n"stream":false,"messages":[{"role":"user","content":"\\u00e9 é 日"}],"x":1e3,"x":2 }'


@pytest.mark.parametrize("name", ["tiny", "a-name-of-its-own"])
def test_the_other_server_gets_the_same_bytes(pair: Pair, name: str) -> None:
    pair.first.plan(OVERLOADED)
    answer = pair.ask(body=(BODY % name).encode(), headers=["X-Mine: 1", "Content-Type: application/json"])
    moved(pair, answer, False)
    (one,), (other,) = pair.first.requests, pair.second.requests
    assert one.body == other.body == (BODY % "tiny").encode()
    assert one.line == other.line
    assert [field for field in one.headers if field[0] != "host"] == [
        field for field in other.headers if field[0] != "host"
    ]


def test_a_connection_goes_on_after_a_failover(pair: Pair) -> None:
    """Its next requests find a working gateway, whatever came of the one before."""
    with Connection(pair.proxy.port) as connection:
        for fault in (CLOSE, refusal(503), (SSE, CLOSE), None):
            pair.first.reset()
            if fault:
                pair.first.plan(fault)
            answer = connection.ask(request("POST", CHAT, pair.key, pair.body(stream=True)))
            name = "tiny second" if fault else "tiny first"
            assert (answer.complete, answer.body) == (True, good_body(name, streamed=True))


# -- what is not tried again -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 400, 401, 404, 413, 422, 501])
def test_an_error_that_another_server_would_make_too(pair: Pair, status: int) -> None:
    """llama-server says 500 to some mistakes of the client's."""
    pair.first.plan(refusal(status))
    answer = pair.ask()
    assert (answer.status, answer.json()) == (status, {"error": {"message": "from the first"}})
    assert answer.values("x-from") == ["first"]
    assert answer.values("x-llmproxy-server") == ["tiny first"]
    assert answer.values("x-llmproxy-route") == ["round-robin"]
    row = row_of(pair.proxy, answer)
    assert pair.sent() == (1, 0)
    assert (row["outcome"], row["status"], row["attempts"], row["server"]) == ("error", status, 1, "tiny first")


def test_a_client_that_leaves_is_not_served_elsewhere(pair: Pair) -> None:
    pair.first.plan(STALL)
    before = len(pair.proxy.rows())
    with Connection(pair.proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, pair.key, pair.body()))
        eventually(lambda: pair.sent() == (1, 0), "the request at the first server")
        connection.reset()
    row = pair.proxy.wait_rows(before + 1)[-1]
    assert (row["outcome"], row["attempts"], pair.sent()) == ("client_closed", 1, (1, 0))


# -- nobody answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", STATUSES)
def test_all_refuse(pair: Pair, status: int) -> None:
    """The client gets the last one's own answer."""
    numbers = count(1)

    def refuse(_: Request) -> Steps:
        return reply({"refusal": next(numbers)}, status, headers=["X-Reason: mine", "Connection: close"])

    pair.first.always = pair.second.always = refuse
    answer = pair.ask(stream=True)
    sent = sum(pair.sent())
    assert 2 <= sent <= MAX_ATTEMPTS
    assert min(pair.sent()) >= 1
    assert (answer.status, answer.json(), answer.values("x-reason")) == (status, {"refusal": sent}, ["mine"])
    assert answer.complete
    row = row_of(pair.proxy, answer)
    assert (row["outcome"], row["status"], row["attempts"]) == ("error", status, sent)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_all_die(pair: Pair, path: str) -> None:
    pair.first.always, pair.second.always = (SSE, CLOSE), RESET
    answer = pair.ask(path, stream=True)
    assert (answer.status, answer.code) == (502, "upstream_unreachable")
    row = row_of(pair.proxy, answer)
    assert (row["outcome"], row["status"], row["error_code"]) == ("unreachable", 502, "upstream_unreachable")
    assert row["attempts"] == sum(pair.sent()) >= 2


def test_all_are_silent(pair: Pair) -> None:
    pair.first.always, pair.second.always = STALL, (SSE, STALL)
    answer = pair.ask(stream=True)
    assert (answer.status, answer.code) == (504, "upstream_timeout")
    row = row_of(pair.proxy, answer)
    assert (row["outcome"], row["status"], row["error_code"]) == ("unreachable", 504, "upstream_timeout")
    assert row["attempts"] == sum(pair.sent()) >= 2


def test_one_refuses_and_the_others_die(pair: Pair) -> None:
    """An answer is worth more than none."""
    pair.first.always, pair.second.always = refusal(503), CLOSE
    answer = pair.ask()
    assert (answer.status, answer.json()) == (503, {"error": {"message": "from the first"}})
    row = row_of(pair.proxy, answer)
    assert (row["outcome"], row["status"], row["attempts"]) == ("error", 503, sum(pair.sent()))


# -- after the first event ---------------------------------------------------------------------------------------------

ENDS: dict[str, list[Step]] = {
    "closed": [CLOSE],
    "reset": [Pause(0.05), RESET],  # so that it does not overtake what was sent before it
    "garbage": [b"zz\r\n\r\n", CLOSE],
    "within an event": [chunk('data: {"cho'), CLOSE],
    "within a line's end": [chunk("data: 1\n"), CLOSE],
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("path", PATHS)
def test_the_client_is_told_of_a_cut(pair: Pair, path: str, end: str) -> None:
    whole = stream_of(path, "tiny first")
    pair.first.plan([SSE, chunk(whole[0]), chunk(whole[1]), *ENDS[end]])
    answer = pair.ask(path, stream=True)
    assert (answer.status, answer.complete) == (200, False)
    assert answer.body.startswith("".join(whole[:2]).encode())
    assert error_in(path, answer.body)
    assert not has_end_mark(path, answer.body)
    assert b"[DONE]" not in answer.body
    row = row_of(pair.proxy, answer)
    assert (row["outcome"], row["status"], row["attempts"]) == ("upstream_cut", 200, 1)
    assert (row["server"], pair.sent()) == ("tiny first", (1, 0))


def test_an_error_event_of_the_servers_own_is_passed_on(pair: Pair) -> None:
    """It ends the stream as it wants to: llama-server does so when its memory for the context is used up."""
    error = {"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}}
    said = stream_of(CHAT, "tiny first")[0] + f"data: {json.dumps(error)}\n\n"
    pair.first.plan((SSE, chunk(said), chunk(b"")))
    answer = pair.ask(stream=True)
    assert answer.body == said.encode()
    assert (row_of(pair.proxy, answer)["outcome"], pair.sent()) == ("error", (1, 0))


def test_half_a_whole_answer(pair: Pair) -> None:
    """Its first bytes are with the client: there is nothing to go on with, and nothing to say."""
    first = head(200, "Content-Type: application/json", "Content-Length: 100") + b'{"choices":'
    pair.first.plan((first, CLOSE))
    answer = pair.ask()
    assert (answer.status, answer.complete, answer.body) == (200, False, b'{"choices":')
    row = row_of(pair.proxy, answer)
    assert (row["outcome"], row["attempts"], pair.sent()) == ("upstream_cut", 1, (1, 0))


# -- the checks themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_good_answer(pair: Pair, path: str) -> None:
    for streamed in (False, True):
        answer = pair.ask(path, stream=streamed)
        assert (answer.status, answer.complete) == (200, True)
        assert answer.body == good_body("tiny first", path, streamed)
        assert (has_end_mark(path, answer.body) if streamed else True, error_in(path, answer.body)) == (True, None)
        row = row_of(pair.proxy, answer)
        assert (row["outcome"], row["attempts"], row["server"]) == ("ok", 1, "tiny first")


def test_a_good_answers_headers(pair: Pair) -> None:
    answer = pair.ask()
    assert answer.values("x-llmproxy-server") == ["tiny first"]
    assert answer.values("x-llmproxy-route") == ["round-robin"]
    assert answer.values("x-llmproxy-fallback") == []
    row = row_of(pair.proxy, answer)
    assert (row["route"], row["fallback_from"]) == ("round-robin", None)
    assert row["queue_ms"] >= 0
