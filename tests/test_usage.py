"""What each format's answers say about their tokens: a table of hand-made ones, and all that a real llama-server said.

What the recordings are expected to give is read from their JSON here, by a reader that shares nothing with the product.
"""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from gateway.relay import BodyMeter, Relay, StreamMeter
from gateway.tally import Tally, Tokens
from gateway.usage import FORMATS, ends_with_mark, format_of
from recordings import Recording, recordings
from test_sse import cut

CHAT, COMPLETIONS, NATIVE = "/v1/chat/completions", "/v1/completions", "/completion"
MESSAGES, RESPONSES, AUDIO = "/v1/messages", "/v1/responses", "/v1/audio/transcriptions"
DONE = "[DONE]"
KV_FULL = {"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}}


@dataclass(frozen=True)
class Result:
    """What was learned of an answer: its tokens, where they come from, whether its end was seen, its error."""

    tokens: Tokens
    source: str | None
    finished: bool = True
    error: str | None = None


NOTHING = Result(Tokens(), None, finished=False)


def result_of(tally: Tally) -> Result:
    tokens, source = tally.tokens()
    return Result(tokens, source, tally.finished, tally.error)


@dataclass(frozen=True)
class Streamed:
    path: str
    events: tuple[Any, ...]
    expected: Result
    prompts: int = 1
    answers: int = 1


def sse(*events: Any) -> bytes:
    """Events as bytes: named by their type where a format does that."""
    lines = []
    for event in events:
        named = isinstance(event, dict) and isinstance(event.get("type"), str)
        data = event if isinstance(event, str) else json.dumps(event)
        lines.append((f"event: {event['type']}\n" if named else "") + f"data: {data}\n\n")
    return "".join(lines).encode()


def relay_of(path: str, streamed: bool, prompts: int = 1, answers: int = 1, strip: bool = False) -> Relay:
    read, tally = format_of(path), Tally(prompts, answers)
    meter = StreamMeter(read, tally, strip=strip) if streamed else BodyMeter(read, tally)
    return Relay(meter, tally, lambda: 0.0, is_stream=streamed, has_mark=streamed and ends_with_mark(path))


def chat(content: str | None = "x", index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {"content": content} if content else {}
    return {"choices": [{"index": index, "delta": delta, "finish_reason": finish}], **more}


def text(content: str = "x", index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": content, "finish_reason": finish}], **more}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def usage(prompt: int, completion: int | None = None, cached: int | None = None) -> dict[str, Any]:
    said: dict[str, Any] = {"prompt_tokens": prompt, "total_tokens": prompt + (completion or 0)}
    if completion is not None:
        said["completion_tokens"] = completion
    if cached is not None:
        said["prompt_tokens_details"] = {"cached_tokens": cached}
    return said


def timings(cached: int, prompt: int, completion: int) -> dict[str, Any]:
    return {"cache_n": cached, "prompt_n": prompt, "prompt_ms": 1.0, "predicted_n": completion, "predicted_ms": 2.0}


def native(content: str, predicted: int, stop: bool = False, index: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "index": index,
        "content": content,
        "stop": stop,
        "tokens_predicted": predicted,
        "tokens_evaluated": 12,
        **more,
    }


def piece(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": kind, **fields}}


def begin(**said: int | None) -> dict[str, Any]:
    return {"type": "message_start", "message": {"type": "message", "usage": said}}


def turn(**said: int | None) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": said}


STOP = {"type": "message_stop"}


def response(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", **fields}


def counts(prompt: int, completion: int, cached: int, reasoning: int | None = None) -> dict[str, Any]:
    said = {"input_tokens": prompt, "output_tokens": completion, "input_tokens_details": {"cached_tokens": cached}}
    return said if reasoning is None else {**said, "output_tokens_details": {"reasoning_tokens": reasoning}}


STREAMED: dict[str, Streamed] = {
    # llama.cpp
    "llama chat: timings where it ends": Streamed(
        CHAT,
        (
            delta(role="assistant", content=None),
            chat(),
            chat(),
            chat(None, finish="stop", timings=timings(46, 1, 6)),
            DONE,
        ),
        Result(Tokens(47, 46, 6), "timings"),
    ),
    "llama chat, usage asked": Streamed(
        CHAT,
        (
            chat(),
            chat(None, finish="stop"),
            {"choices": [], "usage": usage(47, 6, 46), "timings": timings(46, 1, 6)},
            DONE,
        ),
        Result(Tokens(47, 46, 6), "usage"),
    ),
    "llama chat, timings_per_token": Streamed(
        CHAT,
        (
            chat(timings=timings(46, 1, 1)),
            chat(timings=timings(46, 1, 2)),
            chat(None, finish="length", timings=timings(46, 1, 2)),
            DONE,
        ),
        Result(Tokens(47, 46, 2), "timings"),
    ),
    "llama chat, timings_per_token and usage asked": Streamed(
        CHAT,
        (
            chat(timings=timings(46, 1, 1)),
            chat(None, finish="stop"),
            {"choices": [], "usage": usage(47, 2, 46), "timings": timings(46, 1, 2)},
            DONE,
        ),
        Result(Tokens(47, 46, 2), "usage"),
    ),
    "llama chat, return_progress": Streamed(
        CHAT,
        (
            {**delta(role="assistant", content=None), "prompt_progress": {"total": 47, "cache": 0, "processed": 47}},
            chat(),
            chat(None, finish="stop", timings=timings(0, 47, 1)),
            DONE,
        ),
        Result(Tokens(47, 0, 1), "timings"),
    ),
    "llama chat, n=2": Streamed(
        CHAT,
        (
            chat(),
            chat(index=1),
            chat(index=1),
            chat(None, 1, "stop", timings=timings(46, 1, 2)),
            chat(None, 0, "stop", timings=timings(46, 1, 1)),
            DONE,
        ),
        Result(Tokens(47, 46, 3), "timings"),
        answers=2,
    ),
    "llama chat, n=2 and usage asked: two usage chunks": Streamed(
        CHAT,
        (
            chat(),
            chat(index=1),
            chat(None, 1, "stop"),
            {"choices": [], "usage": usage(47, 3, 46), "timings": timings(46, 1, 3)},
            chat(),
            chat(None, 0, "stop"),
            {"choices": [], "usage": usage(47, 4, 46), "timings": timings(46, 1, 4)},
            DONE,
        ),
        Result(Tokens(47, 46, 7), "usage"),
        answers=2,
    ),
    "llama completions: usage beside the last choice": Streamed(
        COMPLETIONS,
        (text(), text("", finish="length", usage=usage(12, 4, 11), timings=timings(11, 1, 4)), DONE),
        Result(Tokens(12, 11, 4), "usage"),
    ),
    "llama completions, two prompts": Streamed(
        COMPLETIONS,
        (
            text(),
            text(index=1),
            text("", 0, "stop", usage=usage(5, 1, 0), timings=timings(0, 5, 1)),
            text("", 1, "stop", usage=usage(7, 2, 3), timings=timings(3, 4, 2)),
            DONE,
        ),
        Result(Tokens(12, 3, 3), "usage"),
        prompts=2,
        answers=2,
    ),
    "llama native": Streamed(
        NATIVE,
        (native("a", 1), native("b", 2), native("", 2, True, timings=timings(11, 1, 2))),
        Result(Tokens(12, 11, 2), "usage"),
    ),
    "llama native, two prompts": Streamed(
        NATIVE,
        (
            native("a", 1),
            native("b", 1, index=1),
            native("", 1, True, timings=timings(11, 1, 1)),
            native("", 4, True, 1, timings=timings(2, 10, 4)),
        ),
        Result(Tokens(24, 13, 5), "usage"),
        prompts=2,
        answers=2,
    ),
    "llama native, two answers": Streamed(
        NATIVE,
        (native("", 1, True, timings=timings(11, 1, 1)), native("", 4, True, 1, timings=timings(11, 1, 4))),
        Result(Tokens(12, 11, 5), "usage"),
        answers=2,
    ),
    "llama infill": Streamed("/infill", (native("a", 1, True),), Result(Tokens(12, None, 1), "usage")),
    "llama messages: the prompt without what was cached": Streamed(
        MESSAGES,
        (
            begin(cache_read_input_tokens=46, input_tokens=1, output_tokens=0),
            piece("text_delta", text="a"),
            turn(output_tokens=4),
            STOP,
        ),
        Result(Tokens(47, 46, 4), "usage"),
    ),
    "llama responses": Streamed(
        RESPONSES,
        (
            response("created", response={"status": "in_progress"}),
            response("output_text.delta", delta="a"),
            response(
                "completed", response={"status": "completed", "usage": counts(47, 4, 46)}, timings=timings(46, 1, 4)
            ),
        ),
        Result(Tokens(47, 46, 4), "usage"),
    ),
    # errors within a stream
    "chat, error": Streamed(
        CHAT, (chat(), chat(), KV_FULL), Result(Tokens(completion=2), "counted", False, "server_error")
    ),
    "completions, error": Streamed(
        COMPLETIONS, (text(), KV_FULL), Result(Tokens(completion=1), "counted", False, "server_error")
    ),
    "native, error": Streamed(
        NATIVE, (native("a", 1), native("b", 2), KV_FULL), Result(Tokens(12, None, 2), "usage", False, "server_error")
    ),
    "responses, error": Streamed(
        RESPONSES,
        (response("output_text.delta", delta="a"), KV_FULL),
        Result(Tokens(completion=1), "counted", False, "server_error"),
    ),
    "messages, Anthropic's error": Streamed(
        MESSAGES,
        (
            begin(input_tokens=5),
            piece("text_delta", text="a"),
            {"type": "error", "error": {"type": "overloaded_error"}},
        ),
        Result(Tokens(5, None, 1), "counted", False, "overloaded_error"),
    ),
    # vLLM
    "vLLM, one usage at the end": Streamed(
        CHAT,
        (chat(usage=None), chat(None, finish="stop", usage=None), {"choices": [], "usage": usage(9, 1)}, DONE),
        Result(Tokens(9, None, 1), "usage"),
    ),
    "vLLM, continuous_usage_stats": Streamed(
        CHAT,
        (
            chat(None, usage=usage(9, 0)),
            chat(usage=usage(9, 1)),
            chat(usage=usage(9, 2)),
            chat(None, finish="stop", usage=usage(9, 2)),
            {"choices": [], "usage": usage(9, 2)},
            DONE,
        ),
        Result(Tokens(9, None, 2), "usage"),
    ),
    "vLLM, continuous_usage_stats, n=2": Streamed(
        CHAT,
        (
            chat(usage=usage(9, 1)),
            chat(index=1, usage=usage(9, 1)),
            chat(index=1, finish="stop", usage=usage(9, 2)),
            chat(finish="stop", usage=usage(9, 3)),
            {"choices": [], "usage": usage(9, 5)},
            DONE,
        ),
        Result(Tokens(9, None, 5), "usage"),
        answers=2,
    ),
    "usage in every chunk, none at the end": Streamed(
        CHAT,
        (chat(usage=usage(9, 1)), chat(finish="stop", usage=usage(9, 2)), DONE),
        Result(Tokens(9, None, 2), "usage"),
    ),
    "usage beside the last choice": Streamed(
        CHAT, (chat(), chat(None, finish="stop", usage=usage(9, 2, 4)), DONE), Result(Tokens(9, 4, 2), "usage")
    ),
    # OpenAI
    "OpenAI, details": Streamed(
        CHAT,
        (
            chat(),
            chat(None, finish="stop"),
            {
                "choices": [],
                "usage": {**usage(9, 20, 4), "completion_tokens_details": {"reasoning_tokens": 16, "audio_tokens": 0}},
            },
            DONE,
        ),
        Result(Tokens(9, 4, 20, 16), "usage"),
    ),
    "OpenAI, no usage asked": Streamed(
        CHAT, (chat(), chat(), chat(None, finish="stop"), DONE), Result(Tokens(completion=2), "counted")
    ),
    "null details": Streamed(
        CHAT,
        (
            {"choices": [], "usage": {**usage(9, 2), "prompt_tokens_details": None, "completion_tokens_details": None}},
            DONE,
        ),
        Result(Tokens(9, None, 2), "usage"),
    ),
    "[DONE] alone": Streamed(CHAT, (DONE,), Result(Tokens(), None)),
    "thinking and tool calls are counted": Streamed(
        CHAT,
        (
            delta(role="assistant", content=None),
            delta(reasoning_content="hm"),
            delta(reasoning="hm"),
            delta(content=""),
            delta(tool_calls=[{"index": 0, "function": {"arguments": "{"}}]),
            delta(function_call={"arguments": "{"}),
            DONE,
        ),
        Result(Tokens(completion=4), "counted"),
    ),
    "garbage between": Streamed(
        CHAT,
        (
            chat(),
            "{oops",
            '"text"',
            "[]",
            "",
            chat(usage={"prompt_tokens": -1}),
            chat(None, finish="stop", timings=timings(0, 3, 2)),
            DONE,
        ),
        Result(Tokens(3, 0, 2), "timings"),
    ),
    # Anthropic
    "Anthropic, cache read and written": Streamed(
        MESSAGES,
        (
            begin(input_tokens=3, cache_read_input_tokens=40, cache_creation_input_tokens=7, output_tokens=1),
            piece("text_delta", text="a"),
            turn(output_tokens=9),
            STOP,
        ),
        Result(Tokens(50, 40, 9), "usage"),
    ),
    "Anthropic, message_delta repeats the prompt": Streamed(
        MESSAGES,
        (
            begin(input_tokens=3, cache_read_input_tokens=40, output_tokens=1),
            turn(input_tokens=5, cache_read_input_tokens=42, cache_creation_input_tokens=0, output_tokens=9),
            STOP,
        ),
        Result(Tokens(47, 42, 9), "usage"),
    ),
    "message_delta repeats input_tokens only": Streamed(
        MESSAGES,
        (
            begin(input_tokens=3, cache_read_input_tokens=40, output_tokens=1),
            turn(input_tokens=3, output_tokens=9),
            STOP,
        ),
        Result(Tokens(43, 40, 9), "usage"),
    ),
    "message_delta twice": Streamed(
        MESSAGES,
        (begin(input_tokens=3), turn(output_tokens=4), turn(output_tokens=9), STOP),
        Result(Tokens(3, None, 9), "usage"),
    ),
    "Anthropic, all kinds of deltas": Streamed(
        MESSAGES,
        (
            begin(input_tokens=3, output_tokens=1),
            piece("text_delta", text="a"),
            piece("thinking_delta", thinking="a"),
            piece("input_json_delta", partial_json="{"),
            piece("input_json_delta", partial_json=""),
            piece("signature_delta", signature="x"),
            {"type": "ping"},
        ),
        Result(Tokens(3, None, 3), "counted", finished=False),
    ),
    # responses
    "responses, incomplete": Streamed(
        RESPONSES,
        (
            response("output_text.delta", delta="a"),
            response("incomplete", response={"status": "incomplete", "usage": counts(9, 2, 0, 1)}),
        ),
        Result(Tokens(9, 0, 2, 1), "usage"),
    ),
    "responses, failed": Streamed(
        RESPONSES,
        (
            response("output_text.delta", delta="a"),
            response("failed", response={"status": "failed", "error": {"code": "server_error"}}),
        ),
        Result(Tokens(completion=1), "counted", error="server_error"),
    ),
    "responses, error event": Streamed(
        RESPONSES,
        ({"type": "error", "code": "rate_limited", "message": "x"},),
        Result(Tokens(), None, False, "rate_limited"),
    ),
    "responses, thinking and tools": Streamed(
        RESPONSES,
        (
            response("reasoning_text.delta", delta="a"),
            response("function_call_arguments.delta", delta="{"),
            response("output_text.delta", delta=""),
        ),
        Result(Tokens(completion=2), "counted", finished=False),
    ),
    # audio
    "audio, tokens": Streamed(
        AUDIO,
        (
            {"type": "transcript.text.delta", "delta": "a"},
            {"type": "transcript.text.done", "usage": {"type": "tokens", "input_tokens": 9, "output_tokens": 2}},
        ),
        Result(Tokens(9, None, 2), "usage"),
    ),
    "audio, no usage": Streamed(
        AUDIO,
        ({"type": "transcript.text.delta", "delta": "a"}, {"type": "transcript.text.done"}),
        Result(Tokens(completion=1), "counted"),
    ),
    "a path nobody knows": Streamed(
        "/v9/x", (chat(), chat(None, finish="stop", usage=usage(9, 2)), DONE), Result(Tokens(9, None, 2), "usage")
    ),
    "nothing": Streamed(CHAT, (), NOTHING),
}


@pytest.mark.parametrize("case", STREAMED.values(), ids=STREAMED)
def test_streamed(case: Streamed) -> None:
    raw = sse(*case.events)
    for seed in (0, 1, 2, 3):
        relay = relay_of(case.path, True, case.prompts, case.answers)
        assert b"".join(map(relay.feed, cut(raw, seed))) == raw
        relay.close()
        assert relay.finish() == b""
        assert result_of(relay.tally) == case.expected


@pytest.mark.parametrize("case", STREAMED.values(), ids=STREAMED)
def test_hung_up_after_each_event(case: Streamed) -> None:
    """Counts never go down on the way, and what is counted by deltas says so."""
    before = Tokens()
    for length in range(len(case.events) + 1):
        relay = relay_of(case.path, True, case.prompts, case.answers)
        relay.feed(sse(*case.events[:length]))
        relay.close()
        now = result_of(relay.tally)
        for name in ("prompt", "cached", "completion"):
            assert (getattr(now.tokens, name) or 0) >= (getattr(before, name) or 0), (length, name)
        assert now.source in ("usage", "timings", "counted", None)
        assert (now.source is None) == (now.tokens == Tokens())
        before = now.tokens


BODIES: dict[str, tuple[str, Any, Result]] = {
    "llama chat": (
        CHAT,
        chat(finish="stop", usage=usage(48, 6, 47), timings=timings(47, 1, 6)),
        Result(Tokens(48, 47, 6), "usage"),
    ),
    "OpenAI chat": (
        CHAT,
        {"choices": [{"index": 0, "message": {"content": "a b c"}, "finish_reason": "stop"}], "usage": usage(9, 3)},
        Result(Tokens(9, None, 3), "usage"),
    ),
    "OpenAI chat, n=2": (
        CHAT,
        {"choices": [{"index": i, "finish_reason": "stop"} for i in (0, 1)], "usage": usage(9, 30)},
        Result(Tokens(9, None, 30), "usage"),
    ),
    "chat without usage": (
        CHAT,
        {"choices": [{"index": 0, "message": {"content": "a b c"}, "finish_reason": "stop"}]},
        Result(Tokens(), None),
    ),
    "completions without usage": (COMPLETIONS, text("a b c", finish="stop"), Result(Tokens(), None)),
    "null usage": (CHAT, {"choices": [], "usage": None}, NOTHING),
    "embeddings": (
        "/v1/embeddings",
        {"object": "list", "data": [{"embedding": [0.1], "index": 0}], "usage": usage(5)},
        Result(Tokens(5), "usage", False),
    ),
    "embeddings in base64": (
        "/v1/embeddings",
        {"data": [{"embedding": "AACAPw=="}], "usage": usage(5, 0)},
        Result(Tokens(5, None, 0), "usage", False),
    ),
    "embeddings, without v1": ("/embeddings", {"data": [], "usage": usage(5)}, Result(Tokens(5), "usage", False)),
    "native embedding": ("/embedding", [{"index": 0, "embedding": [[0.1]]}], NOTHING),
    "rerank": (
        "/v1/rerank",
        {"results": [{"index": 0, "relevance_score": 0.5}], "usage": usage(38)},
        Result(Tokens(38), "usage", False),
    ),
    "rerank, a bare list": ("/rerank", [{"index": 0, "score": 0.5}], NOTHING),
    "native": (NATIVE, native("a b", 4, True, timings=timings(11, 1, 4)), Result(Tokens(12, 11, 4), "usage")),
    "native, two answers": (
        NATIVE,
        [native("a", 4, True), native("b", 5, True, 1)],
        Result(Tokens(12, None, 9), "usage"),
    ),
    "messages": (
        MESSAGES,
        {"type": "message", "usage": {"cache_read_input_tokens": 47, "input_tokens": 1, "output_tokens": 4}},
        Result(Tokens(48, 47, 4), "usage", False),
    ),
    "messages, null cache": (
        MESSAGES,
        {"type": "message", "usage": {"cache_read_input_tokens": None, "input_tokens": 1, "output_tokens": 4}},
        Result(Tokens(1, None, 4), "usage", False),
    ),
    "count_tokens": ("/v1/messages/count_tokens", {"input_tokens": 23}, Result(Tokens(23), "usage", False)),
    "chat's input_tokens": (
        "/v1/chat/completions/input_tokens",
        {"input_tokens": 23, "object": "x"},
        Result(Tokens(23), "usage", False),
    ),
    "responses' input_tokens": (
        "/v1/responses/input_tokens",
        {"input_tokens": 23, "object": "x"},
        Result(Tokens(23), "usage", False),
    ),
    "responses": (
        RESPONSES,
        {"status": "completed", "usage": counts(48, 4, 47, 2)},
        Result(Tokens(48, 47, 4, 2), "usage"),
    ),
    "responses, incomplete": (
        RESPONSES,
        {"status": "incomplete", "usage": counts(48, 4, 47)},
        Result(Tokens(48, 47, 4), "usage"),
    ),
    "responses, failed": (
        RESPONSES,
        {"status": "failed", "error": {"code": "server_error"}, "usage": None},
        Result(Tokens(), None, False, "server_error"),
    ),
    "audio, tokens": (
        AUDIO,
        {"text": "a", "usage": {"type": "tokens", "input_tokens": 9, "output_tokens": 2}},
        Result(Tokens(9, None, 2), "usage", False),
    ),
    "audio, seconds": (AUDIO, {"text": "a", "usage": {"type": "duration", "seconds": 7}}, NOTHING),
    "an empty usage says nothing": (CHAT, {"usage": {}}, NOTHING),
    "timings of something else": ("/x", {"timings": {"save_ms": 1}}, NOTHING),
    "a number too large": (CHAT, {"usage": usage(2**60, 1)}, NOTHING),
    "a count of text": (CHAT, {"usage": {"prompt_tokens": "7"}}, NOTHING),
    "not JSON": (AUDIO, "WEBVTT\n\n00:00", NOTHING),
    "empty": (CHAT, "", NOTHING),
}


@pytest.mark.parametrize(("path", "body", "expected"), BODIES.values(), ids=BODIES)
def test_whole_answers(path: str, body: Any, expected: Result) -> None:
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    relay = relay_of(path, False)
    assert b"".join(map(relay.feed, cut(raw, 2))) == raw
    relay.close()
    found = result_of(relay.tally)
    assert (found.tokens, found.source, found.error) == (expected.tokens, expected.source, expected.error)


ERROR_BODIES = {
    "OpenAI": (CHAT, {"error": {"type": "invalid_request_error", "code": "x"}}, "invalid_request_error"),
    "native": (NATIVE, {"error": {"code": 400, "type": "invalid_request_error"}}, "invalid_request_error"),
    "Anthropic": (MESSAGES, {"type": "error", "error": {"type": "not_found_error"}}, "not_found_error"),
    "llama messages": (MESSAGES, {"error": {"code": 400, "type": "invalid_request_error"}}, "invalid_request_error"),
    "responses": (RESPONSES, {"error": {"code": 400, "type": "invalid_request_error"}}, "invalid_request_error"),
    "audio": (AUDIO, {"error": {"code": 501}}, "501"),
    "a bare text": (CHAT, {"error": "nope"}, "nope"),
    "empty": (CHAT, {"error": {}}, "error"),
}


@pytest.mark.parametrize(("path", "body", "code"), ERROR_BODIES.values(), ids=ERROR_BODIES)
def test_error_answers_have_a_name(path: str, body: Any, code: str) -> None:
    relay = relay_of(path, False)
    relay.feed(json.dumps(body).encode())
    relay.close()
    assert result_of(relay.tally) == Result(Tokens(), None, relay.tally.finished, code)


def test_an_event_that_is_not_utf8_costs_that_event_only() -> None:
    relay = relay_of(CHAT, True)
    raw = (
        sse(chat())
        + b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n'
        + sse(chat(None, finish="stop", timings=timings(0, 3, 2)), DONE)
    )
    assert relay.feed(raw) == raw
    relay.close()
    assert result_of(relay.tally) == Result(Tokens(3, 0, 2), "timings")


def test_one_of_two_choices_ended_is_no_end() -> None:
    relay = relay_of(CHAT, True, answers=2)
    relay.feed(sse(chat(), chat(index=1), chat(None, 0, "stop")))
    relay.close()
    assert relay.lacks_end_mark


def test_the_servers_clock() -> None:
    relay = relay_of(CHAT, True, answers=2)
    slow = {**timings(0, 1, 1), "prompt_ms": 5.0, "predicted_ms": 7.0}
    relay.feed(sse(chat(None, 0, "stop", timings=slow), chat(None, 1, "stop", timings=timings(0, 1, 1))))
    assert (relay.tally.prompt_ms, relay.tally.predicted_ms) == (5.0, 7.0)


def test_every_format_is_in_the_tables() -> None:
    covered = {case.path for case in STREAMED.values()} | {path for path, _, _ in BODIES.values()}
    assert set(FORMATS.values()) == {FORMATS[path] for path in covered if path in FORMATS}


# -- the recordings


def documents(recording: Recording) -> list[Any]:
    """The JSON that an answer holds: llama-server's framing is `data: …` and blank lines, nothing else."""
    if not recording.streamed:
        return [json.loads(recording.response.body)]
    lines = recording.response.body.decode().split("\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]


def has_content(document: dict[str, Any]) -> bool:
    choice = (document.get("choices") or [{}])[0]
    said = choice.get("delta") or {}
    delta = document.get("delta")
    block = delta if isinstance(delta, dict) else {}
    pieces = [choice.get("text") if "delta" in choice or "finish_reason" in choice else None]
    pieces += [said.get(name) for name in ("content", "reasoning_content", "tool_calls")]
    pieces += [block.get(name) for name in ("text", "thinking", "partial_json")]
    pieces.append(delta if isinstance(delta, str) else None)
    return any(pieces)


def expected_of(recording: Recording) -> Result:
    """Read from the JSON: the last word of each field counts."""
    said: dict[str, Any] = {}
    source = error = None
    deltas = 0
    found = [document for document in documents(recording) if isinstance(document, dict)]
    for document in found:
        if "error" in document or ("message" in document and "code" in document):
            error = str((document.get("error") or document)["type"])
        deltas += recording.streamed and has_content(document)
        for holder in (document, document.get("message") or {}, document.get("response") or {}):
            if isinstance(holder, dict) and holder.get("usage"):
                said |= holder["usage"]
                source = "usage"
        if "tokens_predicted" in document:
            said |= {"prompt_tokens": document["tokens_evaluated"], "completion_tokens": document["tokens_predicted"]}
            said |= {"cached": document["timings"]["cache_n"]} if "timings" in document else {}
            source = "usage"
        if "input_tokens" in document:
            said["prompt_tokens"], source = document["input_tokens"], "usage"
        if source is None and "predicted_n" in document.get("timings", {}):
            clock = document["timings"]
            said = {
                "prompt_tokens": clock["cache_n"] + clock["prompt_n"],
                "completion_tokens": clock["predicted_n"],
                "cached": clock["cache_n"],
            }
    source = source or ("timings" if said else None)
    details = said.get("prompt_tokens_details") or said.get("input_tokens_details") or {}
    prompt = said.get("prompt_tokens", said.get("input_tokens"))
    cached = said.get("cached", details.get("cached_tokens"))
    completion = said.get("completion_tokens", said.get("output_tokens"))
    if "cache_read_input_tokens" in said:
        cached = said["cache_read_input_tokens"]
        prompt += cached
    if completion in (None, 0) and deltas:
        completion, source = deltas, "counted"
    return Result(Tokens(prompt, cached, completion), source, error=error)


@pytest.mark.parametrize("recording", recordings().values(), ids=recordings())
def test_recorded_answers(recording: Recording) -> None:
    """Whole, byte by byte, and cut at 50 random places: the same counts, and the bytes that came."""
    body, expected = recording.response.body, expected_of(recording)
    for seed in range(52):
        relay = relay_of(recording.path, recording.streamed)
        assert b"".join(map(relay.feed, cut(body, seed))) == body
        relay.close()
        assert relay.finish() == b""
        found = result_of(relay.tally)
        assert (seed, found.tokens, found.source, found.error) == (
            seed,
            expected.tokens,
            expected.source,
            expected.error,
        )
        assert relay.lacks_end_mark == (recording.streamed and recording.name.startswith("mid_error"))
        assert relay.response_bytes == len(body)
