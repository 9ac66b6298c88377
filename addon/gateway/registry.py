"""keys.db's servers and aliases: those that the admin API made, and ids for those that the file declares.

An id stays its name's own as long as keys.db does. Of a declared server nothing else is kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from gateway import audit
from gateway.audit import Change
from gateway.changes import told
from gateway.database import changing, reading
from gateway.keys_schema import open_keys
from gateway.made import Made, MadeAlias, MadeServer, Missing, Taken, check_alias, check_server, check_text
from gateway.made import merge as merge
from gateway.made import merged as merged
from gateway.records import utc_now
from gateway.secret import hint
from gateway.settings import Secret, Server
from gateway.yaml_text import ConfigError

# What `server_models` does not say of a server, under the names of the config file.
_SETTINGS = ("weight", "type", "slots", "verify_tls")


def record_reload(path: Path, reason: str, written_at: str | None, changed: Sequence[str]) -> None:
    """See `Registry.record_reload`. Raises OSError."""
    with reading(path), closing(Registry(path, create=False)) as registry:
        registry.record_reload(reason, written_at, changed)


def read_made(path: Path, *, create: bool = False) -> Made:
    """What keys.db holds, once. Raises OSError and ConfigError."""
    with reading(path), closing(Registry(path, create=create)) as registry:
        try:
            return registry.made()
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}: can't be understood: {error}") from None


class Registry:
    """keys.db's servers, their models, and aliases. Every change is one transaction, with its row of `audit`."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Raises OSError, also where there is no file and none is to be made."""
        self._db = open_keys(path, create=create)
        self._db.execute("pragma foreign_keys = on")

    def close(self) -> None:
        self._db.close()

    def made(self) -> Made:
        models: dict[int, list[str]] = {}
        for row in self._db.query("select * from server_models order by server_id, model"):
            models.setdefault(row["server_id"], []).append(row["model"])
        servers = self._db.query("select * from servers where not is_declared order by id")
        aliases = self._db.query("select id, name, model, created_at from aliases where not is_declared order by id")
        return Made(
            tuple(_made_server(row, models.get(row["id"], ())) for row in servers),
            tuple(msgspec.convert(row, MadeAlias) for row in aliases),
        )

    def server_ids(self, declared: Iterable[str] = ()) -> dict[str, int]:
        """Name -> id of all servers, made and declared, once used ones as well."""
        return self._ids("servers", declared)

    def alias_ids(self, declared: Iterable[str] = ()) -> dict[str, int]:
        return self._ids("aliases", declared)

    def _ids(self, table: str, declared: Iterable[str]) -> dict[str, int]:
        found = {row["name"]: int(row["id"]) for row in self._db.query(f"select id, name from {table}")}
        missing = [name for name in declared if name not in found]
        if not missing:
            return found
        with changing(self._db):
            for name in missing:
                self._db.execute(
                    f"insert into {table} (name, is_declared, created_at) values (?, 1, ?) on conflict do nothing",
                    [name, utc_now()],
                )
        return self._ids(table, ())

    def create_server(self, server: Server, *, active: bool = True, actor: str) -> int:
        """Returns its id. Raises Wrong and Taken."""
        check_server(server)
        row = {**_columns(server), "active": int(active), "created_at": utc_now()}
        with changing(self._db):
            server_id = self._insert("servers", "server", row)
            self._set_models(server_id, server.models or ())
            self._record(actor, Change("create", "server", server.name, new=_facts(server, active)))
        return server_id

    def change_server(self, server_id: int, change: Callable[[MadeServer], MadeServer], *, actor: str) -> None:
        """`change` gets it as it is now, and gives it as it shall be; the name stays. Raises Wrong and Missing."""
        with changing(self._db):
            old = next((each for each in self.made().servers if each.id == server_id), None)
            if old is None:
                raise Missing("Server not found")
            new = change(old)
            check_server(new.server)
            self._update("servers", "id", server_id, {**_columns(new.server), "active": int(new.active)})
            self._set_models(server_id, new.server.models or ())
            facts = {"old": _facts(old.server, old.active), "new": _facts(new.server, new.active)}
            self._record(actor, Change("change", "server", old.server.name, **facts))

    def delete_server(self, server_id: int, *, actor: str) -> None:
        """Raises Missing."""
        with changing(self._db):
            name = self._server(server_id)["name"]
            self._db.execute("delete from servers where id = ?", [server_id])
            self._record(actor, Change("delete", "server", name, old={"id": server_id}))

    def assign(self, server_id: int, model: str, *, move: bool = False, share: bool = False, actor: str) -> None:
        """Say that a server has a model. `move`: and no other made one has; `share`: others may have it as well.
        Raises Wrong, Missing, and Taken where another has it and neither is said.
        """
        check_text("model_name", model)
        with changing(self._db):
            row = self._server(server_id)
            others = self._holders(model, server_id)
            if others and not (move or share):
                raise Taken(taken(model, others[0]["name"], others[0]["id"]))
            for other in others if move else ():
                self._unassign(other["id"], other["settings"], model)
            self._db.execute("insert or ignore into server_models (server_id, model) values (?, ?)", [server_id, model])
            self._stop_asking(server_id, row["settings"])
            old = {"model": model, "server": [other["name"] for other in others]} if move and others else {}
            self._record(actor, Change("assign", "server", row["name"], old, {"model": model, "server": [row["name"]]}))

    def unassign(self, server_id: int, model: str, *, actor: str) -> None:
        """Raises Missing where there is no such server; that it does not have the model is fine."""
        with changing(self._db):
            row = self._server(server_id)
            if self._unassign(server_id, row["settings"], model):
                self._record(actor, Change("unassign", "server", row["name"], old={"model": model}))

    def create_alias(self, name: str, model: str, *, actor: str) -> None:
        """Raises Wrong and Taken."""
        check_alias(name, model)
        with changing(self._db):
            self._insert("aliases", "alias", {"name": name, "model": model, "created_at": utc_now()})
            self._record(actor, Change("create", "alias", name, new={"model": model}))

    def change_alias(self, name: str, model: str, *, actor: str) -> None:
        """Raises Wrong and Missing."""
        check_alias(name, model)
        with changing(self._db):
            old = self._alias(name)
            if old is None:
                raise Missing("Alias not found")
            self._update("aliases", "name", name, {"model": model})
            self._record(actor, Change("change", "alias", name, {"model": old}, {"model": model}))

    def delete_alias(self, name: str, *, actor: str) -> None:
        """That there is none is fine."""
        with changing(self._db):
            old = self._alias(name)
            if old is not None:
                self._db.execute("delete from aliases where name = ?", [name])
                self._record(actor, Change("delete", "alias", name, old={"model": old}))

    def record_reload(self, reason: str, written_at: str | None, changed: Sequence[str]) -> None:
        """Of the config file, what is different now, by names."""
        facts = {"written_at": written_at, "changed": told(changed)}
        with changing(self._db):
            audit.record_reload(self._db, datetime.now(UTC), reason, facts)

    def _record(self, actor: str, change: Change) -> None:
        audit.record(self._db, datetime.now(UTC), actor, change)

    def _insert(self, table: str, kind: str, row: Mapping[str, Any]) -> int:
        """A name that the file has let go of keeps its id. Raises Taken."""
        found = self._db.execute(f"select id, is_declared from {table} where name = ?", [row["name"]]).fetchone()
        if found and not found[1]:
            raise Taken(f"{kind.capitalize()} with this name already exists")
        columns = {**row, "is_declared": 0}
        names = ", ".join(columns)
        values = ", ".join(f":{name}" for name in columns)
        changes = ", ".join(f"{name} = excluded.{name}" for name in columns)
        return int(
            self._db.execute(
                f"insert into {table} ({names}) values ({values}) on conflict (name) do update set {changes} "
                "returning id",
                columns,
            ).fetchone()[0]
        )

    def _update(self, table: str, by: str, key: int | str, row: Mapping[str, Any]) -> None:
        changes = ", ".join(f"{name} = :{name}" for name in row)
        self._db.execute(f"update {table} set {changes} where {by} = :_key", {**row, "_key": key})

    def _server(self, server_id: int) -> dict[str, Any]:
        found = self._db.query("select id, name, settings from servers where id = ? and not is_declared", [server_id])
        row = next(found, None)
        if row is None:
            raise Missing("Server not found")
        return row

    def _alias(self, name: str) -> str | None:
        """The model of a made alias."""
        row = self._db.execute("select model from aliases where name = ? and not is_declared", [name]).fetchone()
        return None if row is None else str(row[0])

    def _holders(self, model: str, server_id: int) -> list[dict[str, Any]]:
        return list(
            self._db.query(
                "select id, name, settings from servers join server_models on server_id = id "
                "where model = ? and id <> ? and not is_declared order by id",
                [model, server_id],
            )
        )

    def _unassign(self, server_id: int, settings: str, model: str) -> bool:
        """Whether it had the model."""
        cursor = self._db.execute("delete from server_models where server_id = ? and model = ?", [server_id, model])
        if cursor.rowcount:
            self._stop_asking(server_id, settings)
        return bool(cursor.rowcount)

    def _stop_asking(self, server_id: int, settings: str) -> None:
        """From the first assignment on, a server has the models that were assigned, if only none."""
        changed = {**msgspec.json.decode(settings, type=dict[str, Any]), "asks_models": False}
        self._db.execute("update servers set settings = ? where id = ?", [_json(changed), server_id])

    def _set_models(self, server_id: int, models: Iterable[str]) -> None:
        self._db.execute("delete from server_models where server_id = ?", [server_id])
        for model in models:
            self._db.execute("insert or ignore into server_models (server_id, model) values (?, ?)", [server_id, model])


