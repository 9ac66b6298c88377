"""keys.db as a source: asked anew each time, without waiting."""

from typing import Protocol

from gateway.keys import Key, KeysUnavailable
from gateway.sources.source import Answer, Asked, SourceFailed


class Keys(Protocol):
    def find(self, key: str) -> Key | None: ...


class LocalKeys:
    """`keys`: not closed by this source."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def start(self) -> None: ...

    def close(self) -> None: ...

    async def find(self, asked: Asked) -> Answer:
        try:
            return self._keys.find(asked.key)
        except KeysUnavailable as error:
            raise SourceFailed(f"can't be read: {error}") from error
