"""config.yaml -> frozen records. Everything is checked here, once; what leaves this module is right.

A wrong file raises `ConfigError` with the path in the file, what was expected and a hint. Secrets come by
`${NAME}` and hide in `repr`.
"""

import difflib
import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from gateway.patterns import Pattern
from gateway.yaml_text import ConfigError as ConfigError
from gateway.yaml_text import expand, read


class Secret(str):
    """A string that doesn't show itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Secret('***')" if self else "Secret('')"


class Address(str):
    """ "HOST:PORT" or "[IPV6]:PORT", checked. Raises ValueError."""

    __slots__ = ()

    def __new__(cls, text: str) -> "Address":
        host, colon, port = text.strip().rpartition(":")
        if not colon or not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise ValueError(f"Expected HOST:PORT, got {text!r}")
        return super().__new__(cls, text.strip())

    @property
    def host(self) -> str:
        return self.rpartition(":")[0].removeprefix("[").removesuffix("]")

    @property
    def port(self) -> int:
        return int(self.rpartition(":")[2])


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An upstream server. `models` None: asked from the server itself. `type` None: told by the server's answers.

    `slots`: how many requests it works on at once; None: asked from the server; 0: without a bound.
    """

    name: str
    url: str
    api_key: Secret = Secret("")
    models: tuple[str, ...] | None = None
    weight: float = 1
    type: str | None = None
    slots: int | None = None
    verify_tls: bool = True
    ca_file: Path | None = None


class Prefix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The strategy `prefix`. `stickiness`: seconds of waiting that a saved second of prompt reading is worth."""

    stickiness: float = 1
    index_size: int = 400_000


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which server gets a request, and how often it is tried. `models`: model -> a strategy of its own."""

    strategy: str = "prefix"
    models: dict[str, str] = {}
    prefix: Prefix = Prefix()
    max_attempts: int = 5
    backoff_s: float = 0.05
    max_backoff_s: float = 2


class Queue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests that wait for a server's slot. `max_length`: of one model, in one worker."""

    max_length: int = 500
    max_wait_s: float = 300


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Probes of each server, and how long one is left alone whose requests fail."""

    path: str = "/health"
    interval_s: float = 2
    timeout_s: float = 3
    up_after: int = 1
    down_after: int = 3
    eject_after: int = 3
    eject_s: float = 2
    max_eject_s: float = 60


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. Times in seconds, sizes in megabytes of 10^6 bytes."""

    servers: tuple[Server, ...]
    listen: Address = Address("127.0.0.1:8000")
    dashboard: Address = Address("127.0.0.1:8001")
    data: Path = Path("data")
    admin_key: Secret = Secret("")
    aliases: dict[str, str] = {}
    default_model: str | None = None
    max_body_mb: float = 100
    first_byte_timeout_s: float = 600
    loading_wait_s: float = 60
    drain_s: float = 30
    routing: Routing = Routing()
    queue: Queue = Queue()
    health: Health = Health()
    fallbacks: dict[str, tuple[str, ...]] = {}


SERVER_TYPES = ("llama.cpp", "openai")
STRATEGIES = ("prefix", "least-busy", "round-robin", "latency")
_SECTIONS = {"servers": Server, "routing": Routing, "routing.prefix": Prefix, "queue": Queue, "health": Health}
_EXPECTED = {
    "listen": "as in 127.0.0.1:8000",
    "dashboard": "as in 127.0.0.1:8001",
    "servers": "a list of servers, each with at least a name and a url",
    "url": "http://HOST:PORT or https://HOST:PORT",
}


