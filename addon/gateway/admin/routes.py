"""The table that both the answers and the OpenAPI document are made of: a route says what it takes and what it gives.

Everything that comes in is checked here against the route's types, so that handlers see only what is right.
"""

import functools
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from gateway import hints
from gateway.admin.desk import Desk
from gateway.replies import Refusal

# A list's page; a number within JSON's exact ones (JavaScript's).
MAX_LIMIT = 1000
MAX_INT = 2**53


class Nothing(msgspec.Struct, frozen=True):
    """A route's parameters, or its body, where it takes none."""


class Other(msgspec.Struct, frozen=True):
    """An answer with another status than 200."""

    status: int
    body: object


class Route[P: msgspec.Struct, B: msgspec.Struct](msgspec.Struct, frozen=True):
    """`params`: those of the path template (in braces) and of the query. `gives`: the type of the answer; `also`:
    further statuses with their types. `refuses`: statuses of refusals that only this route has.
    """

    method: str
    path: str
    summary: str
    handler: Callable[[Desk, P, B], Awaitable[object]]
    params: type[P]
    body: type[B]
    gives: Any
    refuses: tuple[int, ...] = ()
    also: Mapping[int, Any] = {}

    @property
    def in_path(self) -> tuple[str, ...]:
        return tuple(re.findall(r"\{(\w+)\}", self.path))

    @property
    def has_body(self) -> bool:
        return self.body is not Nothing


type Routes = tuple[Route[Any, Any], ...]


def match(template: str, path: str) -> dict[str, str] | None:
    """The values of a template's parameters in a path, decoded. None: it is another path. Raises Refusal."""
    wanted, given = template.split("/"), path.split("/")
    if len(wanted) != len(given):
        return None
    found = {}
    for want, have in zip(wanted, given, strict=True):
        if want.startswith("{"):
            found[want[1:-1]] = _decoded(have, want[1:-1])
        elif want != have:
            return None
    return found


def read_params[P: msgspec.Struct](kind: type[P], in_path: Mapping[str, str], query: str) -> P:
    """Raises Refusal (400) that names the parameter."""
    given: dict[str, str] = {}
    for part in query.split("&") if query else ():
        if part:
            name, _, value = part.partition("=")
            name = _decoded(name.replace("+", " "), "query")
            if name in given:
                raise bad(name, "is given twice")
            given[name] = _decoded(value.replace("+", " "), name)
    known = _fields(kind)
    for name in given:
        if name not in known or name in in_path:
            raise bad(name, f"unknown parameter; {hints.meant(name, sorted(set(known) - set(in_path)))}")
    values = {name: _number(name, text) if known[name] else text for name, text in {**given, **in_path}.items()}
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise _explained(error, kind) from None


def read_body[B: msgspec.Struct](kind: type[B], body: bytes) -> B:
    """JSON, whatever it is called. An empty body is an empty object. Raises Refusal (400) that names the field."""
    try:
        return msgspec.json.decode(body.strip() or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise _explained(error, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad("body", f"is not JSON that can be read: {error}") from None


def bad(param: str, problem: str) -> Refusal:
    return Refusal(400, "invalid_request", f"{param}: {problem}", param=param)


_NAMED = re.compile(r"(?:missing required|contains unknown) field `(.*)`", re.DOTALL)


def _explained(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> Refusal:
    """msgspec's message -> the field at fault, and what is wrong with it."""
    message, path = hints.located(error)
    if named := _NAMED.search(message):
        field = f"{path}.{named[1]}" if path else named[1]
        known = hints.fields_at(kind, path)
        return bad(
            field[:200], "is required" if "missing" in message else f"unknown field; {hints.meant(named[1], known)}"
        )
    return bad(path or "body", hints.in_words(message))


def _decoded(text: str, name: str) -> str:
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise bad(name, "is not UTF-8") from None


def _number(name: str, text: str) -> int:
    """Plain digits only: what other ways there are to write a number is nobody's business."""
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise bad(name, f"expected a whole number, got {text[:50]!r}")
    return int(text)


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> dict[str, bool]:
    """Each field of a Struct of parameters, and whether it is a number."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    return {field.encode_name: _is_number(field.type) for field in info.fields}


def _is_number(kind: msgspec.inspect.Type) -> bool:
    if isinstance(kind, msgspec.inspect.Metadata):
        return _is_number(kind.type)
    if isinstance(kind, msgspec.inspect.UnionType):
        return any(_is_number(each) for each in kind.types)
    return isinstance(kind, msgspec.inspect.IntType)
