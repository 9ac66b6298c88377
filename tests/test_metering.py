"""Books against servers, to the token: every endpoint of real llama-servers, streamed and not.

`pytest tests/test_metering.py -s` prints the table: what the server said beside what the row says.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama import LlamaServer
from proxy import Key, Proxy, Row
from said import Said, said

SERVERS = ("tiny", "think", "tools", "embeddings", "rerank", "endless")
CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/completion"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "tell me about the world"}]}
TOOL = {"name": "look", "parameters": {"type": "object", "properties": {}}}
NINE: dict[str, Any] = {"max_tokens": 9, "seed": 7, "ignore_eos": True}
USAGE = {"stream_options": {"include_usage": True}}
BOTH, WHOLE, STREAM = (False, True), (False,), (True,)


@dataclass(frozen=True)
class Case:
    """`completion`: how many tokens it must be, known without asking anybody; None: none, or not known."""

    name: str
    path: str
    body: dict[str, Any]
    completion: int | None
    streams: tuple[bool, ...] = BOTH
    server: str = "tiny"
    prompts: int = 1


CASES = [
    Case("chat", CHAT, ASK | NINE, 9),
    Case("chat, usage asked", CHAT, ASK | NINE | USAGE, 9, STREAM),
    Case("chat, one token", CHAT, ASK | NINE | {"max_tokens": 1}, 1),
    Case("chat, no cache", CHAT, ASK | NINE | {"cache_prompt": False}, 9),
    Case("chat, progress", CHAT, ASK | NINE | {"return_progress": True}, 9, STREAM),
    Case("chat, timings per token", CHAT, ASK | NINE | {"timings_per_token": True}, 9, STREAM),
    Case("chat, timings and usage", CHAT, ASK | NINE | USAGE | {"timings_per_token": True}, 9, STREAM),
    Case("chat, logprobs", CHAT, ASK | NINE | {"logprobs": True, "top_logprobs": 2}, 9),
    Case("chat, n=2", CHAT, ASK | NINE | {"n": 2}, 18, STREAM),
    Case("chat, n=3, usage asked", CHAT, ASK | NINE | USAGE | {"n": 3}, 27, STREAM),
    # llama-server's usage of several choices counts the first only, and a whole answer tells no more
    Case("chat, n=2", CHAT, ASK | NINE | {"n": 2}, 9, WHOLE),
    Case("chat, thinking", CHAT, ASK | NINE | {"max_tokens": 60}, 60, server="think"),
    Case(
        "chat, tools",
        CHAT,
        ASK | NINE | {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required", "max_tokens": 40},
        40,
        server="tools",
    ),
    Case("completions", TEXT, {"prompt": "the world"} | NINE, 9),
    Case("completions, usage asked", TEXT, {"prompt": "the world"} | NINE | USAGE, 9, STREAM),
    Case("completions, n=2", TEXT, {"prompt": "the world"} | NINE | {"n": 2}, 18, STREAM),
    Case("completions, token ids", TEXT, {"prompt": [1, 500, 501]} | NINE, 9),
    Case("completions, prompts", TEXT, {"prompt": ["the world", "a house of water"]} | NINE, 18, STREAM, prompts=2),
    Case("completions, id prompts", TEXT, {"prompt": [[1, 500], [1, 501, 502]]} | NINE, 18, STREAM, prompts=2),
    Case("native", NATIVE, {"prompt": "the world"} | NINE, 9),
    Case("native, prompts", NATIVE, {"prompt": ["the world", "a house of water"]} | NINE, 18, prompts=2),
    Case("native, timings per token", NATIVE, {"prompt": "the world", "timings_per_token": True} | NINE, 9, STREAM),
    Case("native, other path", "/completions", {"prompt": "the world"} | NINE, 9),
    Case("infill", "/infill", {"input_prefix": "the ", "input_suffix": " house"} | NINE, 9),
    Case("messages", MESSAGES, ASK | {"max_tokens": 9}, 9, server="endless"),
    Case("messages, thinking", MESSAGES, ASK | {"max_tokens": 60, "seed": 7}, None, server="think"),
    Case(
        "messages, tools",
        MESSAGES,
        ASK
        | {
            "max_tokens": 40,
            "tools": [{"name": "look", "input_schema": TOOL["parameters"]}],
            "tool_choice": {"type": "any"},
        },
        40,
        server="tools",
    ),
    Case("count_tokens", "/v1/messages/count_tokens", ASK, None, WHOLE),
    Case("responses", RESPONSES, {"input": "hello world", "max_output_tokens": 9}, 9, server="endless"),
    Case(
        "responses, tools",
        RESPONSES,
        {
            "input": "hello world",
            "max_output_tokens": 40,
            "tools": [TOOL | {"type": "function"}],
            "tool_choice": "required",
        },
        40,
        server="tools",
    ),
    Case("responses, input_tokens", "/v1/responses/input_tokens", {"input": "hello world"}, None, WHOLE),
    Case("chat, input_tokens", "/v1/chat/completions/input_tokens", ASK, None, WHOLE),
    Case("embeddings", "/v1/embeddings", {"input": "the world"}, None, WHOLE, "embeddings"),
    Case("embeddings, inputs", "/v1/embeddings", {"input": ["the world", "a house", "a"]}, None, WHOLE, "embeddings"),
    Case(
        "embeddings, base64",
        "/v1/embeddings",
        {"input": "the world", "encoding_format": "base64"},
        None,
        WHOLE,
        "embeddings",
    ),
    Case("embedding, native", "/embedding", {"content": ["the world", "a house"]}, None, WHOLE, "embeddings"),
    Case("rerank", "/v1/rerank", {"query": "world", "documents": ["the world", "a house"]}, None, WHOLE, "rerank"),
    Case("rerank, texts", "/rerank", {"query": "world", "texts": ["the world", "a house"]}, None, WHOLE, "rerank"),
]
MEASURED = ("started_at", "queue_ms", "ttft_ms", "duration_ms", "worker")
RUNS = [(case, streamed) for case in CASES for streamed in case.streams]
NAMES = [f"{case.name}{', streamed' * streamed}" for case, streamed in RUNS]


@dataclass(frozen=True)
class Line:
    name: str
    case: Case
    server: Said
    row: Row

    def __str__(self) -> str:
        said = f"{_or_dash(self.server.prompt)} ({_or_dash(self.server.cached)}) + {_or_dash(self.server.completion)}"
        row = self.row
        booked = f"{_or_dash(row['prompt_tokens'])} ({_or_dash(row['cached_tokens'])})"
        booked += f" + {_or_dash(row['completion_tokens'])}, {_or_dash(row['tokens_source'])}"
        stream = "yes" if row["stream"] else "no"
        return f"| {self.case.name} | `{self.case.path}` | {stream} | {said} | {booked} |"


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)


@pytest.fixture(scope="module")
def proxy(
    tmp_path_factory: pytest.TempPathFactory, confdir: Path, llama: Callable[[str], LlamaServer]
) -> Iterator[Proxy]:
    servers = [{"name": f"server of {name}", "url": llama(name).url} for name in SERVERS]
    with Proxy(tmp_path_factory.mktemp("metering"), servers, confdir=confdir) as proxy:
        yield proxy
    assert "Traceback" not in proxy.log()


@pytest.fixture(scope="module")
def alice(proxy: Proxy) -> Key:
    return proxy.create_key("alice")


@pytest.fixture(scope="module")
def http(proxy: Proxy, alice: Key) -> Iterator[httpx.Client]:
    """One client for all: half of a short test would go into making one."""
    with proxy.client(alice) as client:
        yield client


@pytest.fixture(scope="module")
def lines() -> Iterator[list[Line]]:
    found: list[Line] = []
    yield found
    print("\n\n| request | endpoint | streamed | server said: prompt (cached) + completion | row says |")
    print("|---|---|---|---|---|", *found, sep="\n")


@pytest.mark.parametrize(("case", "streamed"), RUNS, ids=NAMES)
def test_the_row_says_what_the_server_said(
    proxy: Proxy,
    alice: Key,
    http: httpx.Client,
    llama: Callable[[str], LlamaServer],
    lines: list[Line],
    case: Case,
    streamed: bool,
) -> None:
    body = {"model": case.server, **case.body} | ({"stream": True} if streamed else {})
    directly = http.post(llama(case.server).url + case.path, json=body)
    answer = http.post(case.path, json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (200, directly.headers["content-type"])
    told = said(case.path, answer.content, case.prompts)
    before = said(case.path, directly.content, case.prompts)
    (row,) = proxy.query("select * from requests where id = ?", answer.headers["x-request-id"])
    lines.append(Line(case.name, case, told, row))
    assert {name: row[name] for name in row if name not in MEASURED} == {
        "id": answer.headers["x-request-id"],
        "key_id": alice.id,
        "key_name": "alice",
        "team": None,
        "model": case.server,
        "served_model": case.server,
        "server": f"server of {case.server}",
        "route": "only",
        "fallback_from": None,
        "endpoint": case.path,
        "stream": int(streamed),
        "status": 200,
        "outcome": "ok",
        "error_code": None,
        "prompt_tokens": told.prompt,
        "cached_tokens": told.cached,
        "completion_tokens": told.completion,
        "reasoning_tokens": None,
        "tokens_source": told.source,
        "prompt_ms": told.prompt_ms,
        "predicted_ms": told.predicted_ms,
        "cost_micros": None,
        "currency": None,
        "attempts": 1,
        "request_bytes": len(answer.request.content),
        "response_bytes": len(answer.content),
        "client_request_id": None,
    }
    assert (told.prompt, told.source) == (before.prompt, before.source)
    if case.completion is not None:
        assert told.completion == before.completion == case.completion
    assert (row["ttft_ms"] is not None) == streamed
    assert 0 <= row["queue_ms"] < row["duration_ms"]


def test_the_table_has_every_endpoint() -> None:
    """A usage format that the addon has, and that a llama-server answers, stands in the table."""
    from gateway.usage import FORMATS

    same = {"/chat/completions", "/v1/reranking", "/reranking", "/responses", "/embeddings"}  # other names
    elsewhere = {path for path in FORMATS if path.startswith("/v1/audio/")}  # no llama-server of the tests hears
    assert set(FORMATS) - same - elsewhere <= {case.path for case in CASES}
