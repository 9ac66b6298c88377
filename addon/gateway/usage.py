"""What an answer says about its tokens: one function per format, one table of endpoints.

A format reads one JSON document (a stream's event or a whole answer) into a `Tally`. Formats know no HTTP and no
SSE framing. Adding one: a function `read_x(tally, name, data)`, a line in FORMATS, a row in the test table.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from gateway.tally import Count, Millis, Tally, Tokens, add


class _Details(msgspec.Struct, gc=False):
    cached_tokens: Count | None = None
    reasoning_tokens: Count | None = None


class Usage(msgspec.Struct, gc=False):
    """Usage under OpenAI's older names (prompt, completion), its newer ones (input, output) and Anthropic's."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None

    def openai(self) -> Tokens:
        """OpenAI's meaning: the prompt includes its cached tokens."""
        prompt_details = self.prompt_tokens_details or self.input_tokens_details
        completion_details = self.completion_tokens_details or self.output_tokens_details
        return Tokens(
            prompt=self.input_tokens if self.prompt_tokens is None else self.prompt_tokens,
            cached=prompt_details.cached_tokens if prompt_details else None,
            completion=self.output_tokens if self.completion_tokens is None else self.completion_tokens,
            reasoning=completion_details.reasoning_tokens if completion_details else None,
        )

    def anthropic(self) -> Tokens:
        """Anthropic's meaning: `input_tokens` leaves out what was read from or written to the cache."""
        prompt = add((self.input_tokens, self.cache_read_input_tokens, self.cache_creation_input_tokens))
        return Tokens(prompt=prompt, cached=self.cache_read_input_tokens, completion=self.output_tokens)


class Timings(msgspec.Struct, gc=False):
    """llama.cpp's `timings`: `prompt_n` leaves out the cached tokens."""

    cache_n: Count | None = None
    prompt_n: Count | None = None
    prompt_ms: Millis | None = None
    predicted_n: Count | None = None
    predicted_ms: Millis | None = None

    def tokens(self) -> Tokens:
        return Tokens(prompt=add((self.cache_n, self.prompt_n)), cached=self.cache_n, completion=self.predicted_n)


class _Delta(msgspec.Struct, gc=False):
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None
    function_call: Any = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    finish_reason: Any = None
    text: Any = None
    delta: _Delta | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


def read_openai(tally: Tally, name: bytes, data: bytes) -> None:
    """/v1/chat/completions, /v1/completions, embeddings, rerank: OpenAI's, vLLM's and llama.cpp's shapes.

    llama.cpp says `timings` where a choice ends, without usage unless asked; with several choices each of them has
    its own, and usage then counts one choice only. Others send one usage for the whole answer, or a running one in
    every chunk.
    """
    if data == b"[DONE]":
        tally.done = True
        return
    chunk = _chunk.decode(data)
    if chunk.error is not None:
        tally.error = error_code(chunk.error)
        return
    finished = _read_choices(tally, chunk.choices or [], whole=name == BODY)
    if chunk.timings:
        tally.time(chunk.timings.prompt_ms, chunk.timings.predicted_ms)
    if not (chunk.usage or chunk.timings):
        return
    if chunk.choices:
        tally.last_choice = chunk.choices[0].index
    tokens = chunk.usage.openai() if chunk.usage else chunk.timings.tokens() if chunk.timings else Tokens()
    source = "usage" if chunk.usage else "timings"
    if chunk.timings and (finished or not chunk.choices):
        tally.report(tokens, source, tally.last_choice, final=True)
    elif chunk.choices and name != BODY:
        tally.report(tokens, source, tally.last_choice, final=False)
    else:
        tally.report(tokens, source, None, final=True)


def _read_choices(tally: Tally, choices: list[_Choice], *, whole: bool) -> bool:
    finished = False
    for choice in choices:
        if choice.finish_reason is not None:
            tally.ended_choices.add(choice.index)
            tally.last_choice = choice.index
            finished = True
        delta = choice.delta
        if (choice.text and not whole) or (
            delta
            and (delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls or delta.function_call)
        ):
            tally.deltas[choice.index] += 1
    return finished


