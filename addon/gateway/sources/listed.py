"""Keys in a list: in the config itself, or in a file of their own, which is read again when it changes."""

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gateway.key_checks import check_key
from gateway.keys import Key, KeyProblem, hash_key, parse_expiry, parse_start
from gateway.secret import Secret
from gateway.sources.settings import StaticKey
from gateway.sources.source import Answer, Asked
from gateway.yaml_text import ConfigError, expand, read

log = logging.getLogger(__name__)

POLL_S = 1.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


def static_keys(listed: tuple[StaticKey, ...], path: str) -> dict[str, Key]:
    """SHA-256 -> key. `path`: where the list stands. Raises ConfigError."""
    found: dict[str, Key] = {}
    names: set[str] = set()
    for index, item in enumerate(listed):
        at = f"{path}[{index}]"
        digest = (item.sha256 or "").lower()
        if bool(item.key.strip()) == bool(digest):
            raise ConfigError(f"{at}: expected either a key (by ${{NAME}}) or its sha256")
        if digest and not _SHA256.fullmatch(digest):
            raise ConfigError(f"{at}.sha256: expected 64 hexadecimal digits: printf %s KEY | sha256sum")
        digest = digest or hash_key(item.key.strip())
        if item.name in names:
            raise ConfigError(f"{at}.name: {item.name!r} is taken by another key of this list")
        if digest in found:
            raise ConfigError(f"{at}: has the same key as {found[digest].name!r}")
        names.add(item.name)
        found[digest] = _key(item, at)
    return found


def _key(item: StaticKey, at: str) -> Key:
    for field in ("models", "endpoints", "networks"):
        if getattr(item, field) == ():
            raise ConfigError(f"{at}.{field}: expected one at least; leave it out for all")
    field = "expires"
    try:
        expires_at = _moment(item.expires, parse_expiry)
        field = "not_before"
        not_before = _moment(item.not_before, parse_start)
    except ValueError as error:
        raise ConfigError(f"{at}.{field}: {error}") from None
    key = Key(
        id=0,
        name=item.name,
        hint="",
        created_at="",
        disabled=item.disabled,
        expires_at=expires_at,
        models=item.models or (),
        weight=item.weight,
        priority=item.priority,
        team=item.team,
        limits=item.limits,
        endpoints=item.endpoints or (),
        networks=item.networks or (),
        not_before=not_before,
    )
    try:
        check_key(key)
    except KeyProblem as problem:
        raise ConfigError(f"{at}.{problem}") from None
    return key


def _moment(text: str | None, parse: Callable[[str, datetime], str]) -> str | None:
    """A span from now would never end: the list is read again and again."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]+[dhms]", text):
        raise ValueError(f"expected a date (2027-01-31) or a time (2027-01-31T18:00Z), got {text!r}")
    return parse(text, datetime.now(UTC))


class StaticKeys:
    """Keys that don't change."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self._keys = keys

    def start(self) -> None: ...

    def close(self) -> None: ...

    async def find(self, asked: Asked) -> Answer:
        return self._keys.get(asked.sha256)


class _Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[StaticKey, ...]


class FileKeys:
    """A file of keys, looked at each second by a thread of its own from `start` on. What is no list of keys changes
    nothing, and no fault ends the thread.

    Raises ConfigError at the start.
    """

    def __init__(self, path: Path, name: str, environ: Mapping[str, str] = os.environ) -> None:
        self._path = path
        self._name = name
        self._environ = environ
        self._text = self._read()
        self._keys = self._parse(self._text)
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self) -> None:
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="key-file", daemon=True)
            self._watcher.start()

    def close(self) -> None:
        self._stop.set()

    async def find(self, asked: Asked) -> Answer:
        return self._keys.get(asked.sha256)

    def _watch(self) -> None:
        """A change counts when it is the same at the next look: before that, somebody may still be writing."""
        seen, problem = self._text, None
        while not self._stop.wait(POLL_S):
            try:
                before, seen = seen, self._read()
                if seen == before != self._text:
                    self._keys = self._parse(seen)
                    self._text = seen
                    log.info("key source %s has read %s again: %d keys", self._name, self._path, len(self._keys))
                    problem = None
            except ConfigError as error:
                problem = self._tell(str(error), problem)
            except Exception as error:
                problem = self._tell(f"a fault: {type(error).__name__}", problem)

    def _tell(self, problem: str, told: str | None) -> str:
        if problem != told:
            log.error("key source %s keeps the keys it has: %s", self._name, problem)
        return problem

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self._path}: can't be read: {error.strerror}") from None

    def _parse(self, text: bytes) -> dict[str, Key]:
        try:
            raw = expand(read(text.decode()), self._environ)
            listed = msgspec.convert({"keys": raw} if isinstance(raw, list) else raw, _Listed, dec_hook=_secret)
            return static_keys(listed.keys, "keys")
        except (ConfigError, ValueError, RecursionError, msgspec.ValidationError) as error:
            raise ConfigError(f"{self._path}: {error}") from None


def _secret(kind: type, value: object) -> object:
    if kind is not Secret or not isinstance(value, str):
        raise ValueError(f"Expected text, got {type(value).__name__}")
    return Secret(value)
