"""Streams of four endpoints: as a scripted server sends them, how each ends well, how each says that it broke off."""

import json
from dataclasses import dataclass
from typing import Any

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
NATIVE = "/completion"
PATHS = (CHAT, MESSAGES, RESPONSES, NATIVE)


@dataclass(frozen=True)
class Event:
    name: str
    data: str

    def json(self) -> Any:
        return json.loads(self.data)


def stream_of(path: str, word: str) -> list[str]:
    """The events of a whole answer on this endpoint that says `word` three times."""
    words = [f"{word} {number}" for number in range(3)]
    if path == MESSAGES:
        usage = {"input_tokens": 3, "cache_read_input_tokens": 0, "output_tokens": 0}
        return [
            _named("message_start", message={"id": "m", "role": "assistant", "content": [], "usage": usage}),
            *(_named("content_block_delta", index=0, delta={"type": "text_delta", "text": part}) for part in words),
            _named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3}),
            _named("message_stop"),
        ]
    if path == RESPONSES:
        usage = {"input_tokens": 3, "output_tokens": 3, "total_tokens": 6}
        return [
            _named("response.created", response={"id": "r", "status": "in_progress"}),
            *(_named("response.output_text.delta", item_id="i", delta=part) for part in words),
            _named("response.completed", response={"id": "r", "status": "completed", "usage": usage}),
        ]
    if path == NATIVE:
        counts = {"tokens_evaluated": 3, "tokens_predicted": 3}
        return [
            *(_plain({"content": part, "stop": False, **counts}) for part in words),
            _plain({"content": "", "stop": True, **counts}),
        ]
    counts = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    return [
        *(_plain({"choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None}]}) for part in words),
        _plain({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": counts}),
        "data: [DONE]\n\n",
    ]


def _named(kind: str, **more: Any) -> str:
    return f"event: {kind}\n{_plain({'type': kind, **more})}"


def _plain(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def events(body: bytes) -> list[Event]:
    """The whole events of a stream; comments are none."""
    found = []
    *blocks, _ = body.decode().split("\n\n")
    for block in blocks:
        lines = [line.partition(": ") for line in block.split("\n")]
        data = [value for name, _, value in lines if name == "data"]
        if data:
            found.append(Event(next((value for name, _, value in lines if name == "event"), ""), "\n".join(data)))
    return found


def has_end_mark(path: str, body: bytes) -> bool:
    """Whether a client of this endpoint takes the stream for a whole answer."""
    marks = {
        CHAT: lambda event: event.data == "[DONE]",
        MESSAGES: lambda event: event.name == "message_stop",
        RESPONSES: lambda event: event.name == "response.completed",
        NATIVE: lambda event: '"stop":true' in event.data.replace(" ", ""),
    }
    return any(map(marks[path], events(body)))


def error_in(path: str, body: bytes) -> str | None:
    """What the stream's last event says of an error, in the words of its endpoint. None: it is no error's event."""
    last = next(reversed(events(body)), Event("", ""))
    if not last.data.startswith("{"):
        return None
    said = last.json()
    if path == MESSAGES:
        # https://docs.anthropic.com/en/docs/build-with-claude/streaming#error-events
        good = last.name == "error" and said.get("type") == "error" and said["error"].get("type")
        return str(said["error"]["message"]) if good else None
    if path == RESPONSES:
        # https://platform.openai.com/docs/api-reference/responses-streaming/error
        good = last.name == "error" and said.get("type") == "error" and "code" in said
        return str(said["message"]) if good else None
    # llama-server says errors so within a stream, too
    error = said.get("error")
    return str(error["message"]) if isinstance(error, dict) and error.get("type") else None
