"""The config in use, without its secrets, and reading it again."""

import re
from pathlib import Path

import msgspec

from gateway.admin.desk import Desk
from gateway.admin.routes import Nothing, Other, Route, Routes
from gateway.changes import ReloadReport
from gateway.secret import Secret, hint
from gateway.sources.settings import StaticKey

# What stands before the last @ of a URL: passwords that nobody has encoded hold anything. And its query.
_CREDENTIALS = re.compile(r"(?<=://).*@", re.DOTALL)
_QUERY = re.compile(r"\?.*", re.DOTALL)


class ConfigAnswer(msgspec.Struct, frozen=True):
    """`config`: what is in use, of the file and of what the API made. `problems`: what was made and is not in use."""

    config: dict[str, object]
    problems: tuple[str, ...]


def masked(value: object) -> object:
    """Plain values of records, with hints in the place of secrets."""
    match value:
        case str() if "://" in value:
            return _QUERY.sub("?…", _CREDENTIALS.sub("…@", str(value)))
        case Secret():
            return "local" if value == "local" else hint(value)
        case StaticKey(sha256=str() as digest):
            return masked(msgspec.structs.replace(value, key=Secret(digest), sha256=None))
        case msgspec.Struct():
            config = value.__struct_config__
            tag = {config.tag_field: config.tag} if config.tag_field is not None else {}
            return tag | {name: masked(getattr(value, name)) for name in value.__struct_fields__}
        case dict():
            return {str(name): masked(each) for name, each in value.items()}
        case tuple() | list():
            return [masked(each) for each in value]
        case str() | Path():
            return str(value)
    return value


async def get_config(desk: Desk, params: Nothing, body: Nothing) -> ConfigAnswer:
    merge = await desk.merge()
    config = masked(merge.config)
    assert isinstance(config, dict)
    return ConfigAnswer(config, merge.problems)


async def reload_config(desk: Desk, params: Nothing, body: Nothing) -> ReloadReport | Other:
    report = await desk.room.reload(desk.actor)
    return report if report.ok else Other(400, report)


ROUTES: Routes = (
    Route("GET", "/admin/config", "The config in use, without its secrets", get_config, Nothing, Nothing, ConfigAnswer),
    Route(
        "POST",
        "/admin/config/reload",
        "Read the config file again; a bad one changes nothing (400)",
        reload_config,
        Nothing,
        Nothing,
        ReloadReport,
        also={400: ReloadReport},
    ),
)
