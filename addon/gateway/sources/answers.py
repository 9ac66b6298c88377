"""What a source gives (a row, a hash, a document, JSON, a script's table) -> Key or Refused.

Nothing is guessed: what is not as expected is an error, and so is a field that looks like a mistyped one, since a
restriction that is not understood must not be lost. Other fields are not looked at, and those that sound like a rule
are told of, once. Null is left out, except where it would have to say yes or no.
"""

import difflib
import logging
import re
from collections.abc import Mapping
from typing import Any

from gateway.key_checks import check_key
from gateway.keys import Key, KeyProblem
from gateway.limits import Limits
from gateway.sources.fields import ALIASES, BAD_STATUS, DECISIVE, EXPIRED, FIELDS, HARMLESS, Nonsense
from gateway.sources.settings import Common
from gateway.sources.source import REFUSALS, Answer, Refused, SourceFailed

log = logging.getLogger(__name__)

# How much alike two names are that mean the same, mistyped: "rmp" and "rpm", "model" and "models".
_ALIKE = 0.66
# What a rule is called elsewhere: max_rpm, requests_per_minute, is_deleted, valid_until, allowed_ips, max_budget.
_RULE = re.compile(
    r"allow|banned|block|budget|delet|denied|deny|disab|expir|inactive|(^|_)ips?($|_)|limit|lock|max|permi|per_|quota"
    r"|(^|_)[rt]p[ms]($|_)|restrict|revok|role|scope|suspen|until|valid|(^|_)ends?($|_)",
    re.IGNORECASE,
)
# Of such fields, as many are named.
_MAX_NAMED = 20


class Reader:
    """Reads the answers of one source; may be used by many threads."""

    def __init__(self, settings: Common) -> None:
        self._name = settings.name or settings.__struct_config__.tag
        self._told: set[str] = set()

    def read(self, found: object) -> Answer:
        """See the function of this name."""
        answer = read(found)
        if isinstance(answer, Key) and isinstance(found, Mapping):
            self._tell(found)
        return answer

    def _tell(self, found: Mapping[Any, Any]) -> None:
        names = [name for name in passed_over(found) if name not in self._told][: _MAX_NAMED - len(self._told)]
        if names:
            self._told.update(names)
            log.warning("key source %s gives fields that are not looked at: %s", self._name, ", ".join(names))


def passed_over(found: Mapping[Any, Any]) -> list[str]:
    """The fields that `read` does not look at, although they sound like a rule."""
    names = [name for name, value in found.items() if isinstance(name, str) and value is not None]
    strange = [name for name in names if name.isidentifier() and ALIASES.get(name.lower(), name.lower()) not in FIELDS]
    return [name for name in strange if name.lower() not in HARMLESS and _RULE.search(name)]


def read(found: object) -> Answer:
    """None: not known. False: refused. Else a mapping: see FIELDS. Raises SourceFailed, which names the field."""
    if found is None:
        return None
    if found is False:
        return Refused("key_disabled")
    if not isinstance(found, Mapping):
        raise SourceFailed(f"answers with {_kind(found)} instead of fields")
    given = _fields(found)
    allowed = given.pop("allowed", True)
    code, why = given.pop("code", "key_disabled"), given.pop("reason", "")
    if not allowed:
        return Refused(code if code in REFUSALS else "key_disabled", why)
    status = given.pop("status", "active")
    if given.pop("disabled", False) | (not given.pop("active", True)) | (status in BAD_STATUS):
        given["disabled"] = True
    if status == EXPIRED:
        given["expires_at"] = ""  # before all times
        given.pop("not_before", None)
    if "name" not in given:
        raise SourceFailed("field name: missing")
    nested = given.pop("limits", Limits())
    limits = Limits(**{name: given.pop(name) for name in Limits.__struct_fields__ if name in given})
    doubled = [name for name in Limits.__struct_fields__ if getattr(limits, name) and getattr(nested, name)]
    if doubled:
        raise SourceFailed(f"field {doubled[0]}: stands within limits, too")
    key = Key(
        **{"id": 0, "hint": "", "created_at": "", "disabled": False, "expires_at": None, "models": (), **given},
        limits=limits.over(nested),
    )
    try:
        check_key(key)
    except KeyProblem as problem:
        raise SourceFailed(f"field {problem.field}: {problem.reason}") from None
    return key


def _fields(found: Mapping[Any, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for written, value in found.items():
        if not isinstance(written, str):
            raise SourceFailed(f"names a field by {_kind(written)}")
        lower = written.lower()
        name = ALIASES.get(lower, lower)
        if value is None and name not in DECISIVE:
            continue
        if name not in FIELDS:
            close = difflib.get_close_matches(name, [*FIELDS, *ALIASES], 1, _ALIKE)
            if close and written not in HARMLESS:
                raise SourceFailed(f"field {written!r}: not known; is {close[0]!r} meant?")
            continue
        if name in given:
            raise SourceFailed(f"field {written!r}: says the same as another one")
        try:
            given[name] = FIELDS[name](value)
        except Nonsense as expected:
            raise SourceFailed(f"field {written}: expected {expected}, got {_kind(value)}") from None
    return given


def _kind(value: object) -> str:
    """Of a value, without showing it: it may be a key."""
    return "nothing" if value is None else type(value).__name__
