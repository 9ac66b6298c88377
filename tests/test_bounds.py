"""The most that a request can use: whatever field names it, and written into the body where none does."""

import json

import pytest

from gateway.bounds import MEDIA_TOKENS, MOST_MEDIA_TOKENS, TEMPLATE_TOKENS, bound, estimate

CHAT = "/v1/chat/completions"
DEFAULT = 100

# body -> tokens of answers, the body that goes out (None: as it came)
BODIES: dict[str, tuple[str, str, int, int, str | None]] = {
    "named": (CHAT, '{"max_tokens":7}', 1, 7, None),
    "the newer name": (CHAT, '{"max_completion_tokens":7}', 1, 7, None),
    "the larger one counts": (CHAT, '{"max_tokens":7,"n_predict":9}', 1, 9, None),
    "several answers": (CHAT, '{"max_tokens":7,"n":3}', 3, 21, None),
    "the best of several": (CHAT, '{"max_tokens":7,"best_of":4}', 1, 28, None),
    "zero": (CHAT, '{"max_tokens":0}', 1, 0, None),
    "a float": (CHAT, '{"max_tokens":6.5}', 1, 7, None),
    "none": (CHAT, '{"messages":[]}', 1, DEFAULT, '{"max_tokens":100,"messages":[]}'),
    "an empty body": (CHAT, "{}", 1, DEFAULT, '{"max_tokens":100}'),
    "null": (CHAT, '{"max_tokens":null}', 1, DEFAULT, '{"max_tokens":100}'),
    "endless": (CHAT, '{"max_tokens":-1, "x":1}', 1, DEFAULT, '{"max_tokens":100, "x":1}'),
    "endless behind a bound": (CHAT, '{"max_tokens":7,"n_predict":-1}', 1, DEFAULT, '{"max_tokens":7,"n_predict":100}'),
    "no number": (CHAT, '{"max_tokens":"many"}', 1, DEFAULT, '{"max_tokens":100}'),
    "true is no number": (CHAT, '{"max_tokens":true}', 1, DEFAULT, '{"max_tokens":100}'),
    "too large to be meant": (CHAT, '{"max_tokens":1e300}', 1, DEFAULT, '{"max_tokens":100}'),
    "native": ("/completion", '{"prompt":"a"}', 1, DEFAULT, '{"n_predict":100,"prompt":"a"}'),
    "responses": ("/v1/responses", '{"input":"a"}', 1, DEFAULT, '{"max_output_tokens":100,"input":"a"}'),
    "given twice": (CHAT, '{"max_tokens":-1,"max_tokens":-1}', 1, DEFAULT, '{"max_tokens":100,"max_tokens":100}'),
}


@pytest.mark.parametrize(("endpoint", "body", "answers", "tokens", "sent"), BODIES.values(), ids=BODIES)
def test_bound(endpoint: str, body: str, answers: int, tokens: int, sent: str | None) -> None:
    found = bound(endpoint, body.encode(), answers, DEFAULT)
    assert found.tokens - len(body) - TEMPLATE_TOKENS == tokens
    assert found.body == (sent.encode() if sent else None)
    json.loads(found.body or body)


def test_what_writes_no_answers() -> None:
    assert bound("/v1/embeddings", b'{"input":"a"}', 1, DEFAULT).tokens == 13 + TEMPLATE_TOKENS


def test_what_is_not_known_may_write_one() -> None:
    assert bound("/v1/new", b'{"input":"a"}', 1, DEFAULT).tokens == 13 + TEMPLATE_TOKENS + DEFAULT


IMAGE = "A" * 5000
PROMPTS: dict[str, tuple[str, int]] = {
    "text": ("x" * 400, 100),
    "part of a token": ("x", 1),
    "an image's URL": (f'{{"url":"data:image/png;base64,{IMAGE}"}}', 8 + MEDIA_TOKENS),
    "an image as Anthropic has it": (f'{{"type":"base64","data":"{IMAGE}"}}', 7 + MEDIA_TOKENS),
    "two": (f'["base64",{{"url":"{IMAGE}"}},{{"data":"{IMAGE}"}}]', 9 + 2 * MEDIA_TOKENS),
    "a small one is text": ('{"url":"data:image/png;base64,AAAA"}', 9),
    "one long word is text": (f'["base64","{IMAGE}"]', 1254),
}


@pytest.mark.parametrize(("body", "tokens"), PROMPTS.values(), ids=PROMPTS)
def test_estimate(body: str, tokens: int) -> None:
    assert estimate(body.encode()) == tokens


MOST: dict[str, tuple[str, int]] = {
    "an image": (f'{{"url":"data:image/png;base64,{IMAGE}"}}', 32 + MOST_MEDIA_TOKENS),
    "an image's address": ('{"image_url":{"url":"http://h/a.png"}}', 38 + MOST_MEDIA_TOKENS),
    "what looks like one": (f'["base64","{IMAGE}"]', 5013),
    "what looks like one among tools": (f'{{"tools":[{{"url":"data:x;base64,{IMAGE}"}}]}}', 5036),
}


@pytest.mark.parametrize(("body", "tokens"), MOST.values(), ids=MOST)
def test_the_most_of_a_prompt(body: str, tokens: int) -> None:
    assert bound("/v1/embeddings", body.encode(), 1, DEFAULT).tokens == tokens + TEMPLATE_TOKENS
