"""Keys in MongoDB, asked for as Comtegra's llmproxy does: `secret` is the key's SHA-256, `user_id` is who it is.

https://github.com/Comtegra/llmproxy. The fields of `fields.FIELDS` may stand in the document, too.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

from gateway.sources import answers, fields
from gateway.sources.settings import MongoDB
from gateway.sources.source import Answer, Asked, SourceFailed
from gateway.yaml_text import ConfigError

# Of an error's text.
MAX_TOLD = 200
# Whatever else says who it is: `user_id` does.
OTHER_NAMES = {"_id", "name", *(alias for alias, field in fields.ALIASES.items() if field == "name")}


class MongoKeys:
    """Raises ConfigError when the URL is wrong, or the driver is missing."""

    def __init__(self, settings: MongoDB) -> None:
        try:
            import pymongo
            from pymongo.errors import PyMongoError
        except ImportError:
            raise ConfigError("type mongodb needs pymongo, which is not installed: run scripts/extras") from None
        self._error = PyMongoError
        self._answers = answers.Reader(settings)
        self._access_level = settings.access_level
        timeout_ms = int(settings.timeout_s * 1000)
        try:
            self._client = pymongo.MongoClient[dict[str, object]](
                str(settings.url),
                connect=False,
                tz_aware=True,
                timeoutMS=timeout_ms,
                serverSelectionTimeoutMS=timeout_ms,
                connectTimeoutMS=timeout_ms,
                socketTimeoutMS=timeout_ms,
                appname="llmproxy",
                datetime_conversion="DATETIME_CLAMP",  # the driver's default fails at the year 10000
            )
        except (PyMongoError, ValueError, TypeError) as error:
            raise ConfigError(f"url: expected mongodb://HOST:PORT ({type(error).__name__})") from None
        self._keys = self._client[settings.database][settings.collection]

    def close(self) -> None:
        self._client.close()

    def find(self, asked: Asked) -> Answer:
        """One that holds, else one that has expired: it is refused as such."""
        wanted = {"access_level": self._access_level, "secret": asked.sha256}
        holds = {"$or": [{"date_expiry": None}, {"date_expiry": {"$gt": datetime.now(UTC)}}]}
        try:
            found = self._keys.find_one({**wanted, **holds}) or self._keys.find_one(wanted)
        except self._error as error:
            raise SourceFailed(f"can't be asked: {type(error).__name__}: {str(error)[:MAX_TOLD]}") from None
        return self._answers.read(_fields(found)) if found else None


def _fields(document: Mapping[str, object]) -> dict[str, object]:
    others = {name: value for name, value in document.items() if name.lower() not in OTHER_NAMES}
    return {**others, "name": document.get("user_id")}
