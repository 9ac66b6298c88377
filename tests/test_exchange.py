"""One request's body for its server, its end, and its row."""

import uuid
from typing import Any

import msgspec
import pytest

from gateway.auth import Caller
from gateway.balancer import Search
from gateway.exchange import Exchange
from gateway.records import Row, utc_now, uuid7
from gateway.relay import BodyMeter, Relay, StreamMeter
from gateway.servers import Claim, Server
from gateway.settings import Server as ServerConfig
from gateway.strategies import Choice, Report, Wanted
from gateway.tally import Tally
from gateway.usage import read_openai
from gateway.wire import Asked, read_json, read_multipart

CHAT = "/v1/chat/completions"


def exchange(**more: Any) -> Exchange:
    return Exchange(
        **{
            "id": "id-1",
            "caller": Caller(7, "alice", ()),
            "endpoint": CHAT,
            "path": CHAT + "?a=b",
            "started_at": "2026-11-21T09:30:00.000Z",
            "started": 100.0,
            "worker": "w-1",
            "max_body_bytes": 1000,
            **more,
        }
    )


def server(kind: str | None = "llama.cpp") -> Server:
    return Server(ServerConfig("gpu-1", "http://h:1", type=kind))


JSON_BODIES: dict[str, tuple[bytes, dict[str, Any], str | None, bytes, bool]] = {
    "as it is": (b'{"model":"m"}', {"served_model": "m"}, "llama.cpp", b'{"model":"m"}', False),
    "renamed": (b'{"model":"fast", "x":1}', {"served_model": "m"}, "llama.cpp", b'{"model":"m", "x":1}', False),
    "no model, one to choose from": (b"{}", {"served_model": "m"}, "llama.cpp", b"{}", False),
    "no model, a default": (b"{}", {"served_model": "m", "fill_in_model": True}, "llama.cpp", b'{"model":"m"}', False),
    "null, a default": (
        b'{"model":null}',
        {"served_model": "m", "fill_in_model": True},
        "llama.cpp",
        b'{"model":"m"}',
        False,
    ),
    "no model known": (b'{"model":"m"}', {}, "llama.cpp", b'{"model":"m"}', False),
    "usage asked": (
        b'{"model":"m","stream":true}',
        {"served_model": "m"},
        "openai",
        b'{"stream_options":{"include_usage":true},"model":"m","stream":true}',
        True,
    ),
    "usage asked, and renamed": (
        b'{"model":"a","stream":true,"stream_options":null}',
        {"served_model": "m"},
        "openai",
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}',
        True,
    ),
    "the client asked itself": (
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}',
        {"served_model": "m"},
        "openai",
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}',
        False,
    ),
    "not streamed": (b'{"model":"m"}', {"served_model": "m"}, "openai", b'{"model":"m"}', False),
    "an unknown server is left alone": (b'{"stream":true}', {"served_model": "m"}, None, b'{"stream":true}', False),
    "another endpoint": (
        b'{"stream":true}',
        {"served_model": "m", "endpoint": "/v1/messages"},
        "openai",
        b'{"stream":true}',
        False,
    ),
}


@pytest.mark.parametrize(("body", "more", "kind", "expected", "usage_asked"), JSON_BODIES.values(), ids=JSON_BODIES)
def test_json_bodies(body: bytes, more: dict[str, Any], kind: str | None, expected: bytes, usage_asked: bool) -> None:
    one = exchange(body=body, asked=read_json(body), **more)
    assert one.body_for(server(kind), "application/json") == expected
    assert (one.usage_asked, one.body) == (usage_asked, body)


def test_usage_is_not_stripped_when_the_next_server_was_not_asked() -> None:
    body = b'{"stream":true}'
    one = exchange(body=body, asked=read_json(body))
    one.body_for(server("openai"), "")
    assert one.usage_asked
    assert one.body_for(server("llama.cpp"), "") == body
    assert not one.usage_asked


@pytest.mark.parametrize("body", [b"", b"text", b'[{"a":1}]', b"\x00{\xff}", b"a=b&c={d}"], ids=repr)
def test_what_is_no_json_object_is_never_touched(body: bytes) -> None:
    one = exchange(body=body, asked=Asked(), served_model="m", fill_in_model=True, endpoint="/unknown")
    assert one.body_for(server(), "application/octet-stream") == body