class _Native(msgspec.Struct, gc=False):
    index: int = 0
    content: Any = None
    stop: bool = False
    tokens_predicted: Count | None = None
    tokens_evaluated: Count | None = None
    timings: Timings | None = None
    error: Any = None


_native = msgspec.json.Decoder(_Native | list[_Native] | None)


def read_native(tally: Tally, name: bytes, data: bytes) -> None:
    """llama.cpp's /completion and /infill: running counts in every event, `stop: true` in the last of each prompt."""
    if data == b"[DONE]":
        tally.done = True
        return
    answer = _native.decode(data)
    for part in answer if isinstance(answer, list) else [answer] if answer else []:
        _read_native_part(tally, part)


def _read_native_part(tally: Tally, part: _Native) -> None:
    if part.error is not None:
        tally.error = error_code(part.error)
        return
    if part.content:
        tally.deltas[part.index] += 1
    cached = None
    if part.timings:
        tally.time(part.timings.prompt_ms, part.timings.predicted_ms)
        cached = part.timings.cache_n
    if part.tokens_evaluated is not None or part.tokens_predicted is not None:
        tokens = Tokens(prompt=part.tokens_evaluated, cached=cached, completion=part.tokens_predicted)
        tally.report(tokens, "usage", part.index, final=part.stop)
    if part.stop:
        tally.ended_choices.add(part.index)
        tally.done = len(tally.ended_choices) >= tally.answers


class _Message(msgspec.Struct, gc=False):
    usage: Usage | None = None


class _MessageEvent(msgspec.Struct):
    type: Any = ""
    message: _Message | str | None = None
    usage: Usage | None = None
    delta: Any = None
    error: Any = None
    code: Any = None


_message_event = msgspec.json.Decoder(_MessageEvent)
_PIECES = ("text", "thinking", "partial_json")  # of a content_block_delta


def read_messages(tally: Tally, name: bytes, data: bytes) -> None:
    """Anthropic's /v1/messages: the prompt in message_start, the completion in message_delta, message_stop at the end.

    Usage is cumulative: what a later event leaves out stays as it was. llama.cpp's error event has the error's fields
    bare. https://docs.anthropic.com/en/api/messages-streaming
    """
    if data == b"[DONE]":
        return
    event = _message_event.decode(data)
    if name == b"error" or event.type == "error" or event.error is not None:
        bare = {"type": event.type, "code": event.code}
        tally.error = error_code(event.error if event.error is not None else bare)
    elif event.type == "content_block_delta":
        if isinstance(event.delta, dict) and any(event.delta.get(piece) for piece in _PIECES):
            tally.deltas[0] += 1
    elif event.type == "message_start":
        if isinstance(event.message, _Message) and event.message.usage:
            # `output_tokens` of a message that only begins is no count yet.
            _add_message_usage(tally, msgspec.structs.replace(event.message.usage, output_tokens=None))
    elif event.type == "message_stop":
        tally.done = True
    elif event.usage:  # message_delta, or a whole message
        _add_message_usage(tally, event.usage)
    if event.type == "message_delta":
        tally.ended_choices.add(0)


def _add_message_usage(tally: Tally, usage: Usage) -> None:
    known = tally.notes if isinstance(tally.notes, Usage) else Usage()
    said = {field: value for field, value in msgspec.structs.asdict(usage).items() if value is not None}
    tally.notes = known = msgspec.structs.replace(known, **said)
    tally.report(known.anthropic(), "usage", None, final=True)


class _Response(msgspec.Struct):
    status: str = ""
    usage: Usage | None = None
    error: Any = None


class _ResponseEvent(_Response):
    type: Any = ""
    response: _Response | None = None
    delta: Any = None
    timings: Timings | None = None
    code: Any = None


_response_event = msgspec.json.Decoder(_ResponseEvent)