def load(path: str | Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read and check a config file. Relative paths in it count from its folder. Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8: {error.reason}") from None
    try:
        return parse(text, path.absolute().parent, environ)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(text: str, folder: Path, environ: Mapping[str, str]) -> Config:
    """The text of a config file -> Config. `folder`: what relative paths count from. Raises ConfigError."""
    raw = read(text)
    if not isinstance(raw, dict):
        raise _wrong("", "a mapping that begins with 'servers:'", raw)
    try:
        config = msgspec.convert(expand(raw, environ), Config, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise _explain(error, raw) from None
    _check(config)
    servers = tuple(
        msgspec.structs.replace(server, ca_file=folder / server.ca_file) if server.ca_file else server
        for server in config.servers
    )
    return msgspec.structs.replace(config, data=folder / config.data, servers=servers)


def _decode(kind: type, value: Any) -> Any:
    """Strings that are more than strings: Address, Path, Secret."""
    if not isinstance(value, str):
        raise ValueError(f"Expected text, got {type(value).__name__}" + ("" if kind is Secret else f" {value!r}"))
    return kind(value)


def _wrong(path: str, expected: str, got: Any, hint: str = "") -> ConfigError:
    shown = "nothing" if got is None else f"{type(got).__name__} {got!r}"
    where = f"{path}: " if path else ""
    return ConfigError(f"{where}expected {expected}, got {shown}" + (f". {hint}" if hint else ""))


_AT = re.compile(r"(.*?)(?: - at `(?:key in )?\$\.?(.*?)`)?$", re.DOTALL)


def _explain(error: msgspec.ValidationError, raw: dict[str, Any]) -> ConfigError:
    """msgspec's message -> path, expected, hint."""
    match = _AT.match(str(error))
    message, path = (match[1], match[2] or "") if match else (str(error), "")
    unknown = re.search(r"unknown field `(.*)`", message)
    if unknown:
        fields = _SECTIONS.get(path.partition("[")[0], Config).__struct_fields__
        close = difflib.get_close_matches(unknown[1], fields, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(fields)}"
        return ConfigError(f"{path + '.' if path else ''}{unknown[1]}: unknown key; {hint}")
    missing = re.search(r"missing required field `(.*)`", message)
    if missing:
        name = missing[1]
        expected = f"; expected {_EXPECTED[name]}" if name in _EXPECTED else ""
        return ConfigError(f"{path + '.' if path else ''}{name}: missing{expected}")
    field = re.sub(r"\[.*?\]$", "", path).rpartition(".")[2]
    expected = f" (expected {_EXPECTED[field]})" if field in _EXPECTED else ""
    return ConfigError(f"{path}: {message[:1].lower()}{message[1:]}{expected}")


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


def _check(config: Config) -> None:
    """What types can't say."""
    if not config.servers:
        raise ConfigError(f"servers: expected {_EXPECTED['servers']}, got none")
    for index, problem in _server_problems(config.servers):
        raise ConfigError(f"servers[{index}].{problem}")
    for name in _ABOVE_0:
        if not 0 < _value(config, name) < float("inf"):
            raise _wrong(name, "a number above 0", _value(config, name))
    for name in _FROM_0:
        if not 0 <= _value(config, name) < float("inf"):
            raise _wrong(name, "a number, 0 or more", _value(config, name))
    for name in _FROM_1:
        if _value(config, name) < 1:
            raise _wrong(name, "a whole number, 1 or more", _value(config, name))
    if not config.health.path.startswith("/"):
        raise _wrong("health.path", "a path that begins with /", config.health.path)
    if config.listen == config.dashboard and config.listen.port:
        raise ConfigError(f"dashboard: {config.dashboard} is the proxy's own address (listen); choose another port")
    _check_names(config)


def _server_problems(servers: tuple[Server, ...]) -> Iterator[tuple[int, str]]:
    names: set[str] = set()
    for index, server in enumerate(servers):
        url = _split(server.url)
        if not server.name.strip():
            yield index, "name: expected a name that is not empty"
        if server.name in names:
            yield index, f"name: {server.name!r} is taken by another server; names must differ"
        if url is None:
            yield index, f"url: expected {_EXPECTED['url']}, got {server.url!r}"
        elif url.path.rstrip("/").endswith("/v1") or url.query or url.fragment or url.username:
            base = f"{url.scheme}://{url.netloc.rpartition('@')[2]}"
            yield (
                index,
                f"url: expected the server's root, got {server.url!r}. Clients' paths are added to it: write {base}",
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
        try:
            Pattern(alias)
        except ValueError as error:
            raise ConfigError(f"aliases.{alias}: {error}") from None
        if all_known and model not in known:
            raise ConfigError(f"aliases.{alias}: {model!r} is no server's model; {_near(model, known)}")
    for model, strategy in {"": config.routing.strategy, **config.routing.models}.items():
        path = f"routing.models.{model}" if model else "routing.strategy"
        if strategy not in STRATEGIES:
            raise _wrong(path, f"one of {', '.join(STRATEGIES)}", strategy)
        if model and all_known and model not in known:
            raise ConfigError(f"{path}: {model!r} is no server's model; {_near(model, known)}")
    for model, others in config.fallbacks.items():
        for name in (model, *others):
            if all_known and name not in known:
                raise ConfigError(f"fallbacks.{model}: {name!r} is no server's model; {_near(name, known)}")
        if model in others or len(set(others)) < len(others):
            raise _wrong(f"fallbacks.{model}", "other models, each once", list(others))
    default = config.default_model
    if default is not None and all_known and default not in known and default not in config.aliases:
        raise ConfigError(f"default_model: {default!r} is no server's model and no alias; {_near(default, known)}")


def _near(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"models: {', '.join(sorted(known)) or 'none'}"