def taken(model: str, server: str, server_id: int) -> str:
    """What is said of a model that another server has; smol-llm-proxy's words."""
    return f"Model {model!r} already assigned to server {server!r} (id={server_id}). Use ?reassign=true to move."


def _columns(server: Server) -> dict[str, Any]:
    settings = {name: getattr(server, name) for name in _SETTINGS} | {"asks_models": server.models is None}
    return {"name": server.name, "url": server.url, "api_key": str(server.api_key), "settings": _json(settings)}


def _made_server(row: dict[str, Any], models: Iterable[str]) -> MadeServer:
    settings = msgspec.json.decode(row["settings"], type=dict[str, Any])
    asks = settings.pop("asks_models", True)
    fields = {"name": row["name"], "url": row["url"], "models": None if asks else tuple(models), **settings}
    server = msgspec.structs.replace(msgspec.convert(fields, Server), api_key=Secret(row["api_key"]))
    return MadeServer(row["id"], server, bool(row["active"]), row["created_at"])


def _facts(server: Server, active: bool) -> dict[str, Any]:
    """What the audit says of a server: of its key only the hint."""
    facts = {"url": server.url, "api_key": hint(server.api_key), "models": server.models, "active": active}
    return facts | {name: getattr(server, name) for name in _SETTINGS}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
