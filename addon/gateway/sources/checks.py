"""What the types of `settings` can't say of auth.sources. That drivers and files are there is found out by building."""

from gateway.sources.listed import static_keys
from gateway.sources.settings import ON_ERROR, Local, Lua, Python, Source, Static
from gateway.yaml_text import ConfigError

# One call of a script of Lua takes less memory than its own interpreter needs to start with.
MIN_MEMORY_MB = 1


def check(sources: tuple[Source, ...], *, all_decide: bool) -> None:
    """`all_decide`: mode "all". Raises ConfigError."""
    if not sources:
        raise ConfigError("auth.sources: expected at least one source; leave it out for the keys of scripts/keys")
    names: set[str] = set()
    for index, source in enumerate(sources):
        at = f"auth.sources[{index}]"
        if source.name is not None and (not source.name.strip() or "/" in source.name or source.name in names):
            raise ConfigError(f"{at}.name: expected a name of its own without a /, got {source.name!r}")
        names.add(source.name or "")
        _check_common(source, at, all_decide)
        if isinstance(source, Static):
            static_keys(source.keys, f"{at}.keys")
        if isinstance(source, Python | Lua) and not source.function.isidentifier():
            raise ConfigError(f"{at}.function: expected the name of a function, got {source.function!r}")
        if isinstance(source, Lua) and source.max_instructions < 1:
            raise ConfigError(f"{at}.max_instructions: expected 1 or more, got {source.max_instructions}")
        if isinstance(source, Lua) and not MIN_MEMORY_MB <= source.max_memory_mb < float("inf"):
            raise ConfigError(f"{at}.max_memory_mb: expected {MIN_MEMORY_MB} or more, got {source.max_memory_mb}")


def _check_common(source: Source, at: str, all_decide: bool) -> None:
    if source.on_error not in ON_ERROR:
        raise ConfigError(f"{at}.on_error: expected one of {', '.join(ON_ERROR)}, got {source.on_error!r}")
    if all_decide and source.on_error == "next":
        raise ConfigError(
            f"{at}.on_error: with mode: all every source must let a key in; leave it out, or write refuse"
        )
    if not 0 < source.timeout_s < float("inf"):
        raise ConfigError(f"{at}.timeout_s: expected a number above 0, got {source.timeout_s}")
    for name in ("cache_s", "negative_cache_s"):
        if not isinstance(source, Local) and not 0 <= getattr(source, name) < float("inf"):
            raise ConfigError(f"{at}.{name}: expected a number, 0 or more, got {getattr(source, name)}")
