"""Prompts as marks: what two requests share, in every endpoint's shape, and that no body does harm."""

import itertools
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.prompts import FIRST_PIECE_BYTES, LAST_MESSAGES, MAX_MESSAGES, MIN_BYTES, Prompt, read_prompt

LONG = "word " * 300
SYSTEM = "Be brief. " * 200
TOOLS = [{"type": "function", "function": {"name": "ls", "description": "lists " * 100}}]


def read(endpoint: str, body: dict[str, Any], model: str | None = "m") -> Prompt | None:
    return read_prompt(model, endpoint, json.dumps(body).encode())


def prompt(endpoint: str, body: dict[str, Any], model: str | None = "m") -> Prompt:
    found = read(endpoint, body, model)
    assert found
    return found


def shared_bytes(one: Prompt, other: Prompt) -> int:
    """As far as two prompts begin alike, to their last common mark."""
    common = {(mark.end, mark.hash) for mark in one.marks} & {(mark.end, mark.hash) for mark in other.marks}
    return max((end for end, _ in common), default=0)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def blocks(role: str, text: str, *, marked: bool) -> dict[str, Any]:
    """A message as Anthropic's clients send it: they mark where to cache, and later elsewhere."""
    mark = {"cache_control": {"type": "ephemeral", "ttl": "5m"}} if marked else {}
    return {"role": role, "content": [{"type": "text", "text": text, **mark}]}


