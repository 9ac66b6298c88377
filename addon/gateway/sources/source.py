"""What every key source answers: not mine, mine and good, or mine and refused. What it can't answer is an error.

A source is a class with `find`, and `close` for what it holds open.
"""

from typing import Protocol

import msgspec

from gateway.keys import Key
from gateway.secret import Secret

# What is said of a key that a source knows and refuses, beside what a key's own state says.
REFUSALS = ("key_disabled", "key_expired", "key_not_yet_valid", "network_not_allowed")


class Asked(msgspec.Struct, frozen=True):
    """Whose key is this? `sha256`: of the key, in hexadecimal. `address`: the client's."""

    key: Secret
    sha256: str
    address: str


class Refused(msgspec.Struct, frozen=True):
    """The source knows the key, and says no. `code`: one of REFUSALS. `why`: for the client, a few words or none."""

    code: str
    why: str = ""


# None: the source does not know the key. A Key whose `id` is 0 is not one of keys.db.
type Answer = Key | Refused | None


class SourceFailed(Exception):
    """There is no answer: the source is down, slow, or talks nonsense. `str` never holds a key."""


class ScriptOver(SourceFailed):
    """A script has used up what it may use: its process is of no use any more."""


class Source(Protocol):
    def find(self, asked: Asked) -> Answer:
        """Raises SourceFailed."""
        ...

    def close(self) -> None: ...
