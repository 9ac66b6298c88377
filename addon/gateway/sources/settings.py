"""What stands under auth.sources, as frozen records: one for each `type`."""

from pathlib import Path

import msgspec

from gateway.limits import Limits
from gateway.secret import Secret

ON_ERROR = ("refuse", "next")
SQLITE = "sqlite:///"


class Common(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", kw_only=True):
    """What all have. `name`: in logs and counters; None: its type. `on_error`: what a source that fails does to a
    request: "refuse" (503), or "next", as if it did not know the key. `cache_s`, `negative_cache_s`: for how long its
    answer holds, when it lets the key in and when it does not.
    """

    name: str | None = None
    on_error: str = "refuse"
    timeout_s: float = 3
    cache_s: float = 30
    negative_cache_s: float = 5


class Local(Common, frozen=True, tag="local"):
    """data/keys.db: what scripts/keys and the admin API make. Never cached: a change acts at the next request."""


class StaticKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A key in a file: the key itself (by `${NAME}`) or its SHA-256. `expires`: a date (valid through it) or a time.
    `models`, `endpoints`, `networks`: None for all.
    """

    name: str
    key: Secret = Secret("")
    sha256: str | None = None
    team: str | None = None
    models: tuple[str, ...] | None = None
    endpoints: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None
    weight: float = 1
    priority: str = "normal"
    not_before: str | None = None
    expires: str | None = None
    disabled: bool = False
    limits: Limits = Limits()


class Static(Common, frozen=True, tag="static"):
    """Keys in config.yaml itself."""

    keys: tuple[StaticKey, ...]


class File(Common, frozen=True, tag="file"):
    """A YAML or JSON file with the same list of keys. Read again when it changes."""

    path: Path


class Sql(Common, frozen=True, tag="sql"):
    """A query of SQLite, PostgreSQL or MySQL/MariaDB, with the binds :sha256 and :key."""

    url: Secret
    query: str


class Redis(Common, frozen=True, tag="redis"):
    """A hash, or a string of JSON, under `key`: a template with {sha256}."""

    url: Secret
    key: str = "llmproxy:key:{sha256}"


class MongoDB(Common, frozen=True, tag="mongodb"):
    """Documents as Comtegra's llmproxy asks for them."""

    url: Secret
    database: str = "cgc"
    collection: str = "api_keys"
    access_level: str = "LLM"


class Webhook(Common, frozen=True, tag="webhook"):
    """A POST to `url`. `api_key`: sent as a Bearer token. `send_key`: the key itself goes along, not only its hash."""

    url: str
    api_key: Secret = Secret("")
    headers: dict[str, Secret] = {}
    send_key: bool = False
    verify_tls: bool = True
    ca_file: Path | None = None


class Python(Common, frozen=True, tag="python"):
    """A function in a file of Python, run in processes of its own."""

    path: Path
    function: str = "find"


class Lua(Common, frozen=True, tag="lua"):
    """A function in a file of Lua, in a sandbox. `max_instructions`: of one call. `max_memory_mb`: of the script."""

    path: Path
    function: str = "find"
    max_instructions: int = 10_000_000
    max_memory_mb: float = 16


type Source = Local | Static | File | Sql | Redis | MongoDB | Webhook | Python | Lua


def resolved(source: Source, folder: Path) -> Source:
    """The same, with relative paths counted from a folder."""
    if isinstance(source, File | Python | Lua):
        return msgspec.structs.replace(source, path=folder / source.path)
    if isinstance(source, Webhook) and source.ca_file is not None:
        return msgspec.structs.replace(source, ca_file=folder / source.ca_file)
    if isinstance(source, Sql) and source.url.startswith(SQLITE):
        return msgspec.structs.replace(source, url=Secret(SQLITE + str(folder / source.url.removeprefix(SQLITE))))
    return source
