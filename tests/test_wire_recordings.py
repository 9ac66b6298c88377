"""Recorded answers of a real llama-server go over the wire once more, cut at odd places: same bytes, same counts.

Then servers that tell their usage only when asked: the client's bytes are what they would have been without our asking.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy import Key, Proxy, Row
from rawhttp import post
from recordings import Recording, recordings
from said import Said, deltas, said
from upstream import CLOSE, Request, Step, Upstream, chunk, cut, head, pieces, reply, stream

SEED = 20261121
MODELS = ["tiny", "tiny-embed", "tiny-rerank", "x"]
CHAT = "/v1/chat/completions"
COUNTS = (
    "outcome, status, stream, prompt_tokens, cached_tokens, completion_tokens, tokens_source, prompt_ms, predicted_ms"
)


@pytest.fixture(scope="module")
def llama_like() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def openai_like() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def proxy(
    tmp_path_factory: pytest.TempPathFactory, confdir: Path, llama_like: Upstream, openai_like: Upstream
) -> Iterator[Proxy]:
    servers = [
        {"name": "llama", "url": llama_like.url, "models": MODELS, "type": "llama.cpp"},
        {"name": "other", "url": openai_like.url, "models": ["gpt"], "type": "openai"},
    ]
    folder = tmp_path_factory.mktemp("wire")
    with Proxy(folder, servers, default_model="tiny", confdir=confdir) as proxy:
        yield proxy
    assert "Traceback" not in proxy.log()


@pytest.fixture(scope="module")
def alice(proxy: Proxy) -> Key:
    return proxy.create_key("alice")


def last_row(proxy: Proxy) -> Row:
    return proxy.query(f"select {COUNTS} from requests order by id desc limit 1")[0]


# -- recordings --------------------------------------------------------------------------------------------------------

GONE_WELL = [
    "chat",
    "chat_stream",
    "chat_stream_progress",
    "chat_stream_timings",
    "chat_stream_usage",
    "chat_n2",
    "completions",
    "completions_stream",
    "completions_stream_usage",
    "prompt_array",
    "completion_native",
    "completion_native_stream",
    "messages",
    "messages_stream",
    "messages_count_tokens",
    "responses",
    "responses_stream",
    "responses_input_tokens",
    "chat_input_tokens",
    "embeddings",
    "embedding_native",
    "rerank",
    "think",
    "think_stream",
    "think_messages",
    "tools_stream",
    "tools_responses_stream",
    "draft",
    "slow_prompt_stream",
    "slow_prompt_messages",
]
REFUSED = ["err_ctx", "err_ctx_messages_stream", "err_404_post", "err_key_wrong", "mid_error_chat_full2", "audio"]
BROKEN = [
    "mid_error_chat_stream1",
    "mid_error_messages_stream0",
    "mid_error_native_stream0",
    "mid_error_responses_stream0",
]


def replayed(proxy: Proxy, key: Key, server: Upstream, recording: Recording, steps: list[bytes]) -> Row:
    """Replay, check the client's bytes, return the row."""
    server.always(recording.path, (*steps, CLOSE) if recording.streamed else steps)
    body = recording.request.body
    answer = post(proxy.port, recording.target, key, body)
    assert (answer.status, answer.complete) == (recording.status, True)
    assert answer.body == recording.response.body
    assert answer.value("content-type") == recording.response.headers["content-type"]
    return last_row(proxy)


def odd_cuts(recording: Recording) -> list[bytes]:
    chance = random.Random(f"{SEED} {recording.name}")
    raw = recording.response.raw
    return cut(raw, *sorted(chance.sample(range(1, len(raw)), min(50, len(raw) - 1))))


@pytest.mark.parametrize("way", ["whole", "odd cuts"])
@pytest.mark.parametrize("name", GONE_WELL)
def test_recordings(proxy: Proxy, alice: Key, llama_like: Upstream, name: str, way: str) -> None:
    recording = recordings()[name]
    steps = [recording.response.raw] if way == "whole" else odd_cuts(recording)
    row = replayed(proxy, alice, llama_like, recording, steps)
    assert row == expected(recording)


def expected(recording: Recording) -> Row:
    prompt = recording.request_json().get("prompt")
    told = said(recording.path, recording.response.body)
    if isinstance(prompt, list):  # llama-server's usage of several prompts, in a whole answer, is the first one's
        assert not recording.streamed
    return {
        "outcome": "ok",
        "status": 200,
        "stream": int(recording.streamed),
        "prompt_tokens": told.prompt,
        "cached_tokens": told.cached,
        "completion_tokens": told.completion,
        "tokens_source": told.source,
        "prompt_ms": told.prompt_ms,
        "predicted_ms": told.predicted_ms,
    }


