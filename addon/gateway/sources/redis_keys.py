"""Keys in Redis: a hash, or a string that holds a JSON object, with the fields of `fields.FIELDS`."""

import json
from typing import TYPE_CHECKING

from gateway.sources import answers
from gateway.sources.deadline import CUT, cut_off
from gateway.sources.pool import Pool
from gateway.sources.settings import Redis
from gateway.sources.source import Answer, Asked, SourceFailed
from gateway.yaml_text import ConfigError

if TYPE_CHECKING:
    import redis

# Of an error's text.
MAX_TOLD = 200


class RedisKeys:
    """Raises ConfigError when the URL or the template is wrong, or the driver is missing."""

    def __init__(self, settings: Redis) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ConfigError("type redis needs redis, which is not installed: run scripts/extras") from None
        try:
            names = {settings.key.format(sha256=digest) for digest in ("0", "1")}
        except (KeyError, IndexError, ValueError, AttributeError):
            names = set()
        if len(names) < len("01"):
            raise ConfigError("key: expected a template with {sha256} in it, as in llmproxy:key:{sha256}")
        self._answers = answers.Reader(settings)
        self._template = settings.key
        self._error = redis.RedisError
        self._timeout_s = settings.timeout_s

        def connect() -> "redis.Redis":
            return redis.Redis.from_url(
                str(settings.url),
                decode_responses=True,
                socket_timeout=settings.timeout_s,
                socket_connect_timeout=settings.timeout_s,
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),  # an old connection
            )

        self._pool = Pool(connect, lambda db: db.close())
        try:
            with self._pool.one():
                pass
        except ValueError:
            raise ConfigError("url: expected redis://USER:PASSWORD@HOST:PORT/DB, or rediss://, unix://") from None

    def close(self) -> None:
        self._pool.close()

    def find(self, asked: Asked) -> Answer:
        name = self._template.format(sha256=asked.sha256)
        try:
            with self._pool.one() as db, cut_off(CUT * self._timeout_s, lambda: _cut(db)):
                kind = str(db.type(name))
                if kind == "none":
                    return None
                if kind == "hash":
                    return self._answers.read(db.hgetall(name) or None)
                if kind != "string":
                    raise SourceFailed(f"has a {kind} where a hash or a string is expected")
                text = db.get(name)
        except (self._error, UnicodeError, OSError) as error:
            raise SourceFailed(f"can't be asked: {type(error).__name__}: {str(error)[:MAX_TOLD]}") from None
        try:
            return self._answers.read(None if text is None else json.loads(text))
        except (ValueError, RecursionError):
            raise SourceFailed("has a string that is not JSON") from None


def _cut(db: "redis.Redis") -> None:
    db.connection_pool.disconnect(inuse_connections=True)
