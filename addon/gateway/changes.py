"""What differs between two configs, in words that name no value; and what of it can't change while a process runs."""

from collections.abc import Iterator, Sequence

import msgspec

from gateway.settings import Config, Server

# Opened, or told to others, when the process starts.
_RESTART = ("listen", "dashboard", "data", "drain_s", "limits.storage")

# Of what is different, in the log and in the audit.
MAX_TOLD = 100


class ReloadReport(msgspec.Struct, frozen=True):
    """What became of reading the config again. Not `ok`: the file was not taken over, and `problem` says why.

    `changed`: what is different now. `needs_restart`: what the file says otherwise, and stays as it was.
    """

    at: str
    ok: bool
    problem: str | None = None
    changed: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


def needs_restart(running: Config, wanted: Config) -> tuple[str, ...]:
    return tuple(name for name in _RESTART if _value(running, name) != _value(wanted, name))


def keeping(running: Config, wanted: Config) -> Config:
    """`wanted`, but for what can't change while the process runs."""
    kept = {name: _value(running, name) for name in _RESTART if "." not in name}
    limits = msgspec.structs.replace(wanted.limits, storage=running.limits.storage)
    return msgspec.structs.replace(wanted, **kept, limits=limits)


def changes(before: Config, after: Config) -> tuple[str, ...]:
    """Names of what differs, servers and aliases one by one."""
    names = [*_of_servers(before, after), *_of_aliases(before, after)]
    for name in Config.__struct_fields__:
        if name not in ("servers", "aliases"):
            names += _different(name, getattr(before, name), getattr(after, name))
    return tuple(names)


def told(changed: Sequence[str]) -> list[str]:
    """As many as somebody reads."""
    more = len(changed) - MAX_TOLD
    return [*changed[:MAX_TOLD], *([f"and {more} more"] if more > 0 else [])]


def _of_servers(before: Config, after: Config) -> Iterator[str]:
    old = {server.name: server for server in before.servers}
    new = {server.name: server for server in after.servers}
    yield from (f"server {name} is gone" for name in old if name not in new)
    yield from (f"server {name} is new" for name in new if name not in old)
    for name in new:
        if fields := _fields(old[name], new[name]) if name in old else ():
            yield f"server {name}: {', '.join(fields)}"
    if old.keys() == new.keys() and [*old] != [*new]:
        yield "the order of servers"


def _fields(before: Server, after: Server) -> list[str]:
    return [name for name in Server.__struct_fields__ if getattr(before, name) != getattr(after, name)]


def _of_aliases(before: Config, after: Config) -> Iterator[str]:
    for name in {**before.aliases, **after.aliases}:
        if before.aliases.get(name) != after.aliases.get(name):
            yield f"alias {name}"
    if before.aliases == after.aliases and [*before.aliases] != [*after.aliases]:
        yield "the order of aliases"


def _different(name: str, before: object, after: object) -> Iterator[str]:
    """Of a section, which of its keys; of a list of what has names, which of them."""
    if before == after:
        return
    old, new = _parts(before), _parts(after)
    if old is None or new is None or type(before) is not type(after):
        yield name
        return
    inner = [each for part in {**old, **new} for each in _different(f"{name}{part}", old.get(part), new.get(part))]
    yield from inner or [f"the order of {name}"]


def _parts(value: object) -> dict[str, object] | None:
    """What stands in a value, by what it adds to the value's own name. None: nothing that has names."""
    if isinstance(value, msgspec.Struct):
        return {f".{field}": getattr(value, field) for field in value.__struct_fields__}
    if isinstance(value, dict):
        return {f".{key}": item for key, item in value.items()}
    if isinstance(value, tuple) and all(isinstance(item, msgspec.Struct) for item in value):
        names = [getattr(item, "name", None) for item in value]
        has_names = all(names) and len(set(names)) == len(names)
        return {f".{names[index]}" if has_names else f"[{index}]": item for index, item in enumerate(value)}
    return None


def _value(config: Config, name: str) -> object:
    value: object = config
    for step in name.split("."):
        value = getattr(value, step)
    return value