def test_forms() -> None:
    form = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nfast\r\n--B--\r\n'
    content_type = "Multipart/form-data; boundary=B"
    one = exchange(body=form, asked=read_multipart(form, content_type), served_model="whisper")
    assert one.body_for(server("openai"), content_type) == form.replace(b"fast", b"whisper")


def relay(answer: bytes, streamed: bool, first_event_at: float = 100.25) -> Relay:
    tally = Tally()
    meter = StreamMeter(read_openai, tally) if streamed else BodyMeter(read_openai, tally)
    made = Relay(meter, tally, lambda: first_event_at, is_stream=streamed, has_mark=streamed)
    made.feed(answer)
    made.close()
    return made


OK_STREAM = (
    b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"timings":{"cache_n":46,"prompt_n":1,'
    b'"prompt_ms":0.5,"predicted_n":6,"predicted_ms":1.5}}\n\ndata: [DONE]\n\n'
)
ERROR_STREAM = b'data: {"error":{"type":"server_error"}}\n\n'
CUT_STREAM = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'

OUTCOMES: dict[str, tuple[dict[str, Any], str, str]] = {
    "ok": ({"status": 200, "relay": relay(OK_STREAM, True)}, "ok", "interrupted"),
    "whole": ({"status": 200, "relay": relay(b"{}", False)}, "ok", "interrupted"),
    "the server's error": ({"status": 400, "relay": relay(b"{}", False)}, "error", "interrupted"),
    "an error event": ({"status": 200, "relay": relay(ERROR_STREAM, True)}, "error", "interrupted"),
    "no mark of an end": ({"status": 200, "relay": relay(CUT_STREAM, True)}, "upstream_cut", "interrupted"),
    "refused": ({"status": 404, "outcome": "refused"}, "refused", "refused"),
    "unreachable": ({"status": 502, "outcome": "unreachable", "cut_by": "client"}, "unreachable", "unreachable"),
    "the client left": ({"cut_by": "client"}, "ok", "client_closed"),
    "the server broke off": ({"status": 200, "cut_by": "server"}, "ok", "upstream_cut"),
}


@pytest.mark.parametrize(("more", "final", "cut"), OUTCOMES.values(), ids=OUTCOMES)
def test_outcomes(more: dict[str, Any], final: str, cut: str) -> None:
    one = exchange(**more)
    assert (one.final_outcome(), one.cut_outcome()) == (final, cut)


OPEN = Row(
    id="id-1",
    started_at="2026-11-21T09:30:00.000Z",
    endpoint=CHAT,
    outcome="open",
    worker="w-1",
    key_id=7,
    key_name="alice",
    model="fast",
    served_model="m",
    server="gpu-1",
    route="prefix",
    stream=1,
    attempts=1,
    queue_ms=20.0,
    request_bytes=3,
    client_request_id="c",
)


def running(**more: Any) -> Exchange:
    picked, caller = server(), Caller(7, "alice", ())
    choice, claim = Choice(picked, "prefix"), Claim(picked, 100.0)
    return exchange(
        asked=Asked("json", "fast", stream=True),
        served_model="m",
        search=Search(caller, Wanted("m", None), claim=claim, choice=choice),
        waited_s=0.02,
        sent=100.125,
        attempts=1,
        request_bytes=3,
        client_request_id="c",
        **more,
    )


def test_an_open_row() -> None:
    assert running().row("open") == OPEN


def test_a_settled_row() -> None:
    expected = msgspec.structs.replace(
        OPEN,
        outcome="ok",
        status=200,
        prompt_tokens=47,
        cached_tokens=46,
        completion_tokens=6,
        tokens_source="timings",
        ttft_ms=250.0,
        duration_ms=1500.0,
        prompt_ms=0.5,
        predicted_ms=1.5,
        response_bytes=len(OK_STREAM),
    )
    assert running(status=200, relay=relay(OK_STREAM, True)).row("ok", 101.5) == expected


def test_a_row_of_what_moved_and_fell_back() -> None:
    one = running(fallback_from="big")
    one.attempts = 3
    row = one.row("open")
    assert (row.server, row.route, row.fallback_from, row.served_model) == ("gpu-1", "retry", "big", "m")


def test_a_row_says_whose_error_it_was() -> None:
    """The last attempt failed, and the client got what another server had said before."""
    other = Server(ServerConfig("gpu-2", "http://h:2"))
    assert running(status=503, answered_by=other).row("error").server == "gpu-2"


def test_a_whole_answers_row_has_no_first_token() -> None:
    body = b'{"usage":{"prompt_tokens":3,"completion_tokens":0}}'
    row = running(status=200, relay=relay(body, False)).row("ok", 101.0)
    assert (row.ttft_ms, row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (None, 3, None, 0)


def test_an_errors_row_has_no_tokens() -> None:
    body = b'{"error":{"type":"exceed_context_size_error"},"usage":{"prompt_tokens":3}}'
    row = running(status=400, relay=relay(body, False)).row("error", 101.0)
    assert (row.prompt_tokens, row.tokens_source, row.error_code) == (None, None, "exceed_context_size_error")


def test_a_refused_row() -> None:
    row = exchange(status=404, outcome="refused", error_code="model_not_found", response_bytes=9).row("refused", 100.0)
    assert row == Row(
        id="id-1",
        started_at="2026-11-21T09:30:00.000Z",
        endpoint=CHAT,
        outcome="refused",
        worker="w-1",
        key_id=7,
        key_name="alice",
        stream=0,
        status=404,
        error_code="model_not_found",
        duration_ms=0.0,
        response_bytes=9,
    )


def test_releasing_twice_gives_back_once() -> None:
    one = running()
    assert one.server
    one.release()
    one.release()
    assert one.server.running == 0


REPORTS: dict[str, tuple[dict[str, Any], Report | None]] = {
    "a stream": (
        {"status": 200, "relay": relay(OK_STREAM, True)},
        Report(ttft_s=0.125, prompt_tokens=47, cached_tokens=46, prompt_ms=0.5),
    ),
    "a whole answer": (
        {"status": 200, "relay": relay(b'{"usage":{"prompt_tokens":3,"completion_tokens":1}}', False)},
        Report(prompt_tokens=3),
    ),
    "no usage": ({"status": 200, "relay": relay(b"{}", False)}, Report()),
    "an error": ({"status": 400, "relay": relay(b"{}", False)}, None),
    "an answer of our own": ({"status": 503}, None),
    "nothing yet": ({}, None),
}


@pytest.mark.parametrize(("more", "expected"), REPORTS.values(), ids=REPORTS)
def test_report(more: dict[str, Any], expected: Report | None) -> None:
    assert running(**more).report() == expected


def test_silence_is_since_the_last_byte() -> None:
    one = running(heard=100.0)
    assert one.silent_s(101.0) == 1.0
    one.head_came(200)
    one.heard = 102.0
    one.relay = relay(b"{}", False)
    assert (one.silent_s(103.0), one.silent_s(105.0)) == (0.0, 2.0)


def test_the_next_attempt_starts_anew() -> None:
    one = running(timed_out=True, head_status=503)
    one.begin_attempt()
    assert (one.attempts, one.timed_out, one.head_status, one.failure) == (2, False, None, None)


CONTINUES = {
    "the same": (200, {"content-type": "text/event-stream"}, True),
    "with a charset": (200, {"content-type": "text/event-stream; charset=utf-8"}, True),
    "another status": (206, {"content-type": "text/event-stream"}, False),
    "no stream": (200, {"content-type": "application/json"}, False),
    "no type": (200, {}, False),
}


@pytest.mark.parametrize(("status", "head", "expected"), CONTINUES.values(), ids=CONTINUES)
def test_what_an_answer_can_continue_with(status: int, head: dict[str, str], expected: bool) -> None:
    assert running(status=200).can_continue_with(status, head) is expected


def test_uuid7() -> None:
    made = [uuid7() for _ in range(200)]
    assert len(set(made)) == 200
    assert all(
        str(parsed := uuid.UUID(text)) == text and (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
        for text in made
    )
    assert [text[:13] for text in made] == sorted(text[:13] for text in made)


def test_utc_now() -> None:
    now = utc_now()
    assert len(now) == len("2026-11-21T09:30:00.000Z")
    assert (now[10], now[19], now[23]) == ("T", ".", "Z")
