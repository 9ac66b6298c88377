"""What is read of a request's body, and that a change of one value leaves every other byte alone."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.replies import Refusal
from gateway.wire import (
    Asked,
    members,
    read_json,
    read_multipart,
    with_form_model,
    with_model,
    with_usage_asked,
    without_null_usage,
)

BODIES: dict[str, tuple[bytes, Asked]] = {
    "empty object": (b"{}", Asked(kind="json")),
    "all": (
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true},"n":2,"prompt":["a","b"]}',
        Asked(kind="json", model="m", stream=True, include_usage=True, prompts=2, answers=4),
    ),
    "null is left out": (b'{"model":null,"stream":null,"stream_options":null,"n":null}', Asked(kind="json")),
    "only true is true": (b'{"stream":"true","stream_options":{"include_usage":1}}', Asked(kind="json")),
    "white space": (b' \t\r\n{ "model" :\n"m" } \n', Asked(kind="json", model="m")),
    "an escape in the key": (b'{"mod\\u0065l":"m"}', Asked(kind="json", model="m")),
    "escapes in the name": (b'{"model":"\\u00e9\\ud83d\\ude00\\n"}', Asked(kind="json", model="é😀\n")),
    "model of an inner object": (b'{"x":{"model":"inner"},"model":"m"}', Asked(kind="json", model="m")),
    "native n_cmpl": (b'{"n_cmpl":3}', Asked(kind="json", answers=3)),
    "n that is no count": (b'{"n":-1,"n_cmpl":true}', Asked(kind="json")),
    "one prompt": (b'{"prompt":"a"}', Asked(kind="json")),
    "token ids are one prompt": (b'{"prompt":[1,2,3]}', Asked(kind="json")),
    "lists of token ids": (b'{"prompt":[[1,2],[3]]}', Asked(kind="json", prompts=2, answers=2)),
    "a mix is one prompt": (b'{"prompt":[1,"a",2]}', Asked(kind="json")),
    "no prompts": (b'{"prompt":[]}', Asked(kind="json")),
    "stream_options of another type": (b'{"stream_options":[1]}', Asked(kind="json")),
    "huge numbers elsewhere": (b'{"x":' + b"9" * 5000 + b',"model":"m"}', Asked(kind="json", model="m")),
}

BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "body"),
    "array": (b'[{"model":"m"}]', "body"),
    "string": (b'"m"', "body"),
    "cut off": (b'{"model":"m"', "body"),
    "more behind it": (b'{"model":"m"}{"model":"n"}', "body"),
    "single quotes": (b"{'model':'m'}", "body"),
    "byte order mark": (b'\xef\xbb\xbf{"model":"m"}', "body"),
    "UTF-16": ('{"model":"m"}'.encode("utf-16"), "body"),
    "NaN": (b'{"temperature":NaN}', "body"),
    "infinity": (b'{"n":1e999}', "body"),
    "lone surrogate in the name": (b'{"model":"\\ud800"}', "body"),
    "not UTF-8 in the name": (b'{"model":"\xff"}', "body"),
    "deeply nested": (b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "body"),
    "deeply nested, in a field we read": (b'{"n":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "body"),
    "deeply nested prompt": (b'{"prompt":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "body"),
    "model a number": (b'{"model":1}', "model"),
    "model a list": (b'{"model":["m"]}', "model"),
    "model an object": (b'{"model":{"a":1}}', "model"),
    "too long a model": (b'{"model":"' + b"x" * 513 + b'"}', "model"),
    "two models to tell apart in too large a body": (
        b'{"x":{"model":1},"y":[' + b"0," * 300_000 + b'0],"model":"m"}',
        "body",
    ),
    "doubled models": (b'{"model":"a","model":"b"}', "model"),
    "doubled models, one with an escape": (b'{"model":"a","mod\\u0065l":"b"}', "model"),
    "the last of doubled models a number": (b'{"model":"m","model":1}', "model"),
}


@pytest.mark.parametrize(("body", "asked"), BODIES.values(), ids=BODIES)
def test_read_json(body: bytes, asked: Asked) -> None:
    assert read_json(body) == asked


@pytest.mark.parametrize(("body", "param"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_read_json_refuses(body: bytes, param: str) -> None:
    with pytest.raises(Refusal) as caught:
        read_json(body)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_request", param)


RENAMED: dict[str, tuple[bytes, bytes]] = {
    "replaced": (b'{ "model" : "old" , "x":1}', b'{ "model" : "new" , "x":1}'),
    "null": (b'{"model":null}', b'{"model":"new"}'),
    "each of doubled ones": (b'{"model":"a","x":1,"model":"bb"}', b'{"model":"new","x":1,"model":"new"}'),
    "an escaped key": (b'{"\\u006dodel":"a"}', b'{"\\u006dodel":"new"}'),
    "put first": (b'{ "x":1}', b'{"model":"new", "x":1}'),
    "into nothing": (b" { } ", b' {"model":"new" } '),
    "not the inner one": (
        b'{"x":{"model":"a"},"y":[{"model":"b"}],"z":"\\"model\\":","model":"c"}',
        b'{"x":{"model":"a"},"y":[{"model":"b"}],"z":"\\"model\\":","model":"new"}',
    ),
    "numbers as they are": (
        b'{"a":1.0e+2,"b":9999999999999999999999,"model":"m"}',
        b'{"a":1.0e+2,"b":9999999999999999999999,"model":"new"}',
    ),
    "not UTF-8 elsewhere": (b'{"x":"\xff","model":"m"}', b'{"x":"\xff","model":"new"}'),
}


@pytest.mark.parametrize(("body", "expected"), RENAMED.values(), ids=RENAMED)
def test_with_model(body: bytes, expected: bytes) -> None:
    assert with_model(body, "new") == expected


@pytest.mark.parametrize("key", [b'"\xff"', b'"a\\ud800"'], ids=["not UTF-8", "lone surrogate"])
def test_a_body_that_was_read_can_be_changed(key: bytes) -> None:
    """What read_json lets pass, the changes must be able to take: a failure there is a fault of ours (500)."""
    body = b"{" + key + b':1,"model":"m"}'
    try:
        read_json(body)
    except Refusal:
        return
    assert with_model(body, "new") == b"{" + key + b':1,"model":"new"}'
    assert with_usage_asked(body).endswith((b"{" + key + b':1,"model":"m"}')[1:])


def test_a_new_name_is_escaped() -> None:
    assert json.loads(with_model(b'{"model":"m"}', 'a"b\\c\né')) == {"model": 'a"b\\c\né'}


ASKED: dict[str, tuple[bytes, bytes]] = {
    "added": (b'{"stream":true}', b'{"stream_options":{"include_usage":true},"stream":true}'),
    "null": (b'{"stream_options": null }', b'{"stream_options": {"include_usage":true} }'),
    "false": (b'{"stream_options":{"include_usage":false}}', b'{"stream_options":{"include_usage":true}}'),
    "others kept": (b'{"stream_options":{"a":[1]}}', b'{"stream_options":{"a":[1],"include_usage":true}}'),
}


@pytest.mark.parametrize(("body", "expected"), ASKED.values(), ids=ASKED)
def test_with_usage_asked(body: bytes, expected: bytes) -> None:
    assert with_usage_asked(body) == expected
    assert read_json(expected).include_usage


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.text() | st.sampled_from(["model", "stream_options", "stream", 'a"model":', "mo\\del"])
documents = st.dictionaries(names, json_values, max_size=5)
spaces = st.text(" \t\r\n", max_size=2)


@st.composite
def written(draw: st.DrawFn, document: dict[str, Any]) -> list[tuple[str, bytes, bytes]]:
    """A document's members in some spelling: (name, bytes up to the value, the value's bytes)."""
    parts: list[tuple[str, bytes, bytes]] = []
    for name, value in document.items():
        key = json.dumps(name, ensure_ascii=draw(st.booleans()))
        text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
        before = f"{',' if parts else ''}{draw(spaces)}{key}{draw(spaces)}:{draw(spaces)}"
        parts.append((name, before.encode("utf-8", "surrogatepass"), text.encode("utf-8", "surrogatepass")))
    return parts


CHANGES: dict[str, tuple[Callable[[bytes], bytes], Callable[[Any], Any]]] = {
    "model": (lambda body: with_model(body, "new"), lambda _: "new"),
    "stream_options": (
        with_usage_asked,
        lambda old: {**(old if isinstance(old, dict) else {}), "include_usage": True},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_change_touches_one_value_only(name: str, data: st.DataObject) -> None:
    change, value_after = CHANGES[name]
    document = data.draw(documents)
    parts = data.draw(written(document))
    head, tail = b"{", data.draw(spaces).encode() + b"}" + data.draw(spaces).encode()
    body = head + b"".join(before + value for _, before, value in parts) + tail
    assert json.loads(body) == document

    changed = change(body)

    expected = {**document, name: value_after(document.get(name))}
    assert json.loads(changed) == expected
    if name in document:
        at = [part[0] for part in parts].index(name)
        before = head + b"".join(b + v for _, b, v in parts[:at]) + parts[at][1]
        after = b"".join(b + v for _, b, v in parts[at + 1 :]) + tail
    else:
        before, after = b"{", body[1:]
    assert changed.startswith(before)
    assert changed.endswith(after)


@settings(deadline=None)
@given(documents)
def test_members_are_found_where_they_are(document: dict[str, Any]) -> None:
    body = json.dumps(document).encode()
    found = {json.loads(m.key): json.loads(body[m.value_at : m.end]) for m in members(body)}
    assert found == document
    assert all(body[m.key_at :].startswith(m.key) for m in members(body))


NULL_USAGE: dict[str, tuple[bytes, bytes]] = {
    "last": (b'{"choices":[1],"usage":null}', b'{"choices":[1]}'),
    "first": (b'{"usage":null,"choices":[1]}', b'{"choices":[1]}'),
    "in the middle": (b'{"a":1,"usage":null,"choices":[1]}', b'{"a":1,"choices":[1]}'),
    "with spaces, last": (b'{"choices": [1], "usage": null}', b'{"choices": [1]}'),
    "with spaces, first": (b'{"usage": null, "choices": [1]}', b'{"choices": [1]}'),
    "with spaces, in the middle": (b'{"a": 1, "usage": null, "choices": [1]}', b'{"a": 1, "choices": [1]}'),
    "alone": (b'{"usage":null}', b"{}"),
    "an inner one stays": (b'{"x":{"usage":null},"choices":[1]}', b'{"x":{"usage":null},"choices":[1]}'),
    "in a text": (b'{"t":",\\"usage\\":null","usage":null}', b'{"t":",\\"usage\\":null"}'),
    "usage beside choices stays": (b'{"choices":[1],"usage":{"a":1}}', b'{"choices":[1],"usage":{"a":1}}'),
}


@pytest.mark.parametrize(("data", "expected"), NULL_USAGE.values(), ids=NULL_USAGE)
def test_without_null_usage(data: bytes, expected: bytes) -> None:
    frame = b"event: e\ndata: %b\nid: 1\n\n"
    assert without_null_usage(frame % data, data) == frame % expected


def test_the_usage_chunk_is_dropped() -> None:
    data = b'{"choices":[],"usage":{"prompt_tokens":1}}'
    assert without_null_usage(b"data: " + data + b"\n\n", data) == b""


def form(*parts: tuple[str, str], boundary: str = "B", end: str = "--B--\r\n") -> bytes:
    return ("".join(f"--{boundary}\r\n{head}\r\n\r\n{value}\r\n" for head, value in parts) + end).encode()


MODEL = ('Content-Disposition: form-data; name="model"', "whisper")
FILE = 'Content-Disposition: form-data; name="file"; filename="{}"\r\nContent-Type: audio/wav'
CONTENT_TYPE = "multipart/form-data; boundary=B"

FORMS: dict[str, tuple[bytes, str, str | None]] = {
    "a field": (form(MODEL), CONTENT_TYPE, "whisper"),
    "no such field": (form((FILE.format("a.wav"), "RIFF")), CONTENT_TYPE, None),
    "behind a file": (form((FILE.format("a.wav"), "RIFF"), MODEL), CONTENT_TYPE, "whisper"),
    "quoted boundary": (
        form(MODEL, boundary="a b:c", end="--a b:c--"),
        'multipart/form-data; boundary="a b:c"',
        "whisper",
    ),
    "boundary not last": (form(MODEL), "multipart/form-data; boundary=B; charset=utf-8", "whisper"),
    "parameter in capitals": (form(MODEL), "Multipart/Form-Data; BOUNDARY=B", "whisper"),
    "boundary of regex signs": (
        form(MODEL, boundary="a.*", end="--a.*--"),
        "multipart/form-data; boundary=a.*",
        "whisper",
    ),
    "another parameter that ends like it": (form(MODEL), "multipart/form-data; x-boundary=A; boundary=B", "whisper"),
    "name without quotes": (form(("content-disposition: form-data; name=model", "m")), CONTENT_TYPE, "m"),
    "more headers": (form(("X-A: b\r\n" + MODEL[0] + "\r\nContent-Type: text/plain", "m")), CONTENT_TYPE, "m"),
    "empty": (form((MODEL[0], "")), CONTENT_TYPE, ""),
    "several lines": (form((MODEL[0], "a\r\nb")), CONTENT_TYPE, "a\r\nb"),
    "preamble": (b"hello\r\n" + form(MODEL), CONTENT_TYPE, "whisper"),
    "space behind the boundary": (form(MODEL).replace(b"--B\r\n", b"--B \t\r\n"), CONTENT_TYPE, "whisper"),
    "a longer boundary in a file": (
        form((FILE.format("a"), "x\r\n--Bx\r\n" + MODEL[0] + "\r\n\r\nfake"), MODEL),
        CONTENT_TYPE,
        "whisper",
    ),
    "a field's head in a file": (form((FILE.format("a"), MODEL[0] + "\r\n\r\nfake"), MODEL), CONTENT_TYPE, "whisper"),
    "a boundary within a line": (
        form((FILE.format("a"), "x--B\r\n" + MODEL[0] + "\r\n\r\nfake"), MODEL),
        CONTENT_TYPE,
        "whisper",
    ),
    "a file named like it": (form((FILE.format("x; name=model"), "fake"), MODEL), CONTENT_TYPE, "whisper"),
    "a filename with name=, in front": (
        form(('Content-Disposition: form-data; filename="; name=model ;"; name="file"', "fake"), MODEL),
        CONTENT_TYPE,
        "whisper",
    ),
    "name= in another header": (
        form(('X-Note: a; name=model\r\nContent-Disposition: form-data; name="file"', "fake"), MODEL),
        CONTENT_TYPE,
        "whisper",
    ),
    "a part behind the end": (form((FILE.format("a"), "RIFF")) + b"\r\n" + form(MODEL), CONTENT_TYPE, None),
    "LF only": (form(MODEL).replace(b"\r\n", b"\n"), CONTENT_TYPE, None),
    "no end": (form(MODEL, end=""), CONTENT_TYPE, None),
    "no body": (b"", CONTENT_TYPE, None),
}


@pytest.mark.parametrize(("body", "content_type", "model"), FORMS.values(), ids=FORMS)
def test_read_multipart(body: bytes, content_type: str, model: str | None) -> None:
    assert read_multipart(body, content_type) == Asked(kind="form", model=model)


@pytest.mark.parametrize(
    ("value", "stream"), [("true", True), ("True", True), ("1", True), ("false", False), ("", False)]
)
def test_streamed_forms(value: str, stream: bool) -> None:
    body = form(('Content-Disposition: form-data; name="stream"', value))
    assert read_multipart(body, CONTENT_TYPE) == Asked(kind="form", stream=stream)


BAD_FORMS = {
    "no boundary": (form(MODEL), "multipart/form-data", "body"),
    "twice": (form(MODEL, MODEL), CONTENT_TYPE, "model"),
    "twice, with different values": (form(MODEL, (MODEL[0], "other")), CONTENT_TYPE, "model"),
}


@pytest.mark.parametrize(("body", "content_type", "param"), BAD_FORMS.values(), ids=BAD_FORMS)
def test_read_multipart_refuses(body: bytes, content_type: str, param: str) -> None:
    with pytest.raises(Refusal) as caught:
        read_multipart(body, content_type)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_request", param)


def test_with_form_model() -> None:
    file = (FILE.format("a.wav"), "\x00RIFF\r\n")
    assert with_form_model(form(file, MODEL), CONTENT_TYPE, "big é") == form(file, (MODEL[0], "big é"))
    assert with_form_model(form(file), CONTENT_TYPE, "big") == form(file)
