"""What is wrong with values that do not fit their records: which field, what is wanted, in words, and what was meant.

msgspec names types and paths; people read words.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import msgspec

_AT = re.compile(r"(.*?)(?: - at `(?:key in )?\$\.?(.*?)`)?$", re.DOTALL)
_EXPECTED = re.compile(r"[Ee]xpected `([a-z |]+)`")
_GOT = re.compile(r"got `([a-z]+)`")
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object, as in {…}",
    "null": "null",
}
_GOT_WORDS = {"int": "a number", "float": "a number with a fraction", "object": "an object"}


def located(error: msgspec.ValidationError) -> tuple[str, str]:
    """msgspec's message, and the path that it is about, as in `limits.budgets[0].per`; "" is the whole."""
    found = _AT.match(str(error))
    return (found[1], found[2] or "") if found else (str(error), "")


def in_words(message: str) -> str:
    """A message of msgspec with words in the place of names of types."""
    found = _GOT.search(message)
    got = found and (_GOT_WORDS.get(found[1]) or _WORDS.get(found[1]))
    if got:
        message = _GOT.sub(f"got {got}", message)
    message = _EXPECTED.sub(lambda match: f"expected {_kinds(match[1])}", message)
    message = re.sub(r" >= (\S+)", r", \1 or more", message)
    message = re.sub(r" <= (\S+)", r", \1 or less", message)
    return message[:1].lower() + message[1:]


def _kinds(types: str) -> str:
    return " or ".join(_WORDS.get(each.strip(), each.strip()) for each in types.split("|"))


def closest(name: str, known: Sequence[str]) -> str | None:
    """The known name that is most like it: with the same letters, as in rmp and rpm, before all others."""
    swapped = [each for each in known if sorted(each) == sorted(name)]
    return next(iter(swapped or difflib.get_close_matches(name, known, 1)), None)


def meant(name: str, known: Sequence[str]) -> str:
    """What is said of a name that is none of the known ones."""
    near = closest(name, known)
    guess = f"did you mean {near!r}? " if near else ""
    return f"{guess}There are: {', '.join(known) or 'none'}"


def fields_at(kind: Any, path: str) -> list[str]:
    """The fields that a record's type has at a path, as in `servers[0]`."""
    kinds: list[Any] = [msgspec.inspect.type_info(kind)]
    for step in re.findall(r"\w+|\[", path.replace("[...]", "[")):
        kinds = [below for each in kinds for below in _below(each, step) if not step.isdigit()] or kinds
    return list(dict.fromkeys(field.encode_name for each in kinds for field in getattr(each, "fields", ())))


def _below(kind: Any, step: str) -> list[Any]:
    """The types of a field, of a list's items or of a mapping's values; a union is all of its types."""
    if step == "[":
        found = getattr(kind, "item_type", None) or getattr(kind, "value_type", None)
    else:
        found = next((field.type for field in getattr(kind, "fields", ()) if field.encode_name == step), None)
    return [*found.types] if isinstance(found, msgspec.inspect.UnionType) else [found] if found else []
