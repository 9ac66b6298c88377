"""The kinds of key sources: what makes one of its settings. A new kind is a module and a line here."""

import re
from collections.abc import Callable, Sequence

from gateway.settings import Auth
from gateway.sources import settings
from gateway.sources.chain import Asking, Chain, Link
from gateway.sources.listed import FileKeys, StaticKeys, static_keys
from gateway.sources.local import Keys, LocalKeys
from gateway.sources.mongodb import MongoKeys
from gateway.sources.redis_keys import RedisKeys
from gateway.sources.remote import Remote
from gateway.sources.scripts import LuaScript, PythonScript
from gateway.sources.source import Source
from gateway.sources.sql import SqlKeys
from gateway.sources.webhook import Webhook
from gateway.yaml_text import ConfigError

# Asked in threads. Each raises ConfigError when it can't be set up: a driver is missing, a file, or an URL is wrong.
REMOTE: dict[type[settings.Common], Callable[..., Source]] = {
    settings.Sql: SqlKeys,
    settings.Redis: RedisKeys,
    settings.MongoDB: MongoKeys,
    settings.Webhook: Webhook,
    settings.Python: PythonScript,
    settings.Lua: LuaScript,
}
# These are told the client's address, and may decide by it.
BY_ADDRESS = (settings.Webhook, settings.Python, settings.Lua)


def build(auth: Auth, keys: Keys, before: Chain) -> Chain:
    """`keys`: those of keys.db. Sources that `before` has with the same settings are taken over; those that name files
    are set up anew, as at the start, and go on with what they know. Raises ConfigError.
    """
    links: list[Link] = []
    for index, (name, source) in enumerate(zip(names(auth.sources), auth.sources, strict=True)):
        old = next((link for link in before.links if (link.name, link.settings) == (name, source)), None)
        path = f"auth.sources[{index}]"
        if old and isinstance(old.source, Remote) and _names_files(source):
            links.append(Link(name, source, old.source.renewed(_remote(source, path))))
        else:
            links.append(old or Link(name, source, _source(source, name, keys, path)))
    return Chain(tuple(links), auth.mode)


def names(sources: Sequence[settings.Source]) -> list[str]:
    """What they are called in logs and counters: as their settings say, or by type; none twice."""
    taken: list[str] = []
    for source in sources:
        name = source.name or source.__struct_config__.tag
        free = (f"{name}-{number}" if number > 1 else str(name) for number in range(1, len(taken) + 2))
        taken.append(next(each for each in free if each not in taken))
    return taken


def _source(source: settings.Source, name: str, keys: Keys, path: str) -> Asking:
    match source:
        case settings.Local():
            return LocalKeys(keys)
        case settings.Static():
            return StaticKeys(static_keys(source.keys, f"{path}.keys"))
        case settings.File():
            return _placed(path, lambda: FileKeys(source.path, name))
    return Remote(_remote(source, path), source, by_address=isinstance(source, BY_ADDRESS))


def _remote(source: settings.Source, path: str) -> Source:
    return _placed(path, lambda: REMOTE[type(source)](source))


def _names_files(source: settings.Source) -> bool:
    """Files that are read once, when the source is set up: certificates, and a database, which must be there."""
    is_sqlite = isinstance(source, settings.Sql) and source.url.startswith(settings.SQLITE)
    has_ca = isinstance(source, settings.Webhook) and source.ca_file is not None
    return is_sqlite or has_ca or isinstance(source, settings.MongoDB)


def _placed[T](path: str, make: Callable[[], T]) -> T:
    """What is wrong is told with its place in the config."""
    try:
        return make()
    except ConfigError as error:
        is_of_a_field = re.match(r"[a-z_]+: ", str(error))
        raise ConfigError(f"{path}{'.' if is_of_a_field else ': '}{error}") from None
