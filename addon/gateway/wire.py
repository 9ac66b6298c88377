"""A request's body <-> what we need of it: the model, whether it streams. All else in it stays, to the byte.

Bodies are read with typed structs (half a megabyte of prompt costs a fraction of a millisecond) and changed by
replacing the bytes of one value. Nothing here knows HTTP beyond a content type.
"""

import math
import re
from collections.abc import Iterator
from email.message import Message
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import msgspec

from gateway.replies import Refusal

# Longer names than any model has.
MAX_MODEL_NAME = 512
# A body is taken apart only where no shorter way finds a value in it; this many brackets, commas, colons and strings
# take about a tenth of a second, for which all others wait.
MAX_TOKENS = 300_000


class Asked(msgspec.Struct, frozen=True):
    """What a request asks for. `model` None: not said. `prompts`, `answers`: how many at once."""

    kind: Literal["json", "form", "other"] = "other"
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    prompts: int = 1
    answers: int = 1


class _Body(msgspec.Struct):
    model: Any = None
    stream: Any = None
    stream_options: Any = None
    prompt: msgspec.Raw = msgspec.Raw(b"")
    n: Any = None
    n_cmpl: Any = None


_body = msgspec.json.Decoder(_Body)


def read_json(body: bytes) -> Asked:
    """Read a JSON body. Raises Refusal (400, with `param`) when it is not an object or `model` is not a string."""
    try:
        said = _body.decode(body)
    except RecursionError:
        raise Refusal(400, "invalid_request", "The request body is nested too deeply.", param="body") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, "invalid_request", f"The request body is not a JSON object: {error}", param="body") from None
    if said.model is not None and not isinstance(said.model, str):
        raise Refusal(400, "invalid_request", "'model' must be a string.", param="model")
    _check_name(said.model)
    if _may_repeat_model(body) and len(_named(body, "model")) > 1:
        raise Refusal(400, "invalid_request", "'model' is given twice.", param="model")
    options = said.stream_options if isinstance(said.stream_options, dict) else {}
    prompts = _count_prompts(bytes(said.prompt))
    return Asked(
        kind="json",
        model=said.model,
        stream=said.stream is True,
        include_usage=options.get("include_usage") is True,
        prompts=prompts,
        answers=prompts * max(_whole(said.n), _whole(said.n_cmpl), 1),
    )


def _check_name(model: str | None) -> None:
    if model is not None and len(model) > MAX_MODEL_NAME:
        raise Refusal(400, "invalid_request", f"'model' is longer than {MAX_MODEL_NAME} characters.", param="model")


_ESCAPED_LETTER = re.compile(rb"\\u00[46]")


def _may_repeat_model(body: bytes) -> bool:
    """Whether it is worth looking: servers differ in which of two models they take, and we allow one of them."""
    return body.count(b'"model"') > 1 or _ESCAPED_LETTER.search(body) is not None


def _whole(value: Any) -> int:
    """A count; servers take 4.0 for one, too."""
    return math.ceil(value) if type(value) in (int, float) and 0 <= value < 2**31 else 0


def _count_prompts(prompt: bytes) -> int:
    """A list of strings or of token lists is that many prompts; a list of token ids (and of mixed pieces) is one."""
    if not prompt.startswith(b"["):
        return 1
    parts: list[msgspec.Raw] = msgspec.json.decode(prompt, type=list[msgspec.Raw])
    return len(parts) if parts and all(bytes(part)[:1] in (b'"', b"[", b"{") for part in parts) else 1


def read_multipart(body: bytes, content_type: str) -> Asked:
    """Read a multipart/form-data body (audio): the model is a form field. Raises Refusal (400)."""
    model = _form_field(body, content_type, "model")
    stream = _form_field(body, content_type, "stream")
    _check_name(model.value if model else None)
    return Asked(
        kind="form",
        model=model.value if model else None,
        stream=stream is not None and stream.value.lower() in ("true", "1"),
    )


class Member(NamedTuple):
    """A member of a JSON object: where its key and its value begin, where its value ends, and the key's bytes."""

    key_at: int
    value_at: int
    end: int
    key: bytes


_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:]', re.DOTALL)
_SPACE = b" \t\r\n"


def members(body: bytes) -> Iterator[Member]:
    """The members of the JSON object that `body` (valid JSON) is, in order, repeated keys included."""
    depth = 0
    key: re.Match[bytes] | None = None
    last: re.Match[bytes] | None = None
    value_at = 0
    for count, token in enumerate(_TOKEN.finditer(body)):
        if count > MAX_TOKENS:
            raise Refusal(
                400, "invalid_request", "The request body is too large to look for 'model' in it.", param="body"
            )
        text = token[0]
        if text in (b"{", b"["):
            depth += 1
        elif text == b":" and depth == 1:
            key, value_at = last, token.end()
        elif text in (b",", b"}", b"]"):
            if depth == 1 and key:
                start, end = _trim(body, value_at, token.start())
                yield Member(key.start(), start, end, key[0])
                key = None
            if text != b",":
                depth -= 1
        last = token


