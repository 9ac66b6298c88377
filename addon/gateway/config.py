"""config.yaml -> frozen records. Everything is checked here, once; what leaves this module is right.

A wrong file raises `ConfigError` with the path in the file, what was expected and a hint. Secrets come by
`${NAME}` and hide in `repr`.
"""

import contextlib
import difflib
import json
import os
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec
import yaml

from gateway.patterns import Pattern


class ConfigError(Exception):
    """What is wrong with a config file, where, and what to do about it: `str` is meant for a person."""


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
    """An upstream server. `models` None: asked from the server itself. `type` None: told by the server's answers."""

    name: str
    url: str
    api_key: Secret = Secret("")
    models: tuple[str, ...] | None = None
    weight: float = 1
    type: str | None = None


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
    drain_s: float = 30


SERVER_TYPES = ("llama.cpp", "openai")
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
    raw = _read(text)
    if not isinstance(raw, dict):
        raise _wrong("", "a mapping that begins with 'servers:'", raw)
    try:
        config = msgspec.convert(_expand(raw, "", environ), Config, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise _explain(error, raw) from None
    _check(config)
    return msgspec.structs.replace(config, data=folder / config.data)


def _read(text: str) -> Any:
    """YAML, or JSON with the tabs that YAML forbids."""
    try:
        if text.lstrip().startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                text = json.dumps(json.loads(text, object_pairs_hook=_unique), ensure_ascii=False)
        return yaml.load(text, Loader=_Loader)  # a SafeLoader that also refuses repeated keys
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"the key {key!r} is given twice")
        found[key] = value
    return found


class _Loader(yaml.SafeLoader):
    """YAML says that keys are unique; PyYAML takes the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\}")


def _expand(value: Any, path: str, environ: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        # A key with nothing behind it is a key left out.
        return {
            key: _expand(item, f"{path}.{key}" if path else str(key), environ)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list):
        return [_expand(item, f"{path}[{index}]", environ) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name, default = match[1], match[3]
        if name in environ:
            return environ[name]
        if match[2] is not None:
            return default
        raise ConfigError(
            f"{path}: the environment variable {name} is not set. Set it, or write ${{{name}:-}} for empty"
        )

    return _VARIABLE.sub(variable, value)


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
        fields = Server.__struct_fields__ if path.startswith("servers") else Config.__struct_fields__
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


def _check(config: Config) -> None:
    """What types can't say."""
    if not config.servers:
        raise ConfigError(f"servers: expected {_EXPECTED['servers']}, got none")
    for index, problem in _server_problems(config.servers):
        raise ConfigError(f"servers[{index}].{problem}")
    for name in ("max_body_mb", "first_byte_timeout_s"):
        if not 0 < getattr(config, name) < float("inf"):
            raise _wrong(name, "a number above 0", getattr(config, name))
    if not 0 <= config.drain_s < float("inf"):
        raise _wrong("drain_s", "a number of seconds, 0 or more", config.drain_s)
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
    default = config.default_model
    if default is not None and all_known and default not in known and default not in config.aliases:
        raise ConfigError(f"default_model: {default!r} is no server's model and no alias; {_near(default, known)}")


def _near(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"models: {', '.join(sorted(known)) or 'none'}"
