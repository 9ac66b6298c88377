"""The text of a config file -> plain values: YAML or JSON, no key twice, `${NAME}` from the environment."""

import contextlib
import json
import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

# Of a problem: it stands in a line of the log and in /health, and may quote what was written.
MAX_PROBLEM = 400


class ConfigError(Exception):
    """What is wrong with a config file, where, and what to do about it: `str` is meant for a person."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem if len(problem) <= MAX_PROBLEM else problem[: MAX_PROBLEM - 1] + "…")


def read(text: str) -> Any:
    """YAML, or JSON with the tabs that YAML forbids."""
    try:
        if text.lstrip().startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                text = json.dumps(json.loads(text, object_pairs_hook=_unique), ensure_ascii=False)
        return yaml.load(text, Loader=_Loader)  # a SafeLoader that also refuses repeated keys
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {_problem(error)}") from None
    except RecursionError:
        raise ConfigError("is not YAML: too many levels of lists and mappings") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # PyYAML's parsing of values
        raise ConfigError(f"is not YAML: a value that can't be read ({type(error).__name__})") from None


# What PyYAML quotes of its own: its names for parts of YAML, and signs of one or two characters.
_VOCABULARY = re.compile(r"""'(?:<[a-z ]+>|[^\w'"]{1,2}|\\[tn])'""")


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong, and where. PyYAML's own text quotes the line, or a word of it, which may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return "it holds a character that YAML has not"
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if isinstance(error, _Twice):
        return f"{place}{error.problem}"
    return place + ", ".join(_unquoted(text) for text in (error.context, error.problem) if text)


def _unquoted(text: str) -> str:
    rest = _VOCABULARY.sub("", text)
    if "'" not in rest and '"' not in rest:
        return text
    return re.split("""['"]""", text, maxsplit=1)[0] + "…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(_twice(key))
        found[key] = value
    return found


def _twice(key: Hashable) -> str:
    """A name is told; what is none may be something else that slipped in here."""
    return f"the key {key!r} is given twice" if re.fullmatch(r"\w{1,40}", str(key)) else "a key is given twice"


class _Twice(yaml.constructor.ConstructorError):
    """Said in words of ours."""


class _Loader(yaml.SafeLoader):
    """YAML says that keys are unique; PyYAML takes the last one silently. Dates stay text, as in JSON."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key in seen:
                raise _Twice(None, None, _twice(key), key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

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
