"""The scripted upstream's answers, in llama-server's bytes: same keys in the same order, same framing.

Everything is constant for a given number of chunks, so that the load generator knows each answer's exact bytes.
"""

import json
import zlib
from dataclasses import dataclass
from functools import cache

MODEL = "bench"
PATH = "/v1/chat/completions"
DONE = b"data: [DONE]\n\n"

_ID = "chatcmpl-rBjun2eXAjlMIwmR7kUpd6RKRFKwIdYV"
_CREATED = 1795249785
_WORDS = (" about", " are", " good", " do", " part", " into", " another", " together", ' her"', " an", " 日本")
_HEAD = b"HTTP/1.1 %s\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\n"
STREAM_HEAD = (
    _HEAD % b"200 OK" + b"X-Accel-Buffering: no\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Keep-Alive: timeout=5, max=100\r\n\r\n"
)


@dataclass(frozen=True)
class Fingerprint:
    """What a whole answer's body must be."""

    size: int
    crc: int


def fingerprint(body: bytes) -> Fingerprint:
    return Fingerprint(len(body), zlib.crc32(body))


def request_body(chunks: int, *, stream: bool, pace_per_s: int = 0) -> bytes:
    """A chat request with a prompt of 6 KB: agents' first turns are larger.

    `max_tokens` tells the upstream how many chunks, `seed` at what pace (0: at once): every gateway passes these two
    fields on.
    """
    fields = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "you are a good help " * 150},
            {"role": "user", "content": "tell me about the world and the people " * 75},
        ],
        "max_tokens": chunks,
        "seed": pace_per_s,
        "temperature": 0.8,
        "stream": stream,
    }
    return json.dumps(fields).encode()


def reply(status: str, fields: object) -> bytes:
    """A whole answer, head and JSON body; from 400 on llama-server closes the connection."""
    body = _json(fields)
    closing = b"Connection: close\r\n" if status >= "4" else b"Keep-Alive: timeout=5, max=100\r\n"
    kind = b"Content-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n" % len(body)
    return _HEAD % status.encode() + kind + closing + b"\r\n" + body


def completion_fields(tokens: int) -> dict[str, object]:
    """An answer that is not streamed."""
    message = {"role": "assistant", "content": "".join(_word(i) for i in range(tokens))}
    return {
        "choices": [{"finish_reason": "length", "index": 0, "message": message}],
        "created": _CREATED,
        "model": MODEL,
        "system_fingerprint": "b0-unknown",
        "object": "chat.completion",
        "usage": _usage(tokens),
        "id": _ID,
        "timings": _timings(tokens),
    }


@cache
def completion(tokens: int) -> bytes:
    return reply("200 OK", completion_fields(tokens))


@cache
def completion_fingerprint(tokens: int) -> Fingerprint:
    return fingerprint(_json(completion_fields(tokens)))


@cache
def payloads(chunks: int, include_usage: bool = False) -> tuple[bytes, ...]:
    """The payloads of a stream's HTTP chunks: the first holds two events, the last is [DONE]."""
    deltas = [_delta({"content": _word(i)}) for i in range(chunks)]
    first = _delta({"role": "assistant", "content": None}) + (deltas[0] if deltas else b"")
    if include_usage:
        last = _delta({}, "length") + _event(
            {"choices": [], **_common(), "usage": _usage(chunks), "timings": _timings(chunks)}
        )
    else:
        last = _delta({}, "length", timings=_timings(chunks))
    return (first, *deltas[1:], last, DONE)


@cache
def frames(chunks: int, include_usage: bool = False) -> tuple[bytes, ...]:
    """The same, framed as HTTP chunks, the terminator with the last one."""
    framed = [b"%x\r\n%s\r\n" % (len(payload), payload) for payload in payloads(chunks, include_usage)]
    return (*framed[:-1], framed[-1] + b"0\r\n\r\n")


@cache
def stream_fingerprint(chunks: int) -> Fingerprint:
    return fingerprint(b"".join(payloads(chunks)))


def health() -> bytes:
    return reply("200 OK", {"status": "ok"})


def models() -> bytes:
    entry = {
        "id": MODEL,
        "aliases": [MODEL],
        "tags": [],
        "object": "model",
        "created": _CREATED,
        "owned_by": "llamacpp",
    }
    listed = {"name": MODEL, "model": MODEL, "type": "model", "capabilities": ["completion"]}
    return reply("200 OK", {"models": [listed], "object": "list", "data": [entry]})


def not_found() -> bytes:
    error = {"message": "File Not Found", "type": "not_found_error", "code": 404}
    return reply("404 Not Found", {"error": error})


def _json(fields: object) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def _event(fields: object) -> bytes:
    return b"data: " + _json(fields) + b"\n\n"


def _common() -> dict[str, object]:
    return {
        "created": _CREATED,
        "id": _ID,
        "model": MODEL,
        "system_fingerprint": "b0-unknown",
        "object": "chat.completion.chunk",
    }


def _delta(delta: object, finish_reason: str | None = None, **more: object) -> bytes:
    choice = {"finish_reason": finish_reason, "index": 0, "delta": delta}
    return _event({"choices": [choice], **_common(), **more})


def _word(position: int) -> str:
    return _WORDS[position % len(_WORDS)]


def _usage(tokens: int) -> dict[str, object]:
    details = {"cached_tokens": 47}
    return {
        "completion_tokens": tokens,
        "prompt_tokens": 48,
        "total_tokens": 48 + tokens,
        "prompt_tokens_details": details,
    }


def _timings(tokens: int) -> dict[str, object]:
    predicted_ms = round(tokens * 0.12, 3)
    return {
        "cache_n": 47,
        "prompt_n": 1,
        "prompt_ms": 0.258,
        "prompt_per_token_ms": 0.258,
        "prompt_per_second": 3875.968992248062,
        "predicted_n": tokens,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": 0.12,
        "predicted_per_second": 8333.333333333334,
    }