def _trim(body: bytes, start: int, end: int) -> tuple[int, int]:
    while body[start] in _SPACE:
        start += 1
    while body[end - 1] in _SPACE:
        end -= 1
    return start, end


def _named(body: bytes, name: str) -> list[Member]:
    return [member for member in members(body) if _is_name(member.key, name)]


def _is_name(key: bytes, name: str) -> bool:
    """Whether a key's bytes, quotes and escapes included, spell `name`."""
    try:
        return key[1:-1] == name.encode() if b"\\" not in key else bool(msgspec.json.decode(key) == name)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


_MODEL = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("[^"\\]*(?:\\.[^"\\]*)*")')


def with_model(body: bytes, model: str) -> bytes:
    """The JSON body with its model's name replaced; put first, if there is none."""
    name = msgspec.json.encode(model)
    if body.count(b'"model"') == 1 and not _ESCAPED_LETTER.search(body) and (found := _MODEL.search(body)):
        # The only place that can be the model we have read: there is no need to take the body apart.
        return body[: found.start(1)] + name + body[found.end(1) :]
    return with_value(body, "model", name)


def with_usage_asked(body: bytes) -> bytes:
    """The JSON body with stream_options.include_usage set, all other stream options kept."""
    found = _named(body, "stream_options")
    options = msgspec.json.decode(body[found[-1].value_at : found[-1].end]) if found else None
    options = {**options, "include_usage": True} if isinstance(options, dict) else {"include_usage": True}
    return with_value(body, "stream_options", msgspec.json.encode(options))


def with_value(body: bytes, name: str, value: bytes) -> bytes:
    """The JSON body with a member's value (JSON, too) replaced, wherever it is named; put first, if it is not."""
    is_there = f'"{name}"'.encode() in body or _ESCAPED_LETTER.search(body)
    found = _named(body, name) if is_there else []
    for member in reversed(found):
        body = body[: member.value_at] + value + body[member.end :]
    if found:
        return body
    start = body.index(b"{") + 1
    rest = body[start:]
    comma = b"" if rest.lstrip(_SPACE).startswith(b"}") else b","
    return body[:start] + msgspec.json.encode(name) + b":" + value + comma + rest


class _UsageChunk(msgspec.Struct):
    choices: Any = None
    usage: Any = None


def without_null_usage(raw: bytes, data: bytes) -> bytes:
    """An event's bytes without what include_usage brought: the usage chunk is gone, so is `"usage":null` in the
    others.
    """
    chunk = msgspec.json.decode(data, type=_UsageChunk)
    if chunk.usage is not None:
        return b"" if not chunk.choices else raw
    at = raw.find(data)
    nulls = [member for member in _named(data, "usage") if data[member.value_at : member.end] == b"null"]
    if at < 0 or len(nulls) != 1:
        return raw
    start, end = nulls[0].key_at, nulls[0].end
    before, after = data[:start].rstrip(_SPACE), data[end:].lstrip(_SPACE)
    if before.endswith(b","):
        before = before[:-1]
    elif after.startswith(b","):
        after = after[1:].lstrip(_SPACE)
    return raw[:at] + before + after + raw[at + len(data) :]


class FormField(NamedTuple):
    """A form field's text, and where its bytes begin and end."""

    value: str
    start: int
    end: int


def _parameter(header: str, value: str, name: str) -> str | None:
    """A parameter of a MIME header, as the standard library reads it (quoting and all)."""
    message = Message()
    message[header] = value
    found = message.get_param(name, header=header)
    return found if isinstance(found, str) else None


def _form_field(body: bytes, content_type: str, name: str) -> FormField | None:
    """Find a field of a multipart body by the boundaries of RFC 2046. Two fields of that name are refused."""
    boundary = _parameter("content-type", content_type, "boundary")
    if not boundary:
        raise Refusal(400, "invalid_request", "The multipart Content-Type has no boundary.", param="body")
    mark = re.escape(boundary.encode("latin-1", "replace"))
    marks = list(re.finditer(rb"(?:^|\r\n)--" + mark + rb"(--|[ \t]*\r\n)", body))
    found: list[FormField] = []
    for this, following in pairwise(marks):
        if this[1] == b"--":
            break
        # A part without headers begins with the blank line that would end them.
        head_at = this.end() - 2
        head_end = body.find(b"\r\n\r\n", head_at, following.start() + 2)
        if head_end >= 0 and _part_name(body[head_at:head_end]) == name:
            start, end = head_end + 4, max(head_end + 4, following.start())
            found.append(FormField(body[start:end].decode("utf-8", "replace"), start, end))
    if len(found) > 1:
        raise Refusal(400, "invalid_request", f"The form field '{name}' is given twice.", param=name)
    return found[0] if found else None


def _part_name(head: bytes) -> str | None:
    for line in head.decode("latin-1").split("\r\n"):
        header, _, value = line.partition(":")
        if header.strip().lower() == "content-disposition":
            return _parameter("content-disposition", value.strip(), "name")
    return None


def with_form_model(body: bytes, content_type: str, model: str) -> bytes:
    """The multipart body with its model field's text replaced; unchanged when it has none."""
    field = _form_field(body, content_type, "model")
    return body[: field.start] + model.encode() + body[field.end :] if field else body
