"""The most that a request can use: read from its body, and written into it where the client names no bound."""

import math
import re
from typing import Any

import msgspec

from gateway import wire

# Where each endpoint that writes answers is told how long one may become. Others write none.
FIELDS = {
    "/v1/chat/completions": "max_tokens",
    "/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/completion": "n_predict",
    "/completions": "n_predict",
    "/infill": "n_predict",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/responses": "max_output_tokens",
}
WITHOUT_ANSWERS = ("/v1/embeddings", "/embeddings", "/embedding")
# A token is one byte at least, and a chat's template costs less than the JSON around its messages; but it may begin
# with words of its own.
TEMPLATE_TOKENS = 512
BYTES_PER_TOKEN = 4
# Images and sound come as base64 of any size, or as an address. So many tokens each is, usually and at most.
MEDIA_TOKENS = 1000
MOST_MEDIA_TOKENS = 16_384
_MEDIA = re.compile(rb'"(?:url|data)"\s*:\s*"(?:data:[\w/+.;=-]{0,100},)?([A-Za-z0-9+/=\\]{4096,})"')
_MEDIA_NAMES = (b'"image_url"', b'"input_audio"', b'"input_image"', b'"image"', b'"input_file"')


class Bound(msgspec.Struct, frozen=True):
    """`tokens`: the most that a request can use. `body`: what makes it so; None: the client's own does."""

    tokens: int
    body: bytes | None = None


class _Named(msgspec.Struct):
    """Every field that a server may take for the bound of an answer: llama-server reads them on every endpoint."""

    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n_predict: Any = None
    best_of: Any = None


_named = msgspec.json.Decoder(_Named)


def estimate(body: bytes) -> int:
    """Tokens of the prompt in a JSON body, by its size."""
    media = [len(piece[1]) for piece in _MEDIA.finditer(body)] if b"base64" in body else []
    return math.ceil((len(body) - sum(media)) / BYTES_PER_TOKEN) + len(media) * MEDIA_TOKENS


def bound(endpoint: str, body: bytes, answers: int, default: int) -> Bound:
    """Of a JSON body that was read before; `answers`: how many it asks for. `default`: tokens of an answer, for
    requests that name no bound, or none that is one, and for endpoints of which nothing is known.
    """
    field = FIELDS.get(endpoint)
    if field is None:
        return Bound(_most_of_prompt(body) + (0 if endpoint in WITHOUT_ANSWERS else default))
    named = _named.decode(body)
    given = {name: getattr(named, name) for name in FIELDS.values() if getattr(named, name) is not None}
    if named.max_completion_tokens is not None:
        given["max_completion_tokens"] = named.max_completion_tokens
    limits = [math.ceil(value) for value in given.values() if _is_bound(value)]
    changed = [name for name, value in given.items() if not _is_bound(value)] or ([] if limits else [field])
    new_body = None
    for name in changed:
        new_body = wire.with_value(new_body or body, name, str(default).encode())
        limits.append(default)
    most_answers = max(answers, math.ceil(named.best_of) if _is_bound(named.best_of) else 1)
    return Bound(_most_of_prompt(body) + max(limits) * most_answers, new_body)


def _most_of_prompt(body: bytes) -> int:
    """Tools are written into the prompt as they are: what looks like an image there is text."""
    media = [len(piece[1]) for piece in _MEDIA.finditer(body)] if b"base64" in body and b'"tools"' not in body else []
    pieces = max(len(media), sum(body.count(name) for name in _MEDIA_NAMES))
    return len(body) - sum(media) + TEMPLATE_TOKENS + pieces * MOST_MEDIA_TOKENS


def _is_bound(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**31
