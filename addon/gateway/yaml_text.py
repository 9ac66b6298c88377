"""The text of a config file -> plain values: YAML or JSON, no key twice, `${NAME}` from the environment."""

import contextlib
import json
import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml


class ConfigError(Exception):
    """What is wrong with a config file, where, and what to do about it: `str` is meant for a person."""


def read(text: str) -> Any:
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


def expand(value: Any, environ: Mapping[str, str], path: str = "") -> Any:
    """Environment variables in all of its texts. `path`: where `value` stands. Raises ConfigError."""
    if isinstance(value, dict):
        # A key with nothing behind it is a key left out.
        return {
            key: expand(item, environ, f"{path}.{key}" if path else str(key))
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list):
        return [expand(item, environ, f"{path}[{index}]") for index, item in enumerate(value)]
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