def test_the_reader_reads_them() -> None:
    """The other reader finds something: it can't agree with an empty row by finding nothing."""
    silent = {name for name in GONE_WELL if said(recordings()[name].path, recordings()[name].response.body) == Said()}
    assert silent == {"embedding_native"}


@pytest.mark.parametrize(
    "name", ["chat_stream_usage", "completion_native_stream", "messages_stream", "responses_stream"]
)
def test_byte_by_byte(proxy: Proxy, alice: Key, llama_like: Upstream, name: str) -> None:
    recording = recordings()[name]
    row = replayed(proxy, alice, llama_like, recording, pieces(recording.response.raw, 1))
    assert row == expected(recording)


@pytest.mark.parametrize("name", REFUSED)
def test_a_servers_errors_pass_verbatim(proxy: Proxy, alice: Key, llama_like: Upstream, name: str) -> None:
    recording = recordings()[name]
    row = replayed(proxy, alice, llama_like, recording, odd_cuts(recording))
    nothing = dict.fromkeys(row, None) | {"outcome": "error", "status": recording.status}
    assert row == nothing | {"stream": int(recording.request_json().get("stream", False))}


@pytest.mark.parametrize("name", BROKEN)
def test_errors_within_a_stream(proxy: Proxy, alice: Key, llama_like: Upstream, name: str) -> None:
    """A clean end of the chunks, and yet no success; what was generated until then counts, one way or the other."""
    recording = recordings()[name]
    row = replayed(proxy, alice, llama_like, recording, odd_cuts(recording))
    assert (row["outcome"], row["status"]) == ("error", 200)
    assert abs(row["completion_tokens"] - deltas(recording.response.body)) <= 1


# recording -> how many bytes of its end are missing
CUT = {"chat_stream": 20, "messages_stream": 60, "responses_stream": 100, "completion_native_stream": 900}


@pytest.mark.parametrize("clean", [True, False], ids=["clean framing", "no end of the chunks"])
@pytest.mark.parametrize("name", CUT)
def test_a_cut_stream_is_no_success(proxy: Proxy, alice: Key, llama_like: Upstream, name: str, clean: bool) -> None:
    recording = recordings()[name]
    events = recording.response.body.split(b"\n\n")
    body = b"".join(event + b"\n\n" for event in events[: len(events) // 2])
    begin = head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
    llama_like.always(recording.path, (begin, chunk(body), *([chunk(b"")] if clean else []), CLOSE))
    answer = post(proxy.port, recording.target, alice, recording.request.body)
    told = answer.body.removeprefix(body)
    assert answer.body.startswith(body)
    assert answer.complete == clean
    assert (b"upstream_cut" in told or b"The server broke off" in told) != clean, told
    assert not (clean and told)
    row = proxy.wait_rows(len(proxy.rows()))[-1]
    assert row["outcome"] == "upstream_cut"
    assert row["completion_tokens"] == deltas(body) > 0


# -- usage that has to be asked for ------------------------------------------------------------------------------------

ASK: dict[str, Any] = {"model": "gpt", "messages": [{"role": "user", "content": "hi"}], "stream": True}
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 4}}
WORDS = ["a", "\u2028b", " c"]


def openai_events(asked: bool) -> list[dict[str, Any]]:
    base = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt"}
    null = {"usage": None} if asked else {}
    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in WORDS)]
    events: list[dict[str, Any]] = [
        base | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} | null for delta in deltas
    ]
    events.append(base | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]} | null)
    return [*events, base | {"choices": [], "usage": USAGE}] if asked else events


def usage_in_front(asked: bool) -> list[dict[str, Any]]:
    """The null usage stands first in the chunk: another comma goes with it."""
    return [
        {"usage": None, **{name: value for name, value in event.items() if name != "usage"}}
        if "usage" in event and event["usage"] is None
        else event
        for event in openai_events(asked)
    ]


def usage_when_done(asked: bool) -> list[dict[str, Any]]:
    """vLLM's: no null usage."""
    return (
        [event for event in openai_events(asked) if event.get("usage", True)]
        if not asked
        else [{name: value for name, value in event.items() if value is not None} for event in openai_events(asked)]
    )


def usage_always(asked: bool) -> list[dict[str, Any]]:
    """Some servers say it unasked, in the last chunk beside its choice: that stays."""
    events = copy.deepcopy(openai_events(False))
    events[-1]["usage"] = USAGE
    return events


