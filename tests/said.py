"""What a server said of an answer's tokens, read a second time and apart from the addon: slowly, with json, after the
end.

The books are held against this, so it shares no code with them: it knows where each endpoint puts its numbers
(usage, timings, running counts) and adds up choices that were reported one by one.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NATIVE = ("/completion", "/completions", "/infill")


@dataclass(frozen=True)
class Said:
    """None: not said. `prompt` includes `cached`. Times are the server's own, of the choice that took longest."""

    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None
    prompt_ms: float | None = None
    predicted_ms: float | None = None
    source: str | None = None


def said(path: str, body: bytes, prompts: int = 1) -> Said:
    """Of an answer's whole body, event stream or not. `prompts`: how many the request had."""
    docs = list(documents(body))
    if path == "/v1/messages":
        return _of_message(docs)
    if path == "/v1/responses":
        return _of_response(docs)
    if path.endswith("_tokens"):
        return Said(prompt=docs[0]["input_tokens"], source="usage")
    counts = [_native(doc) for doc in docs] if path in NATIVE else [_openai(doc) for doc in docs]
    return _sum_choices(docs, counts, prompts)


def documents(body: bytes) -> Iterable[dict[str, Any]]:
    """The JSON objects of an answer: the whole body, each part of a list, or each event."""
    text = body.decode()
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    for line in lines or [text]:
        value = json.loads(line) if line != "[DONE]" else None
        yield from (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, dict))


def deltas(body: bytes) -> int:
    """How many pieces of content, of thoughts or of tool calls an event stream holds, whole events only."""
    whole = body[: body.rfind(b"\n\n") + 2]
    return sum(_is_delta(doc) for doc in documents(whole)) if whole else 0


def _is_delta(doc: dict[str, Any]) -> bool:
    delta = doc.get("delta")
    if isinstance(delta, dict):  # Anthropic's
        return bool(delta.get("text") or delta.get("thinking") or delta.get("partial_json"))
    if delta or (doc.get("content") and "stop" in doc):  # a Responses event; a native one
        return True
    return any(_has_content(choice) for choice in doc.get("choices", []))


def _has_content(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return any((choice.get("text"), *(delta.get(name) for name in ("content", "reasoning_content", "tool_calls"))))


def _of_message(docs: list[dict[str, Any]]) -> Said:
    usage: dict[str, int] = {}
    for doc in docs:
        usage.update(doc.get("usage") or doc.get("message", {}).get("usage") or {})
    cached = usage.get("cache_read_input_tokens")
    return Said(usage["input_tokens"] + (cached or 0), cached, usage["output_tokens"], source="usage")


def _of_response(docs: list[dict[str, Any]]) -> Said:
    usage = (docs[-1].get("response") or docs[-1])["usage"]
    timings = docs[-1].get("timings", {})
    return Said(
        usage["input_tokens"],
        usage["input_tokens_details"]["cached_tokens"],
        usage["output_tokens"],
        timings.get("prompt_ms"),
        timings.get("predicted_ms"),
        "usage",
    )


def _native(doc: dict[str, Any]) -> Said | None:
    if "tokens_evaluated" not in doc:
        return None
    timings = doc.get("timings", {})
    return Said(doc["tokens_evaluated"], timings.get("cache_n"), doc["tokens_predicted"], source="usage")


def _openai(doc: dict[str, Any]) -> Said | None:
    usage, timings = doc.get("usage"), doc.get("timings")
    if usage:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Said(usage["prompt_tokens"], cached, usage.get("completion_tokens"), source="usage")
    if timings:
        cached = timings["cache_n"]
        return Said(cached + timings["prompt_n"], cached, timings["predicted_n"], source="timings")
    return None


def _sum_choices(docs: list[dict[str, Any]], counts: list[Said | None], prompts: int) -> Said:
    """llama.cpp reports each choice by itself (with timings); others the whole answer in the last chunk."""
    choice = 0
    latest: dict[int, Said] = {}
    for doc, count in zip(docs, counts, strict=True):
        if doc.get("choices"):
            choice = doc["choices"][0].get("index", 0)
        if not count:
            continue
        if "timings" not in doc and not doc.get("choices") and "stop" not in doc:
            latest = {}  # the last word on all choices
        latest[doc.get("index", choice)] = count
    if not latest:
        return Said()
    timings = [doc["timings"] for doc in docs if "timings" in doc]
    found = list(latest.values())
    shared = found[:1] if prompts == 1 else found
    return Said(
        _add(count.prompt for count in shared),
        _add(count.cached for count in shared),
        _add(count.completion for count in found),
        max((part["prompt_ms"] for part in timings), default=None),
        max((part["predicted_ms"] for part in timings), default=None),
        found[-1].source,
    )


def _add(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
