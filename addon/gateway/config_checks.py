"""What the types of `settings` can't say: ranges, names that must lead somewhere, what excludes what."""

import difflib
import functools
import ipaddress
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

from gateway import limits
from gateway.patterns import Pattern
from gateway.settings import MODES, RESERVES, SERVER_TYPES, STRATEGIES, Config, Server
from gateway.sources import checks as source_checks
from gateway.yaml_text import ConfigError

EXPECTED = {
    "listen": "as in 127.0.0.1:8000",
    "dashboard": "as in 127.0.0.1:8001",
    "servers": "a list of servers, each with at least a name and a url",
    "url": "http://HOST:PORT or https://HOST:PORT",
}


def wrong(path: str, expected: str, got: Any, hint: str = "") -> ConfigError:
    """What is said of a value that is not what it has to be. Without a path it is the whole file: only its type."""
    shown = "nothing" if got is None else f"{type(got).__name__} {got!r}" if path else type(got).__name__
    where = f"{path}: " if path else ""
    return ConfigError(f"{where}expected {expected}, got {shown}" + (f". {hint}" if hint else ""))


_ABOVE_0 = (
    "max_body_mb",
    "first_byte_timeout_s",
    "health.interval_s",
    "health.timeout_s",
    "health.eject_s",
    "health.max_eject_s",
)
_FROM_0 = (
    "drain_s",
    "loading_wait_s",
    "queue.max_length",
    "queue.max_wait_s",
    "routing.backoff_s",
    "routing.max_backoff_s",
    "routing.prefix.stickiness",
)
_FROM_1 = (
    "health.up_after",
    "health.down_after",
    "health.eject_after",
    "routing.max_attempts",
    "routing.prefix.index_size",
)


def _value(config: Config, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), config)


def check(config: Config) -> None:
    """What types can't say."""
    if not config.servers and not config.admin_key:  # with one, the admin API can make some
        raise ConfigError(f"servers: expected {EXPECTED['servers']}, got none")
    for index, problem in server_problems(config.servers):
        raise ConfigError(f"servers[{index}].{problem}")
    for name in _ABOVE_0:
        if not 0 < _value(config, name) < float("inf"):
            raise wrong(name, "a number above 0", _value(config, name))
    for name in _FROM_0:
        if not 0 <= _value(config, name) < float("inf"):
            raise wrong(name, "a number, 0 or more", _value(config, name))
    for name in _FROM_1:
        if _value(config, name) < 1:
            raise wrong(name, "a whole number, 1 or more", _value(config, name))
    if not config.health.path.startswith("/"):
        raise wrong("health.path", "a path that begins with /", config.health.path)
    if config.listen == config.dashboard and config.listen.port:
        raise ConfigError(f"dashboard: {config.dashboard} is the proxy's own address (listen); choose another port")
    _check_names(config)
    _check_use(config)


def _check_use(config: Config) -> None:
    """Who may come in, and what they may use."""
    if config.auth.mode not in MODES:
        raise wrong("auth.mode", f"one of {', '.join(MODES)}", config.auth.mode)
    source_checks.check(config.auth.sources, all_decide=config.auth.mode == "all")
    for index, network in enumerate(config.trusted_proxies):
        try:
            ipaddress.ip_network(network)
        except ValueError:
            raise wrong(f"trusted_proxies[{index}]", "a network as in 10.0.0.0/8, or an address", network) from None
    section = config.limits
    if section.reserve not in RESERVES:
        raise wrong("limits.reserve", f"one of {', '.join(RESERVES)}", section.reserve)
    if section.default_max_tokens < 1:
        raise wrong("limits.default_max_tokens", "a whole number, 1 or more", section.default_max_tokens)
    if section.storage != "local" and urlsplit(section.storage).scheme not in ("redis", "rediss", "unix"):
        raise ConfigError("limits.storage: expected local, or the URL of a Redis server as in redis://HOST:6379/0")
    named = {"limits.all": section.all, "limits.key": section.key}
    named |= {f"limits.models.{name}": each for name, each in section.models.items()}
    named |= {f"teams.{name}": each for name, each in config.teams.items()}
    for path, each in named.items():
        try:
            limits.check(each)
        except limits.Problem as problem:
            raise ConfigError(f"{path}.{problem}") from None
    for path, names in (("limits.models", section.models), ("prices.models", config.prices.models)):
        for name in names:
            _check_pattern(f"{path}.{name}", name)
            _check_served(f"{path}.{name}", name, config)
    for model, price in config.prices.models.items():
        for name in price.__struct_fields__:
            value = getattr(price, name)
            if value is not None and not 0 <= value < float("inf"):
                raise wrong(f"prices.models.{model}.{name}", "a number, 0 or more", value)