def item(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


type Said = list[str]  # by the user and the assistant, in turn
type Shape = tuple[str, Callable[[Said], dict[str, Any]]]


def in_turn(said: Said, make: Callable[[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [make(("user", "assistant")[index % 2], text) for index, text in enumerate(said)]


def plain(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


SHAPES: dict[str, Shape] = {
    "chat": ("/v1/chat/completions", lambda said: {"messages": in_turn(said, plain)}),
    "chat, with a system prompt and tools": (
        "/v1/chat/completions",
        lambda said: {"tools": TOOLS, "messages": [{"role": "system", "content": SYSTEM}, *in_turn(said, plain)]},
    ),
    "chat, with a developer's prompt": (
        "/chat/completions",
        lambda said: {"messages": [{"role": "developer", "content": SYSTEM}, *in_turn(said, plain)]},
    ),
    "messages": ("/v1/messages", lambda said: {"messages": in_turn(said, plain)}),
    "messages, with a system prompt and tools": (
        "/v1/messages",
        lambda said: {"system": [{"type": "text", "text": SYSTEM}], "tools": TOOLS, "messages": in_turn(said, plain)},
    ),
    "messages, with a moving mark": (
        "/v1/messages",
        lambda said: {
            "messages": [
                blocks(("user", "assistant")[index % 2], text, marked=index == len(said) - 1)
                for index, text in enumerate(said)
            ]
        },
    ),
    "responses": ("/v1/responses", lambda said: {"instructions": SYSTEM, "input": in_turn(said, item)}),
    "completions": ("/v1/completions", lambda said: {"prompt": "\n".join(said)}),
    "native": ("/completion", lambda said: {"prompt": SYSTEM + "\n".join(said), "n_predict": 5}),
    "infill": ("/infill", lambda said: {"input_prefix": "\n".join(said), "input_suffix": "}\n"}),
}
TALK = [f"first {LONG}", "answer", "second", "answer", f"third {LONG}", "answer", "fourth"]


@pytest.mark.parametrize(("endpoint", "shape"), SHAPES.values(), ids=SHAPES)
def test_a_conversations_turns_share_their_beginning(endpoint: str, shape: Callable[[Said], dict[str, Any]]) -> None:
    requests = [prompt(endpoint, shape(TALK[:count])) for count in (1, 3, 5, 7)]
    for before, after in itertools.pairwise(requests):
        assert before.identity == after.identity
        assert before.bytes < after.bytes
        if before.opening is None:
            assert shared_bytes(before, after) >= before.bytes / 2 - 1
        else:
            assert shared_bytes(before, after) == before.marks[-1].end == before.bytes


@pytest.mark.parametrize(("endpoint", "shape"), SHAPES.values(), ids=SHAPES)
def test_other_conversations_share_nothing(endpoint: str, shape: Callable[[Said], dict[str, Any]]) -> None:
    """But for raw prompts, of which nobody knows where the conversation begins."""
    one, other = (prompt(endpoint, shape([f"{name} {LONG}"])) for name in "xy")
    assert shared_bytes(one, other) == (1 + MIN_BYTES if endpoint == "/completion" else 0)  # 1: the model's name


def test_a_response_to_a_text() -> None:
    one, same, other = (prompt("/v1/responses", {"input": text + LONG}) for text in ("x", "x", "y"))
    assert one == same
    assert shared_bytes(one, other) == 0


DIFFERENT: dict[str, tuple[dict[str, Any], str | None]] = {
    "another model": ({"messages": [user(LONG)]}, "n"),
    "no model": ({"messages": [user(LONG)]}, None),
    "another system prompt": ({"messages": [{"role": "system", "content": "x"}, user(LONG)]}, "m"),
    "tools": ({"messages": [user(LONG)], "tools": TOOLS}, "m"),
    "another role": ({"messages": [assistant(LONG)]}, "m"),
}


@pytest.mark.parametrize(("body", "model"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_a_server_would_not_have_cached(body: dict[str, Any], model: str | None) -> None:
    one, other = prompt("/v1/chat/completions", {"messages": [user(LONG)]}), prompt("/v1/chat/completions", body, model)
    assert {mark.hash for mark in one.marks}.isdisjoint(mark.hash for mark in other.marks)


def test_what_stands_where_makes_a_difference() -> None:
    """Parts and messages are told from each other, not only hashed one after the other."""
    one = prompt("/v1/messages", {"system": "a", "messages": [user(LONG)]})
    other = prompt("/v1/messages", {"tools": "a", "messages": [user(LONG)]})
    assert one.identity != other.identity


def test_marks() -> None:
    """At the ends of messages, and in a long first one at 4 KB, 8 KB, …"""
    system = {"role": "system", "content": SYSTEM}
    said = [system, user("x" * 20_000), assistant("y" * 10), user("z" * 5000)]
    found = prompt("/v1/chat/completions", {"messages": said})
    lengths = [len(json.dumps(message)) for message in said]
    before = len("m") + lengths[0]
    first, second, third = before + lengths[1], before + sum(lengths[1:3]), before + sum(lengths[1:])
    pieces = [before + FIRST_PIECE_BYTES * factor for factor in (1, 2, 4)]
    assert [mark.end for mark in found.marks] == [*pieces, first, second, third]
    assert (found.opening, found.bytes) == (3, third)
    assert found.has_history


def test_a_long_conversations_marks() -> None:
    """At the ends of its last messages, of its first, and of a few between: never one for each."""
    said = [user(f"{number} word, word") for number in range(1, 1001)]
    found = prompt("/v1/chat/completions", {"messages": said})
    ends = [*itertools.accumulate((len(json.dumps(message)) for message in said), initial=len("m"))]
    last = range(1001 - LAST_MESSAGES, 1001)
    assert [ends.index(mark.end) for mark in found.marks] == [*(2**power for power in range(10)), *last]
    before = prompt("/v1/chat/completions", {"messages": said[: -LAST_MESSAGES + 1]})
    assert shared_bytes(before, found) == before.bytes


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("text", ["x", "word, " * 20], ids=["few commas", "many commas"])
def test_a_conversation_of_as_many_messages_as_are_read(endpoint: str, text: str) -> None:
    said = [user(text)] * (MAX_MESSAGES + 1)
    assert prompt(endpoint, {"messages": said[1:]}).has_history
    assert read(endpoint, {"messages": said}) is None


@pytest.mark.parametrize("item", [b"1", b"{}", b'""', b'{"role":"system"}', b"[]"])
@pytest.mark.parametrize("key", [b"messages", b"input"])
def test_a_million_messages_make_no_objects(key: bytes, item: bytes) -> None:
    body = b'{"%b":[%b]}' % (key, b",".join([item] * 1_000_000))
    tracemalloc.start()
    try:
        assert read_prompt("m", "/v1/responses", body) is None
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body)  # a copy of the body, and not much else
    finally:
        tracemalloc.stop()


def test_a_long_first_message_shares_its_beginning() -> None:
    """A template with a question at its end: as much as is alike, and no more."""
    one, other = (
        prompt("/v1/chat/completions", {"messages": [user("template " * 2000 + question)]}) for question in "xy"
    )
    assert shared_bytes(one, other) == 1 + 4 * FIRST_PIECE_BYTES
    assert one.identity != other.identity
    assert not one.has_history


def test_only_system_prompts_are_a_conversation_all_the_same() -> None:
    found = prompt("/v1/chat/completions", {"messages": [{"role": "system", "content": SYSTEM}] * 2})
    assert len(found.marks) == 1


NONE: dict[str, tuple[str, bytes]] = {
    "short": ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"hi"}]}'),
    "short, in a large body": (
        "/v1/chat/completions",
        json.dumps({"messages": [user("hi")], "grammar": LONG}).encode(),
    ),
    "a raw prompt that is short": ("/completion", json.dumps({"prompt": "hi", "grammar": LONG}).encode()),
    "no cache wanted": ("/completion", json.dumps({"prompt": LONG, "cache_prompt": False}).encode()),
    "embeddings": ("/v1/embeddings", json.dumps({"input": LONG}).encode()),
    "embeddings, written oddly": ("/v1//EMBEDDINGS/", json.dumps({"input": LONG}).encode()),
    "rerank": ("/v1/rerank", json.dumps({"query": LONG, "documents": [LONG]}).encode()),
    "tokens": ("/completion", json.dumps({"prompt": [1, 2, 3] * 1000}).encode()),
    "several prompts": ("/v1/completions", json.dumps({"prompt": [LONG, LONG]}).encode()),
    "no messages": ("/v1/chat/completions", json.dumps({"messages": [], "x": LONG}).encode()),
    "nothing": ("/v1/chat/completions", json.dumps({"x": LONG}).encode()),
    "null": ("/v1/chat/completions", json.dumps({"messages": None, "prompt": None, "input": None, "x": LONG}).encode()),
    "empty": ("/v1/chat/completions", b""),
}


@pytest.mark.parametrize(("endpoint", "body"), NONE.values(), ids=NONE)
def test_no_prompt(endpoint: str, body: bytes) -> None:
    assert read_prompt("m", endpoint, body) is None


PAD = b" " * MIN_BYTES
HARMFUL = {
    "blank": PAD,
    "no JSON": b"\x00" * 5000,
    "half": b'{"messages":[{"role":"user","content":"' + b"x" * 5000,
    "no object": b"[" + PAD + b"]",
    "a number": b"1" * 5000,
    "messages are a number": b'{"messages":1}' + PAD,
    "messages are a text": b'{"messages":"' + b"x" * 5000 + b'"}',
    "messages are an object": b'{"messages":{"a":[]}}' + PAD,
    "a message is a number": b'{"messages":[1,2,null]}' + PAD,
    "a role is a list": b'{"messages":[{"role":["system"]},{"role":{}}]}' + PAD,
    "a text is not UTF-8": b'{"messages":[{"role":"system","content":"\xff\xfe"},{"role":"\xff"}]}' + PAD,
    "a raw prompt is not UTF-8": b'{"prompt":"' + b"\xff" * 5000 + b'"}',
    "half a surrogate": b'{"messages":[{"role":"\\ud800","content":"' + b"x" * 5000 + b'"}]}',
    "deep": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep in a message": b'{"messages":[{"role":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"},{}]}",
    "deep in what nobody reads": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"prompt":"x"}',
    "a key twice": b'{"messages":[],"messages":[{}]}' + PAD,
    "rest behind it": b'{"messages":[{}]}{' + PAD,
    "a number out of range": b'{"cache_prompt":1e999,"prompt":"x"}' + PAD,
    "cache control in all places": b'{"messages":[{,"cache_control":null}]}' + PAD,
}