SHAPES: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "OpenAI": openai_events,
    "null usage first": usage_in_front,
    "vLLM": usage_when_done,
    "usage beside choices": usage_always,
}
FRAMES = {
    "LF": lambda text: f"data: {text}\n\n",
    "CRLF": lambda text: f"data: {text}\r\n\r\n",
    "no space, with an id": lambda text: f"id: 7\ndata:{text}\n\n",
    "with comments": lambda text: f": ping\n\ndata: {text}\n\n",
}


def answers(shape: Callable[[bool], list[dict[str, Any]]], frame: Callable[[str], str], asked: bool) -> bytes:
    texts = [json.dumps(event, ensure_ascii=False, separators=(",", ":")) for event in shape(asked)]
    return "".join(map(frame, [*texts, "[DONE]"])).encode()


@pytest.mark.parametrize("size", [1, 17, 1 << 20])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wanted", [False, True, None], ids=["not wanted", "wanted", "silent"])
def test_asked_and_stripped(
    proxy: Proxy, alice: Key, openai_like: Upstream, shape: str, frame: str, size: int, wanted: bool | None
) -> None:
    def serve(request: Request) -> list[Step]:
        asked = (request.json().get("stream_options") or {}).get("include_usage", False)
        body = answers(SHAPES[shape], FRAMES[frame], asked)
        if "null usage" in shape or not asked:
            assert body.count(b"usage") >= asked
        return stream(*pieces(body, size))

    openai_like.always(CHAT, serve)
    options: dict[str, Any] = {} if wanted is None else {"stream_options": {"include_usage": wanted, "other": [1]}}
    answer = post(proxy.port, CHAT, alice, ASK | options)
    would_have_been = answers(SHAPES[shape], FRAMES[frame], asked=bool(wanted))
    if frame == "with comments" and not wanted and shape != "usage beside choices":
        # The comment in front of the usage chunk came by itself, as comments do.
        would_have_been = would_have_been.replace(b": ping\n\ndata: [DONE]", b": ping\n\n: ping\n\ndata: [DONE]")
    assert answer.body == would_have_been
    sent = openai_like.asked[-1].json()
    assert sent == ASK | {"stream_options": {**options.get("stream_options", {}), "include_usage": True}}
    assert last_row(proxy) == {
        "outcome": "ok",
        "status": 200,
        "stream": 1,
        "prompt_tokens": 9,
        "cached_tokens": 4,
        "completion_tokens": 3,
        "tokens_source": "usage",
        "prompt_ms": None,
        "predicted_ms": None,
    }


def test_a_server_that_never_tells(proxy: Proxy, alice: Key, openai_like: Upstream) -> None:
    body = answers(openai_events, FRAMES["LF"], asked=False)
    openai_like.always(CHAT, stream(body))
    assert post(proxy.port, CHAT, alice, ASK).body == body
    row = last_row(proxy)
    assert (row["completion_tokens"], row["prompt_tokens"], row["tokens_source"]) == (3, None, "counted")


def test_content_length_of_a_stripped_stream(proxy: Proxy, alice: Key, openai_like: Upstream) -> None:
    """A stream that came with its length has another one now."""
    body = answers(openai_events, FRAMES["LF"], asked=True)
    openai_like.always(CHAT, reply(body, content_type="text/event-stream"))
    answer = post(proxy.port, CHAT, alice, ASK)
    assert (answer.complete, answer.body) == (True, answers(openai_events, FRAMES["LF"], asked=False))
    assert last_row(proxy)["tokens_source"] == "usage"


def test_running_usage(proxy: Proxy, alice: Key, openai_like: Upstream) -> None:
    """vLLM's continuous_usage_stats: every chunk has the count so far, and the last one wins, also when it is cut."""
    events = openai_events(asked=True)
    for number, event in enumerate(events[:-1]):
        event["usage"] = USAGE | {"completion_tokens": min(number, 3)}
    framed = [f"data: {json.dumps(event)}\n\n" for event in events]
    openai_like.plan(stream(*framed, "data: [DONE]\n\n"), (*stream(*framed[:3])[:-1], CLOSE))
    ask = ASK | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    assert post(proxy.port, CHAT, alice, ask).body == "".join([*framed, "data: [DONE]\n\n"]).encode()
    assert last_row(proxy)["completion_tokens"] == 3
    assert not post(proxy.port, CHAT, alice, ask).complete
    row = proxy.wait_rows(len(proxy.rows()))[-1]
    assert (row["outcome"], row["completion_tokens"], row["tokens_source"]) == ("upstream_cut", 2, "usage")


def test_llama_cpp_is_not_asked(proxy: Proxy, alice: Key, llama_like: Upstream) -> None:
    recording = recordings()["chat_stream"]
    replayed(proxy, alice, llama_like, recording, [recording.response.raw])
    assert llama_like.asked[-1].body == recording.request.body
