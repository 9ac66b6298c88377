"""Keys in SQLite, PostgreSQL or MySQL/MariaDB: the query is the config's, and the key only gets into it as a value.

A row's columns are named as in `fields.FIELDS`. An old connection that is broken is opened anew, once.
"""

from gateway.sources import answers
from gateway.sources.pool import Pool
from gateway.sources.settings import Sql
from gateway.sources.source import Answer, Asked, SourceFailed
from gateway.sources.sql_connections import CONNECTORS, Connection, Row
from gateway.sources.sql_text import has_binds
from gateway.yaml_text import ConfigError


class SqlKeys:
    """Raises ConfigError when the URL or the query is wrong, or the driver is missing."""

    def __init__(self, settings: Sql) -> None:
        scheme, mark, _ = settings.url.partition("://")
        if not mark or scheme not in CONNECTORS:
            raise ConfigError(f"url: expected one that begins with {', '.join(f'{name}://' for name in CONNECTORS)}")
        if not has_binds(settings.query):
            raise ConfigError("query: expected the bind :sha256 or :key in it, as in … where secret = :sha256")
        connect = CONNECTORS[scheme](settings.url, settings.query, settings.timeout_s)
        self._answers = answers.Reader(settings)
        self._pool = Pool[Connection](connect, lambda connection: connection.close())

    def close(self) -> None:
        self._pool.close()

    def find(self, asked: Asked) -> Answer:
        try:
            asked.key.encode()
        except UnicodeEncodeError:
            return None  # no database holds such a text
        rows = self._rows({"key": str(asked.key), "sha256": asked.sha256})
        if len(rows) > 1:
            raise SourceFailed("gives more than one row for a key")
        return self._answers.read(rows[0] if rows else None)

    def _rows(self, values: dict[str, str]) -> list[Row]:
        was_used = self._pool.has_free
        try:
            with self._pool.one() as connection:
                return connection.rows(values)
        except SourceFailed:
            if not was_used:
                raise
            self._pool.clear()  # their server was started anew, perhaps
        with self._pool.one() as connection:
            return connection.rows(values)
