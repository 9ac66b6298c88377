"""config.yaml -> frozen records. Everything is checked here, once; what leaves this module is right.

A wrong file raises `ConfigError` with the path in the file, what was expected and a hint. Secrets come by
`${NAME}` and hide in `repr`.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from gateway.config_checks import EXPECTED, check, wrong
from gateway.hints import closest, fields_at, in_words, located
from gateway.settings import Config, Secret
from gateway.small_files import read_small
from gateway.sources.settings import resolved
from gateway.yaml_text import ConfigError as ConfigError
from gateway.yaml_text import expand, read

# Where smol-llm-proxy has it, and where it does not stand in a file.
DEFAULT_ADMIN_KEY = "${ADMIN_KEY:-}"


def load(path: str | Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read and check a config file. Relative paths in it count from its folder. Raises ConfigError."""
    path = Path(path)
    try:
        text = read_small(path).decode()
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
        raise wrong("", "a mapping that begins with 'servers:'", raw)
    try:
        config = msgspec.convert(expand({"admin_key": DEFAULT_ADMIN_KEY, **raw}, environ), Config, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise _explain(error) from None
    except RecursionError:
        raise ConfigError("is not YAML: a list or mapping holds itself") from None
    check(config)
    servers = tuple(
        msgspec.structs.replace(server, ca_file=folder / server.ca_file) if server.ca_file else server
        for server in config.servers
    )
    sources = tuple(resolved(source, folder) for source in config.auth.sources)
    auth = msgspec.structs.replace(config.auth, sources=sources)
    return msgspec.structs.replace(config, data=folder / config.data, servers=servers, auth=auth)


def _decode(kind: type, value: Any) -> Any:
    """Strings that are more than strings: Address, Path, Secret."""
    if not isinstance(value, str):
        shown = f" {value!r}" if isinstance(value, int | float) and kind is not Secret else ""
        raise ValueError(f"Expected text, got {type(value).__name__}{shown}")
    return kind(value)


def _explain(error: msgspec.ValidationError) -> ConfigError:
    """msgspec's message -> path, expected, hint."""
    message, path = located(error)
    below = f"{path}." if path else ""
    if unknown := re.search(r"unknown field `(.*)`", message):
        fields = fields_at(Config, path)
        near = closest(unknown[1], fields)
        hint = f"did you mean '{near}'?" if near else f"known keys: {', '.join(fields)}"
        return ConfigError(f"{below}{unknown[1]}: unknown key; {hint}")
    if missing := re.search(r"missing required field `(.*)`", message):
        return ConfigError(f"{below}{missing[1]}: missing{_expected(path, missing[1], '; ')}")
    field = re.sub(r"\[[^\[\]]*\]$", "", path).rpartition(".")[2]
    expected = _expected(path, field, " (")
    return ConfigError(f"{path}: {in_words(message)}{expected}{')' * bool(expected)}")


def _expected(path: str, name: str, before: str) -> str:
    """What is wanted of a key, where there is more to say than its type. Key sources have urls of their own kinds."""
    return f"{before}expected {EXPECTED[name]}" if name in EXPECTED and not path.startswith("auth") else ""