def read_responses(tally: Tally, name: bytes, data: bytes) -> None:
    """OpenAI's /v1/responses: the last event repeats the whole response with its usage.

    https://platform.openai.com/docs/api-reference/responses-streaming
    """
    if data == b"[DONE]":
        tally.done = True
        return
    event = _response_event.decode(data)
    whole = event.response or event
    kind = event.type if isinstance(event.type, str) else ""
    if kind.endswith(".delta") and event.delta:
        tally.deltas[0] += 1
    if event.timings:
        tally.time(event.timings.prompt_ms, event.timings.predicted_ms)
    if whole.usage:
        tally.report(whole.usage.openai(), "usage", None, final=True)
    if kind in ("response.failed", "error") or event.error is not None or whole.status == "failed":
        tally.error = error_code(whole.error if whole.error is not None else event.code)
        tally.done = kind == "response.failed"
    elif kind in ("response.completed", "response.incomplete"):
        tally.done = True


def read_count(tally: Tally, name: bytes, data: bytes) -> None:
    """count_tokens and input_tokens: the prompt was counted, nothing was generated."""
    usage = msgspec.json.decode(data, type=Usage)
    if usage.input_tokens is not None:
        tally.report(Tokens(prompt=usage.input_tokens), "usage", None, final=True)


class _Audio(msgspec.Struct):
    type: Any = ""
    delta: Any = None
    usage: Any = None
    error: Any = None


def read_audio(tally: Tally, name: bytes, data: bytes) -> None:
    """/v1/audio/*: usage in tokens, or in seconds (not ours to count); streamed as transcript.text.delta and .done."""
    if data == b"[DONE]":
        tally.done = True
        return
    event = msgspec.json.decode(data, type=_Audio)
    if event.error is not None:
        tally.error = error_code(event.error)
    if isinstance(event.usage, dict) and event.usage.get("type", "tokens") == "tokens":
        tally.report(msgspec.convert(event.usage, Usage).openai(), "usage", None, final=True)
    kind = event.type if isinstance(event.type, str) else ""
    if kind.endswith(".delta") and event.delta:
        tally.deltas[0] += 1
    elif kind.endswith(".done"):
        tally.done = True


def error_code(error: Any) -> str:
    """The shortest name that a server's error object has for itself."""
    if isinstance(error, dict):
        error = error.get("type") or error.get("code") or "error"
    return str(error)[:100]


BODY = b"\0body"  # the event name under which a whole, non-streamed answer is read

Format = Callable[[Tally, bytes, bytes], None]

# Path -> format. Paths that are not here are read as OpenAI's shape: whoever sends `usage` is understood.
FORMATS: dict[str, Format] = {
    "/v1/chat/completions": read_openai,
    "/chat/completions": read_openai,
    "/v1/completions": read_openai,
    "/v1/embeddings": read_openai,
    "/embeddings": read_openai,
    "/v1/rerank": read_openai,
    "/v1/reranking": read_openai,
    "/rerank": read_openai,
    "/reranking": read_openai,
    "/completion": read_native,
    "/completions": read_native,
    "/infill": read_native,
    "/v1/messages": read_messages,
    "/v1/messages/count_tokens": read_count,
    "/v1/chat/completions/input_tokens": read_count,
    "/v1/responses/input_tokens": read_count,
    "/v1/responses": read_responses,
    "/responses": read_responses,
    "/v1/audio/transcriptions": read_audio,
    "/v1/audio/translations": read_audio,
    "/v1/audio/speech": read_audio,
}

# Streams of these end with a mark of their own; one that ends without it was cut, however clean its framing.
_MARKED_ENDS = frozenset({read_openai, read_native, read_messages, read_responses})


def format_of(endpoint: str) -> Format:
    return FORMATS.get(endpoint, read_openai)


def ends_with_mark(endpoint: str) -> bool:
    """Whether streams of this path are known to end with a mark."""
    return FORMATS.get(endpoint) in _MARKED_ENDS


def is_use(endpoint: str) -> bool:
    """Whether what an endpoint counts was used: some only count a prompt."""
    return FORMATS.get(endpoint) is not read_count