def _check_served(path: str, name: str, config: Config) -> None:
    """Limits and prices are of models as their servers name them."""
    known = {model for server in config.servers for model in server.models or ()}
    if not Pattern(name).is_exact or name in known:
        return
    if name in config.aliases:
        raise ConfigError(f"{path}: {name!r} is an alias; write the model that it stands for: {config.aliases[name]!r}")
    if config.servers and all(server.models is not None for server in config.servers):
        raise ConfigError(f"{path}: {name!r} is no server's model; {_near(name, known)}")


def _check_pattern(path: str, pattern: str) -> None:
    try:
        Pattern(pattern)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def server_problems(servers: tuple[Server, ...]) -> Iterator[tuple[int, str]]:
    names: set[str] = set()
    for index, server in enumerate(servers):
        url = _split(server.url)
        if not server.name.strip():
            yield index, "name: expected a name that is not empty"
        if server.name in names:
            yield index, f"name: {server.name!r} is taken by another server; names must differ"
        if url is None:
            yield index, f"url: expected {EXPECTED['url']}, got {_plain(server.url)!r}"
        elif url.path.rstrip("/").endswith("/v1") or url.query or url.fragment or url.username:
            base = EXPECTED["url"] if "@" in server.url else f"{url.scheme}://{url.netloc}"
            yield (
                index,
                f"url: expected the server's root, got {_plain(server.url)!r}. "
                f"Clients' paths are added to it: write {base}",
            )
        if not 0 < server.weight < float("inf"):
            yield index, f"weight: expected a number above 0, got {server.weight!r}"
        if server.type is not None and server.type not in SERVER_TYPES:
            yield index, f"type: expected one of {', '.join(SERVER_TYPES)}, got {server.type!r}"
        if server.models is not None and not all(model.strip() for model in server.models):
            yield index, "models: expected names that are not empty"
        if server.slots is not None and server.slots < 0:
            yield index, f"slots: expected a whole number, 0 (no bound) or more, got {server.slots}"
        if server.ca_file is not None and not server.verify_tls:
            yield index, "ca_file: is of no use with verify_tls: false; leave one of them out"
        if "\n" in server.api_key or "\r" in server.api_key:
            yield index, "api_key: expected one line"
        names.add(server.name)


def _plain(url: str) -> str:
    """A url as it may be shown: without a password and a query, which may be a token."""
    start, mark, rest = url.partition("://")
    scheme, rest = (start + mark, rest) if mark else ("", start)
    user, at, place = rest.rpartition("@")
    if re.search(r"[?#]", user):  # which of them is the password?
        return f"{scheme}***"
    return scheme + ("***@" if at else "") + re.sub(r"[?#].*", "?***", place, flags=re.DOTALL)


def _split(url: str) -> SplitResult | None:
    """A server's url in parts; None when it is none."""
    try:
        parts = urlsplit(url)
        port_is_right = parts.port is None or parts.port > 0
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname and port_is_right else None


def _check_names(config: Config) -> None:
    """Aliases and the default model must lead to a model, where all models are known from the file."""
    known = {model for server in config.servers for model in server.models or ()}
    all_known = all(server.models is not None for server in config.servers)
    for alias, model in config.aliases.items():
        _check_pattern(f"aliases.{alias}", alias)
        if all_known and model not in known:
            raise ConfigError(f"aliases.{alias}: {model!r} is no server's model; {_near(model, known)}")
    for model, strategy in {"": config.routing.strategy, **config.routing.models}.items():
        path = f"routing.models.{model}" if model else "routing.strategy"
        if strategy not in STRATEGIES:
            raise wrong(path, f"one of {', '.join(STRATEGIES)}", strategy)
        if model and all_known and model not in known:
            raise ConfigError(f"{path}: {model!r} is no server's model; {_near(model, known)}")
    for model, others in config.fallbacks.items():
        for name in (model, *others):
            if all_known and name not in known:
                raise ConfigError(f"fallbacks.{model}: {name!r} is no server's model; {_near(name, known)}")
        if model in others or len(set(others)) < len(others):
            raise wrong(f"fallbacks.{model}", "other models, each once", list(others))
    default = config.default_model
    if default is not None and all_known and default not in known and default not in config.aliases:
        raise ConfigError(f"default_model: {default!r} is no server's model and no alias; {_near(default, known)}")


def _near(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"models: {', '.join(sorted(known)) or 'none'}"
