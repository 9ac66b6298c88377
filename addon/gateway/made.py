"""Servers and aliases that the admin API made: records, what they must be, and how they join those of the config file.

What the file declares wins over a made one of the same name, which waits until the file lets go of it. What is made can
stop being right when the file changes (an alias whose model is gone): it is left out, and told, never a reason not to
start.
"""

import msgspec

from gateway.config_checks import check, server_problems
from gateway.patterns import Pattern
from gateway.settings import Config, Server

# Of servers, models and aliases: more than any has, and it stands in headers and rows.
MAX_NAME = 500


class Wrong(Exception):
    """What shall be made can't be used: `field`, and what is wrong with it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class Taken(Exception):
    """The name is another's, or the model is; `str` says whose."""


class Missing(Exception):
    """There is nothing of that id or name, or it is declared in the file."""


class MadeServer(msgspec.Struct, frozen=True):
    """`server.models` None: asked from the server, as nobody has assigned any. `active` False: not in use."""

    id: int
    server: Server
    active: bool
    created_at: str


class MadeAlias(msgspec.Struct, frozen=True):
    id: int
    name: str
    model: str
    created_at: str


class Made(msgspec.Struct, frozen=True):
    servers: tuple[MadeServer, ...] = ()
    aliases: tuple[MadeAlias, ...] = ()


class Merge(msgspec.Struct, frozen=True):
    """The config in use, and why some of what was made is not in it: not told of names that the file declares."""

    config: Config
    problems: tuple[str, ...] = ()


def merge(config: Config, made: Made) -> Merge:
    """`config`: what the file says, checked. Raises ConfigError, should what both make together be wrong."""
    servers = {server.name: server for server in config.servers}
    problems = []
    for each in made.servers:
        if problem := _first_problem(each.server):
            problems.append(f"servers.{each.server.name}.{problem}")
        elif each.active and each.server.name not in servers:
            servers[each.server.name] = each.server
    models = {model for server in servers.values() for model in server.models or ()}
    all_known = all(server.models is not None for server in servers.values())
    aliases = dict(config.aliases)
    for alias in made.aliases:
        if all_known and alias.model not in models:
            problems.append(f"aliases.{alias.name}: {alias.model!r} is no server's model")
        else:
            aliases.setdefault(alias.name, alias.model)
    both = msgspec.structs.replace(config, servers=tuple(servers.values()), aliases=aliases)
    if both != config:
        check(both)
    return Merge(both, tuple(problems))


def merged(config: Config, made: Made) -> Config:
    """The config in use: what the file says and what the admin API made. Raises ConfigError."""
    return merge(config, made).config


def check_server(server: Server) -> None:
    check_text("name", server.name)
    if not server.api_key.isascii() or not (server.api_key.isprintable() or not server.api_key):
        raise Wrong("api_key", "expected printable ASCII characters")
    for index, model in enumerate(server.models or ()):
        check_text(f"models[{index}]", model)
    if problem := _first_problem(server):
        field, _, said = problem.partition(": ")
        raise Wrong(field, said)


def check_alias(name: str, model: str) -> None:
    check_text("alias_name", name)
    check_text("real_model_name", model)
    try:
        Pattern(name)
    except ValueError as error:
        raise Wrong("alias_name", str(error)) from None


def check_text(field: str, text: str) -> None:
    if not text.strip() or len(text) > MAX_NAME or not text.isprintable():
        raise Wrong(field, f"expected 1 to {MAX_NAME} printable characters, got {text[:50]!r}")


def _first_problem(server: Server) -> str | None:
    return next((problem for _, problem in server_problems((server,))), None)
