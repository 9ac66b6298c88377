"""Connections to the databases that hold keys. Whatever their drivers raise becomes SourceFailed, without the text of a
failed query, which may hold the key.
"""

import contextlib
import math
import socket
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from gateway.sources.deadline import CUT, cut_off
from gateway.sources.settings import SQLITE
from gateway.sources.source import SourceFailed
from gateway.sources.sql_text import with_percents
from gateway.yaml_text import ConfigError

type Row = Mapping[str, object]

# More than one row is too many, and this is how it is noticed.
ROWS = 2
# SQLite looks at the clock after so many of its steps: some milliseconds.
SQLITE_STEPS = 100_000
MYSQL_PORT = 3306
# psycopg's own default.
POLL_S = 0.1


class Connection(Protocol):
    """Both may be called by any thread, one at a time."""

    def rows(self, values: dict[str, str]) -> list[Row]:
        """Two at most. Raises SourceFailed."""
        ...

    def close(self) -> None: ...


# url, query, timeout_s -> what opens a connection. Raises ConfigError.
type Connector = Callable[[str, str, float], Callable[[], Connection]]


def sqlite(url: str, query: str, timeout_s: float) -> Callable[[], Connection]:
    path = Path(url.removeprefix(SQLITE))
    if not url.startswith(SQLITE) or not path.is_file():
        raise ConfigError(f"url: expected sqlite:///PATH of a file that exists, got {url}")
    return lambda: _Sqlite(path, query, timeout_s)


class _Sqlite:
    """Opened for each question: it takes microseconds, and the file may have been replaced."""

    def __init__(self, path: Path, query: str, timeout_s: float) -> None:
        self._path = path
        self._query = query
        self._timeout_s = timeout_s

    def close(self) -> None: ...

    def rows(self, values: dict[str, str]) -> list[Row]:
        deadline = time.monotonic() + self._timeout_s
        try:
            uri = f"file:{quote(str(self._path))}?mode=ro"
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=self._timeout_s)) as db:
                db.row_factory = sqlite3.Row
                db.set_progress_handler(lambda: time.monotonic() > deadline, SQLITE_STEPS)
                return [dict(row) for row in db.execute(self._query, values).fetchmany(ROWS)]
        except (sqlite3.Error, UnicodeError) as error:
            raise SourceFailed(f"can't be asked: {error}") from None


def postgres(url: str, query: str, timeout_s: float) -> Callable[[], Connection]:
    try:
        import psycopg
    except ImportError:
        raise _missing("postgresql", "psycopg") from None
    try:
        psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise ConfigError("url: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE") from None
    return lambda: _Postgres(url, query, timeout_s)


class _Postgres:
    def __init__(self, url: str, query: str, timeout_s: float) -> None:
        import psycopg
        from psycopg.types.datetime import DateLoader, TimestampLoader, TimestamptzLoader

        class Timed(psycopg.Connection[dict[str, Any]]):
            """libpq waits for an answer for ever."""

            def wait(self, gen: Any, interval: float = POLL_S, timeout: float | None = timeout_s) -> Any:
                return super().wait(gen, interval, timeout)

        self._error = psycopg.Error
        self._query = with_percents(query).encode()
        try:
            self._db = Timed.connect(
                url,
                autocommit=True,
                prepare_threshold=None,  # poolers give each query to another session
                connect_timeout=math.ceil(timeout_s),
                row_factory=psycopg.rows.dict_row,
            )
        except psycopg.Error as error:
            raise SourceFailed(f"can't be reached: {_one_line(error)}") from None
        loaders = {"date": DateLoader, "timestamp": TimestampLoader, "timestamptz": TimestamptzLoader}
        for name, loader in loaders.items():
            self._db.adapters.register_loader(name, _or_text(loader, psycopg.DataError))

    def close(self) -> None:
        self._db.close()

    def rows(self, values: dict[str, str]) -> list[Row]:
        try:
            return [*self._db.execute(self._query, values).fetchmany(ROWS)]
        except self._error as error:
            state = error.sqlstate or "no answer"
            raise SourceFailed(f"does not answer its query: {type(error).__name__} ({state})") from None


def _or_text(loader: Any, error: type[Exception]) -> Any:
    """What Python has no time for (infinity, the year 10000) stays text."""

    class OrText(loader):  # type: ignore[misc]
        def load(self, data: Any) -> object:
            try:
                return super().load(data)
            except error:
                return bytes(data).decode()

    return OrText


def mysql(url: str, query: str, timeout_s: float) -> Callable[[], Connection]:
    try:
        import pymysql  # noqa: F401
    except ImportError:
        raise _missing("mysql", "pymysql") from None
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        given: dict[str, Any] = {
            "host": parts.hostname or "localhost",
            "port": parts.port or MYSQL_PORT,
            "user": unquote(parts.username or ""),
            "password": unquote(parts.password or ""),
            "database": unquote(parts.path.removeprefix("/")),
        }
    except ValueError:
        raise ConfigError("url: expected mysql://USER:PASSWORD@HOST:PORT/DATABASE") from None
    unknown = [name for name in options if name not in ("ssl_ca", "unix_socket")]
    if unknown:
        raise ConfigError(f"url: expected ssl_ca or unix_socket behind the ?, got {unknown[0]!r}")
    return lambda: _Mysql({**given, **options}, query, timeout_s)


class _Mysql:
    def __init__(self, given: dict[str, Any], query: str, timeout_s: float) -> None:
        import pymysql

        self._error = pymysql.MySQLError
        self._timeout_s = timeout_s
        self._query = with_percents(query)
        try:
            self._db = pymysql.connect(
                **given,
                defer_connect=True,
                charset="utf8mb4",
                autocommit=True,
                connect_timeout=timeout_s,
                read_timeout=timeout_s,
                write_timeout=timeout_s,
                cursorclass=pymysql.cursors.DictCursor,
            )
            with cut_off(CUT * timeout_s, self._cut):
                self._db.connect()
        except (pymysql.MySQLError, OSError) as error:
            raise SourceFailed(f"can't be reached: {_one_line(error)}") from None

    def close(self) -> None:
        self._db._force_close()  # type: ignore[attr-defined]  # without a goodbye, which may hang

    def rows(self, values: dict[str, str]) -> list[Row]:
        try:
            with cut_off(CUT * self._timeout_s, self._cut), self._db.cursor() as cursor:
                cursor.execute(self._query, values)
                return [*cursor.fetchmany(ROWS)]
        except (self._error, OSError) as error:
            number = error.args[0] if error.args else "?"
            raise SourceFailed(f"does not answer its query: {type(error).__name__} ({number})") from None

    def _cut(self) -> None:
        connection = self._db._sock  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            if connection:
                connection.shutdown(socket.SHUT_RDWR)


def _missing(scheme: str, package: str) -> ConfigError:
    return ConfigError(
        f"type sql with {scheme}:// needs {package}, which is not installed: run scripts/extras",
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


CONNECTORS: dict[str, Connector] = {
    "sqlite": sqlite,
    "postgresql": postgres,
    "postgres": postgres,
    "mysql": mysql,
    "mariadb": mysql,
}
