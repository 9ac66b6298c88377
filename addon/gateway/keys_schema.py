"""keys.db as numbered migrations: keys, teams, the servers and aliases that the admin API made, who changed what.

The file is created with mode 0600 and is never published.
"""

import contextlib
import os
import stat
from pathlib import Path

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from gateway.database import open_database, open_existing

# A change takes milliseconds; somebody who makes many at once waits for each.
BUSY_TIMEOUT_S = 5.0

migrations = Migrations("llmproxy-keys")


@migrations()
def m001_keys(db: Database) -> None:
    # "autoincrement" keeps the ids of deleted keys from being given again: rows of `requests` go on naming them.
    db.execute(
        "create table keys ("
        "id integer primary key autoincrement, "
        "name text not null unique, "
        "hash text not null unique, "
        "hint text not null, "
        "created_at text not null, "
        "disabled integer not null default 0, "
        "expires_at text, "
        "models text not null default '[]')"
    )


@migrations()
def m002_fair_queue(db: Database) -> None:
    db.execute("alter table keys add column weight real not null default 1")
    db.execute("alter table keys add column priority text not null default 'normal'")


@migrations()
def m003_who_may_use_how_much(db: Database) -> None:
    """`limits` is a JSON object of `limits.Limits`; `old_hash` is let in until `old_until`, after a rotation."""
    for column in (
        "team text",
        "limits text not null default '{}'",
        "endpoints text not null default '[]'",
        "networks text not null default '[]'",
        "not_before text",
        "old_hash text",
        "old_until text",
    ):
        db.execute(f"alter table keys add column {column}")
    db.execute("create unique index keys_old_hash on keys (old_hash) where old_hash is not null")
    db.execute(
        "create table teams ("
        "id integer primary key autoincrement, "
        "name text not null unique, "
        "limits text not null default '{}', "
        "created_at text not null)"
    )
    db.execute(
        "create table audit ("
        "id integer primary key autoincrement, "
        "at text not null, "
        "actor text not null, "
        "action text not null, "
        "kind text not null, "
        "name text not null, "
        "detail text not null default '{}')"
    )


@migrations()
def m004_made_by_the_admin_api(db: Database) -> None:
    """`servers` also gives an id to each server of the config file, with nothing else known of it: `is_declared`."""
    db.execute(
        "create table servers ("
        "id integer primary key autoincrement, "
        "name text not null unique, "
        "is_declared integer not null default 0, "
        "url text not null default '', "
        "api_key text not null default '', "
        "active integer not null default 1, "
        "settings text not null default '{}', "
        "created_at text not null)"
    )
    db.execute(
        "create table server_models ("
        "server_id integer not null references servers (id) on delete cascade, "
        "model text not null, "
        "primary key (server_id, model)) without rowid"
    )
    db.execute(
        "create table aliases ("
        "id integer primary key autoincrement, "
        "name text not null unique, "
        "is_declared integer not null default 0, "
        "model text not null default '', "
        "created_at text not null)"
    )


def open_keys(path: Path, *, create: bool = True) -> Database:
    """keys.db with its schema up to date, for any one thread at a time. Blocks. Raises OSError.

    Not `create`: it must be there. One that is gone is never replaced by an empty one while the gateway runs.
    """
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    _check_file(path)
    path.chmod(0o600)
    return open_database(path, migrations, busy_timeout_s=BUSY_TIMEOUT_S)


def open_to_read(path: Path) -> Database:
    """keys.db as it is, for any one thread at a time. Never waits for others: what is locked is an error now.

    Raises OSError and sqlite3.Error.
    """
    _check_file(path)
    db = open_existing(path)
    try:
        applied = {name for (name,) in db.execute("select name from _sqlite_migrations")}
        if not applied.issuperset(_all_names()):
            raise OSError(f"{path} is of an older version of the gateway: run scripts/keys list, or restart")
    except BaseException:
        db.close()
        raise
    return db


def _all_names() -> set[str]:
    with contextlib.closing(Database(memory=True)) as empty:
        return {migration.name for migration in migrations.pending(empty)}


def _check_file(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is no file")
