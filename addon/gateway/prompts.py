"""A request's prompt as marks: cumulative hashes that two prompts share as far as they begin alike.

A mark stands at the end of the conversation's first message, and within it at 4 KB, 8 KB, 16 KB, …; then at the ends of
the last 64 messages, and of the 2nd, 4th, 8th, … before: where an earlier turn may have ended. Whatever stands before
the conversation (system prompt, tools) goes into the hashes but gets no mark of its own: many conversations share it,
and it says nothing about where this one was. The bytes are hashed as the client sent them: clients that send a
conversation again send its beginning alike, but for Anthropic's marks of where to cache, which move along with its end.

All of this runs on the event loop, which serves every other client meanwhile. A body of 2 MB may hold a million
messages, and an object for each would stop the loop for seconds: what has more than MAX_MESSAGES is not read.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from gateway import endpoints

# The first mark within a long text. Shorter texts are cheap to read again.
FIRST_PIECE_BYTES = 4096
# Reading less than this again costs a server next to nothing; it does not bind a conversation to a server.
MIN_BYTES = 1024
# A long session of an agent has some hundred. So many small ones were measured to take 2 to 12 ms.
MAX_MESSAGES = 4096
# An earlier turn ended at one of these, unless so many messages were added at once.
LAST_MESSAGES = 64


class Mark(msgspec.Struct, frozen=True, gc=False):
    """Everything up to `end` (in bytes of prompt) has this hash, with what stands before the conversation."""

    end: int
    hash: int


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """`marks` from the beginning to the end. `opening`: the mark at the end of the conversation's first message, which
    tells it from all others; None for a raw prompt. `bytes`: all of it, what has no marks included.
    """

    bytes: int
    marks: tuple[Mark, ...]
    opening: int | None

    @property
    def identity(self) -> int:
        """What stays the same from turn to turn."""
        return self.marks[0 if self.opening is None else self.opening].hash

    @property
    def has_history(self) -> bool:
        """Whether it goes on with a conversation, as far as one can see."""
        return self.opening is not None and len(self.marks) > self.opening + 1


class _Body(msgspec.Struct, gc=False):
    system: msgspec.Raw = msgspec.Raw(b"")
    instructions: msgspec.Raw = msgspec.Raw(b"")
    tools: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    input_prefix: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    cache_prompt: Any = True


class _Message(msgspec.Struct, gc=False):
    role: Any = None


_body = msgspec.json.Decoder(_Body)
_message = msgspec.json.Decoder(_Message)
_list = msgspec.json.Decoder(list[msgspec.Raw])
# A list's `max_length` is looked at when all of it was read; a struct's array ends at its first item too many.
_short_list = msgspec.json.Decoder(
    msgspec.defstruct(
        "_ShortList",
        [(f"item_{number}", msgspec.Raw, msgspec.Raw(b"")) for number in range(MAX_MESSAGES)],
        array_like=True,
        forbid_unknown_fields=True,
        gc=False,
    )
)

_BEFORE_CONVERSATIONS = ("system", "developer")
# Paths whose "input" or "prompt" no server keeps a prompt cache for.
_WITHOUT_CACHE = ("embed", "rerank", "audio", "tokenize", "moderations", "images", "score", "count", "classify")
# Inside of a JSON string its quotes would be escaped.
_CACHE_CONTROL = re.compile(rb',\s*"cache_control"\s*:\s*(?:null|\{[^{}]*\})')


def read_prompt(model: str | None, endpoint: str, body: bytes) -> Prompt | None:
    """The prompt in a JSON body. None: there is none, it is short, no cache will be used for it, or it has more than
    MAX_MESSAGES messages: whoever sends a million must not hold up all others while they are read.
    """
    path = endpoints.canonical(endpoint)
    if len(body) < MIN_BYTES or any(word in path for word in _WITHOUT_CACHE):
        return None
    try:
        said = _body.decode(body)
        if said.cache_prompt is False:
            return None
        prompt = _conversation(model, said, anthropic="/messages" in path) or _raw_prompt(model, said)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None  # whatever is wrong with it is the server's to say
    return prompt if prompt and prompt.bytes >= MIN_BYTES and prompt.marks else None


def _conversation(model: str | None, said: _Body, *, anthropic: bool) -> Prompt | None:
    messages = _messages(said.messages) or _input(said)
    if not messages:
        return None
    if anthropic:
        messages = [_without_cache_control(message) for message in messages]
    first = 0
    while first < len(messages) - 1 and _comes_before(messages[first]):
        first += 1
    hasher = _Hasher(model, said.system, said.instructions, said.tools, *messages[:first])
    conversation = messages[first:]
    marks = [*hasher.pieces(conversation[0], FIRST_PIECE_BYTES), hasher.end()]
    opening = len(marks) - 1
    for number, message in enumerate(conversation[1:], 2):
        hasher.add(message)
        if number > len(conversation) - LAST_MESSAGES or number.bit_count() == 1:
            marks.append(hasher.end())
    return Prompt(hasher.bytes, tuple(marks), opening)


def _messages(said: msgspec.Raw) -> list[memoryview]:
    """Raises msgspec.ValidationError when it is no list, or one of more than MAX_MESSAGES."""
    text = bytes(said)
    if text in (b"", b"null"):
        return []
    items: Iterable[msgspec.Raw]
    if text.count(b",") < MAX_MESSAGES:  # so it is short enough, and is read faster
        items = _list.decode(text)
    else:
        items = filter(None, msgspec.structs.astuple(_short_list.decode(text)))
    return [memoryview(item) for item in items]


def _input(said: _Body) -> list[memoryview]:
    """Of /v1/responses: a list of messages, or a text that is one."""
    text = memoryview(said.input)
    start = bytes(text[:1])
    return _messages(said.input) if start == b"[" else [text] if start == b'"' else []


def _without_cache_control(message: memoryview) -> memoryview:
    """Looking for the words first is much faster than the expression, which stops at each comma."""
    return memoryview(_CACHE_CONTROL.sub(b"", message)) if b'"cache_control"' in bytes(message) else message


def _comes_before(message: memoryview) -> bool:
    return bytes(message[:1]) == b"{" and _message.decode(message).role in _BEFORE_CONVERSATIONS


def _raw_prompt(model: str | None, said: _Body) -> Prompt | None:
    """A text without messages. Its closing quote is not hashed: the next one may go on there."""
    text = memoryview(said.prompt or said.input_prefix)
    if bytes(text[:1]) != b'"':
        return None
    hasher = _Hasher(model)
    return Prompt(len(text), tuple(hasher.pieces(text[:-1], MIN_BYTES)), None)


class _Hasher:
    """One hash of everything, read off at the marks. SHA-256: processors have instructions for it."""

    def __init__(self, model: str | None, *before: msgspec.Raw | memoryview) -> None:
        self.bytes = 0
        self._hash = hashlib.sha256(usedforsecurity=False)
        for part in ((model or "").encode("utf-8", "surrogatepass"), *before):
            text = memoryview(part)
            self._hash.update(b"%d:" % len(text))  # where one part ends and the next begins
            self.add(text)

    def end(self) -> Mark:
        return Mark(self.bytes, int.from_bytes(self._hash.copy().digest()[:8]))

    def pieces(self, text: memoryview, first: int) -> Iterator[Mark]:
        """Marks at `first`, twice that, and so on, as far as the text goes. All of it is hashed in the end."""
        start, end = 0, first
        while end < len(text):
            self.add(text[start:end])
            yield self.end()
            start, end = end, end * 2
        self.add(text[start:])

    def add(self, text: memoryview) -> None:
        self._hash.update(text)
        self.bytes += len(text)