@pytest.mark.parametrize(
    "endpoint", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/completion", "", "\x00"]
)
@pytest.mark.parametrize("body", HARMFUL.values(), ids=HARMFUL)
def test_no_body_does_harm(endpoint: str, body: bytes) -> None:
    read_prompt("m", endpoint, body)
    read_prompt("\ud800", endpoint, body.replace(b'"messages"', b'"input"'))


def test_a_huge_body() -> None:
    found = prompt("/v1/chat/completions", {"messages": [user("x" * 20_000_000), assistant("y")]})
    assert found.bytes > 20_000_000
    assert len(found.marks) < 20
    assert len(prompt("/completion", {"prompt": "x" * 20_000_000}).marks) < 20


_LEAF = st.sampled_from([None, True, False, 0, 1e300, "", "system", "ü\ud800", LONG])
_MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "x"]), _LEAF)
_JSON = _LEAF | st.lists(_LEAF | _MESSAGE, max_size=4) | _MESSAGE
_KEYS = ("system", "instructions", "tools", "messages", "input", "input_prefix", "prompt", "cache_prompt")


@given(body=st.dictionaries(st.sampled_from(_KEYS), _JSON), endpoint=st.sampled_from([s[0] for s in SHAPES.values()]))
def test_marks_are_in_order_whatever_comes(body: dict[str, Any], endpoint: str) -> None:
    found = read(endpoint, {**body, "pad": LONG})
    if found:
        ends = [mark.end for mark in found.marks]
        assert ends == sorted(ends)
        assert 0 < ends[-1] <= found.bytes
        assert found.identity in {mark.hash for mark in found.marks}
