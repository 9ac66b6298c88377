"""The clients that people use, `openai` and `anthropic`, on real llama-servers through the proxy.

What they report as usage is what the row says; what we refuse comes up as their own exceptions, with our code.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from llama import LlamaServer
from proxy import Key, Proxy, Row, free_port

MODELS = ("tiny", "think", "tools", "embeddings", "endless")
MAX_BODY_MB = 0.05
MESSAGES: list[Any] = [{"role": "user", "content": "tell me about the world"}]
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def proxy(
    tmp_path_factory: pytest.TempPathFactory, confdir: Path, llama: Callable[[str], LlamaServer]
) -> Iterator[Proxy]:
    servers: list[dict[str, Any]] = [{"name": name, "url": llama(name).url} for name in MODELS]
    servers.append({"name": "gone", "url": f"http://127.0.0.1:{free_port()}", "models": ["lost"]})
    folder = tmp_path_factory.mktemp("clients")
    with Proxy(folder, servers, aliases={"small": "tiny"}, max_body_mb=MAX_BODY_MB, confdir=confdir) as proxy:
        yield proxy
    assert "Traceback" not in proxy.log()


@pytest.fixture(scope="module")
def alice(proxy: Proxy) -> Key:
    return proxy.create_key("alice")


@pytest.fixture(scope="module")
def oai(proxy: Proxy, alice: Key) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=alice.key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def ant(proxy: Proxy, alice: Key) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=proxy.url, api_key=alice.key, max_retries=0) as client:
        yield client


def last_row(proxy: Proxy) -> Row:
    return proxy.query("select * from requests order by id desc limit 1")[0]


def booked(proxy: Proxy) -> tuple[int | None, int | None, int | None]:
    """Prompt, cached and completion tokens of the last request, which went well."""
    row = last_row(proxy)
    assert (row["outcome"], row["key_name"], row["status"]) == ("ok", "alice", 200)
    return row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"]


def of_openai(usage: Any) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens


def of_anthropic(usage: Any) -> tuple[int, int, int]:
    cached = usage.cache_read_input_tokens
    return usage.input_tokens + cached, cached, usage.output_tokens


# -- openai ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "small"])
def test_openai_chat(proxy: Proxy, oai: openai.OpenAI, model: str) -> None:
    answer = oai.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, seed=7)
    assert answer.choices[0].message.content
    assert booked(proxy) == of_openai(answer.usage)
    row = last_row(proxy)
    assert (row["model"], row["served_model"], row["stream"]) == (model, "tiny", 0)


@pytest.mark.parametrize("asked", [True, False], ids=["usage asked", "usage not asked"])
def test_openai_chat_streamed(proxy: Proxy, oai: openai.OpenAI, asked: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if asked else {}
    chunks = list(
        oai.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=12,
            seed=7,
            stream=True,
            extra_body={"ignore_eos": True},
            **options,
        )
    )
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert len(usages) == asked
    text = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert len(text) == booked(proxy)[2] == 12
    if asked:
        assert booked(proxy) == of_openai(usages[0])


@pytest.mark.parametrize("stream", [False, True])
def test_openai_tools(proxy: Proxy, oai: openai.OpenAI, stream: bool) -> None:
    ask: dict[str, Any] = {"model": "tools", "messages": MESSAGES, "max_tokens": 40, "seed": 7, "tools": [TOOL]}
    if stream:
        with oai.chat.completions.stream(
            **ask, tool_choice="required", stream_options={"include_usage": True}
        ) as events:
            calls = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
            usage = events.current_completion_snapshot.usage
        assert calls[0].name == "look"
    else:
        answer = oai.chat.completions.create(**ask, tool_choice="required")
        call = (answer.choices[0].message.tool_calls or [])[0]
        assert call.type == "function"
        assert call.function.name == "look"
        usage = answer.usage
    assert booked(proxy) == of_openai(usage)


@pytest.mark.parametrize("stream", [False, True])
def test_openai_thinking(proxy: Proxy, oai: openai.OpenAI, stream: bool) -> None:
    ask: dict[str, Any] = {"model": "think", "messages": MESSAGES, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    ask["seed"] = 7  # some answers are without a thought
    if stream:
        chunks = list(oai.chat.completions.create(**ask, stream=True))
        thoughts = [getattr(chunk.choices[0].delta, "reasoning_content", None) for chunk in chunks]
    else:
        answer = oai.chat.completions.create(**ask)
        thoughts = [getattr(answer.choices[0].message, "reasoning_content", None)]
        assert booked(proxy) == of_openai(answer.usage)
    assert any(thoughts)
    assert booked(proxy)[2] == 60


@pytest.mark.parametrize("stream", [False, True])
def test_openai_completions(proxy: Proxy, oai: openai.OpenAI, stream: bool) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "the world", "max_tokens": 12, "seed": 7}
    if stream:
        usage = [chunk.usage for chunk in oai.completions.create(**ask, stream=True) if chunk.usage][-1]
    else:
        usage = oai.completions.create(**ask).usage
    assert booked(proxy) == of_openai(usage)


@pytest.mark.parametrize("stream", [False, True])
def test_openai_responses(proxy: Proxy, oai: openai.OpenAI, stream: bool) -> None:
    ask: dict[str, Any] = {"model": "endless", "input": "hello world", "max_output_tokens": 12}
    if stream:
        events = list(oai.responses.create(**ask, stream=True))
        assert sum(event.type == "response.output_text.delta" for event in events) == 12
        assert events[-1].type == "response.completed"
        usage = events[-1].response.usage
    else:
        answer = oai.responses.create(**ask)
        assert answer.output_text
        usage = answer.usage
    assert usage
    assert booked(proxy) == (usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens)
    assert usage.output_tokens == 12


@pytest.mark.parametrize("texts", ["the world", ["the world", "a house"]], ids=["one", "two"])
def test_openai_embeddings(proxy: Proxy, oai: openai.OpenAI, texts: str | list[str]) -> None:
    answer = oai.embeddings.create(model="embeddings", input=texts)
    assert [len(item.embedding) for item in answer.data] == [64] * (1 if isinstance(texts, str) else 2)
    assert booked(proxy) == (answer.usage.prompt_tokens, None, None)


def test_openai_models(oai: openai.OpenAI) -> None:
    assert sorted(model.id for model in oai.models.list()) == sorted([*MODELS, "small"])


# -- anthropic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["tiny", "small"])
def test_anthropic_messages(proxy: Proxy, ant: anthropic.Anthropic, stream: bool, model: str) -> None:
    ask: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 12}
    if stream:
        with ant.messages.stream(**ask) as events:
            text = "".join(events.text_stream)
            message = events.get_final_message()
    else:
        message = ant.messages.create(**ask)
        text = "".join(block.text for block in message.content if block.type == "text")
    assert text
    assert booked(proxy) == of_anthropic(message.usage)
    assert (last_row(proxy)["endpoint"], last_row(proxy)["stream"]) == ("/v1/messages", int(stream))


def test_anthropic_with_a_bearer_token(proxy: Proxy, alice: Key) -> None:
    with anthropic.Anthropic(base_url=proxy.url, auth_token=alice.key, max_retries=0) as client:
        message = client.messages.create(model="tiny", messages=MESSAGES, max_tokens=3)
    assert booked(proxy) == of_anthropic(message.usage)


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_tools(proxy: Proxy, ant: anthropic.Anthropic, stream: bool) -> None:
    ask: dict[str, Any] = {
        "model": "tools",
        "messages": MESSAGES,
        "max_tokens": 40,
        "tools": [{"name": "look", "input_schema": PARAMETERS}],
        "tool_choice": {"type": "any"},
    }
    if stream:
        events = list(ant.messages.create(**ask, stream=True))
        begins = [event.content_block for event in events if event.type == "content_block_start"]
        (start,) = [event.message.usage for event in events if event.type == "message_start"]
        (end,) = [event.usage for event in events if event.type == "message_delta"]
        cached = start.cache_read_input_tokens or 0
        usage = (start.input_tokens + cached, cached, end.output_tokens)
        assert [block.name for block in begins if block.type == "tool_use"][:1] == ["look"]
    else:
        raw = ant.messages.with_raw_response.create(**ask).http_response.json()
        assert [block["name"] for block in raw["content"] if block["type"] == "tool_use"][:1] == ["look"]
        cached = raw["usage"]["cache_read_input_tokens"]
        usage = (raw["usage"]["input_tokens"] + cached, cached, raw["usage"]["output_tokens"])
    assert booked(proxy) == usage
    assert usage[2] == 40


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_thinking(proxy: Proxy, ant: anthropic.Anthropic, stream: bool) -> None:
    """llama-server drops the seed of a message: the random model thinks in most answers, but not in each."""
    kinds: set[str] = set()
    message: anthropic.types.Message
    for _ in range(20):
        if stream:
            with ant.messages.stream(model="think", messages=MESSAGES, max_tokens=200) as events:
                message = events.get_final_message()
        else:
            message = ant.messages.create(model="think", messages=MESSAGES, max_tokens=200)
        assert booked(proxy) == of_anthropic(message.usage)
        kinds |= {block.type for block in message.content}
        if kinds == {"thinking", "text"}:
            break
    assert kinds == {"thinking", "text"}


def test_anthropic_count_tokens(proxy: Proxy, ant: anthropic.Anthropic) -> None:
    answer = ant.messages.count_tokens(model="tiny", messages=MESSAGES)
    assert booked(proxy) == (answer.input_tokens, None, None)
    assert answer.input_tokens == 28


# -- refusals ----------------------------------------------------------------------------------------------------------

# name -> how to ask, status, code, and the clients' exceptions
ERRORS: dict[str, tuple[dict[str, Any], int, str, type[Exception], type[Exception]]] = {
    "unknown key": (
        {"key": "sk-nobody"},
        401,
        "invalid_api_key",
        openai.AuthenticationError,
        anthropic.AuthenticationError,
    ),
    "disabled key": (
        {"key": "disabled"},
        403,
        "key_disabled",
        openai.PermissionDeniedError,
        anthropic.PermissionDeniedError,
    ),
    "expired key": (
        {"key": "expired"},
        403,
        "key_expired",
        openai.PermissionDeniedError,
        anthropic.PermissionDeniedError,
    ),
    "model not allowed": (
        {"key": "narrow"},
        403,
        "model_not_allowed",
        openai.PermissionDeniedError,
        anthropic.PermissionDeniedError,
    ),
    "unknown model": ({"model": "none"}, 404, "model_not_found", openai.NotFoundError, anthropic.NotFoundError),
    "model no string": ({"model": 7}, 400, "invalid_request", openai.BadRequestError, anthropic.BadRequestError),
    "too large": (
        {"content": "x" * 60_000},
        413,
        "request_too_large",
        openai.APIStatusError,
        anthropic.ContentTooLargeError,
    ),
    "server gone": (
        {"model": "lost"},
        502,
        "upstream_unreachable",
        openai.InternalServerError,
        anthropic.InternalServerError,
    ),
}


@pytest.fixture(scope="module")
def keys(proxy: Proxy, alice: Key) -> dict[str, str]:
    made = {
        "disabled": proxy.create_key("disabled"),
        "expired": proxy.create_key("expired", "--expires", "2020-01-01"),
        "narrow": proxy.create_key("narrow", "--model", "think"),
    }
    proxy.keys("disable", "disabled")
    return {"alice": alice.key, **{name: key.key for name, key in made.items()}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
@pytest.mark.parametrize("name", ERRORS)
def test_refusals(proxy: Proxy, keys: dict[str, str], name: str, dialect: str, stream: bool) -> None:
    how, status, code, openai_error, anthropic_error = ERRORS[name]
    key = keys.get(how.get("key", "alice"), how.get("key", ""))
    messages: list[Any] = [{"role": "user", "content": how.get("content", "hello")}]
    ask: dict[str, Any] = {"model": how.get("model", "tiny"), "messages": messages, "max_tokens": 3, "stream": stream}
    error: openai.APIStatusError | anthropic.APIStatusError
    if dialect == "openai":
        with (
            openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=key, max_retries=0) as oai,
            pytest.raises(openai_error) as caught,
        ):
            oai.chat.completions.create(**ask)
        assert isinstance(caught.value, openai.APIStatusError)
        error = caught.value
        assert (error.code, error.param is None or error.param in ("model", "body")) == (code, True)
    else:
        with (
            anthropic.Anthropic(base_url=proxy.url, api_key=key, max_retries=0) as ant,
            pytest.raises(anthropic_error) as caught,
        ):
            ant.messages.create(**ask)
        assert isinstance(caught.value, anthropic.APIStatusError)
        error = caught.value
        assert isinstance(error.body, dict)
        assert (error.body["type"], error.body["error"]["code"]) == ("error", code)
    assert error.status_code == status
    assert error.response.json()["error"]["message"] in str(error)


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_no_server_has_told_its_models(tmp_path: Path, confdir: Path, dialect: str) -> None:
    with Proxy(tmp_path, [{"name": "gone", "url": f"http://127.0.0.1:{free_port()}"}], confdir=confdir) as proxy:
        key = proxy.create_key("alice").key
        if dialect == "openai":
            with pytest.raises(openai.InternalServerError) as of_oai:
                openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=key, max_retries=0).models.with_raw_response.list()
                openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=key, max_retries=0).completions.create(
                    model="x", prompt="x"
                )
            response: Any = of_oai.value.response
        else:
            with pytest.raises(anthropic.ServiceUnavailableError) as of_ant:
                anthropic.Anthropic(base_url=proxy.url, api_key=key, max_retries=0).messages.create(
                    model="x", messages=MESSAGES, max_tokens=1
                )
            response = of_ant.value.response
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_server_available")
    assert int(response.headers["retry-after"]) > 0


def test_a_servers_own_errors_come_up_too(proxy: Proxy, oai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        oai.chat.completions.create(model="tiny", messages=[], extra_body={"temperature": "hot"})
    row = last_row(proxy)
    assert (row["outcome"], row["status"], row["prompt_tokens"]) == ("error", 400, None)
    assert caught.value.response.json()["error"]["type"] == "invalid_request_error"
