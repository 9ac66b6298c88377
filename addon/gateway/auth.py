"""Who is asking, and may they?

Authentication starts from *no*: a caller exists only where a key was found and is good.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import msgspec

from gateway.keystore import PRIORITIES, Key, KeysUnavailable
from gateway.patterns import Pattern
from gateway.replies import Refusal

# Headers that carry a key, in order. All of them are taken from every request: a user's key never reaches a server.
KEY_HEADERS = ("authorization", "x-api-key", "api-key")


class Caller(msgspec.Struct, frozen=True):
    """Whose request it is, which models it may use (none named: all), and its place among those that wait.

    `weight`: its share relative to other callers of its class. `priority`: the class, 0 goes first.
    """

    key_id: int
    key_name: str
    models: tuple[Pattern, ...]
    weight: float = 1
    priority: int = PRIORITIES["normal"]

    def may_use(self, *names: str) -> bool:
        """`names`: those of one model, as asked and as served. One of them must be allowed."""
        return not self.models or any(pattern.matches(name) for pattern in self.models for name in names)


class Keys(Protocol):
    def find(self, key: str) -> Key | None: ...


class Authenticator:
    """Keys -> callers. `utc_now` returns the time as UTC ISO 8601."""

    def __init__(self, keys: Keys, utc_now: Callable[[], str]) -> None:
        self._keys = keys
        self._utc_now = utc_now

    def authenticate(self, key_headers: dict[str, list[str]]) -> Caller:
        """`key_headers`: the values of each of KEY_HEADERS in a request. Raises Refusal: 401, 403 or 503."""
        key = _key_of(key_headers)
        if key is None:
            raise Refusal(
                401,
                "invalid_api_key",
                "No API key was given. Send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'.",
                headers={"www-authenticate": "Bearer"},
            )
        try:
            found = self._keys.find(key)
        except KeysUnavailable as error:
            raise Refusal(503, "keys_unavailable", "Keys can't be checked at the moment.") from error
        if found is None:
            raise Refusal(
                401, "invalid_api_key", "This API key is not known here.", headers={"www-authenticate": "Bearer"}
            )
        state = found.state(self._utc_now())
        if state != "active":
            raise Refusal(403, f"key_{state}", f"The API key {found.name!r} is {state}.")
        return _caller(found)


@functools.lru_cache(maxsize=1024)
def _caller(key: Key) -> Caller:
    models = tuple(Pattern(model) for model in key.models)
    return Caller(key.id, key.name, models, weight=key.weight, priority=PRIORITIES[key.priority])


def _key_of(key_headers: dict[str, list[str]]) -> str | None:
    """The first header that holds a key decides. Given twice, it is ambiguous, and what is ambiguous is no key."""
    for name in KEY_HEADERS:
        values = key_headers.get(name, [])
        if len(values) > 1:
            return None
        if values:
            value = values[0].strip()
            if name == "authorization":
                scheme, _, value = value.partition(" ")
                if scheme.lower() != "bearer":
                    continue
            if value.strip():
                return value.strip()
    return None
