"""Keys of other sources than keys.db: they are made and changed where they stand, and only their use is known here.

Those that the config file lists are all told. Of files, databases, webhooks and scripts the gateway knows no list: a
key of theirs is told while something is counted for it.
"""

import time
from collections.abc import Iterator

import msgspec

from gateway.admin.desk import Desk
from gateway.limits import WINDOW_S, Limits
from gateway.settings import Config
from gateway.sources import kinds
from gateway.sources.settings import Static, StaticKey

COUNTED = """
select substr(counter.scope, 5) as whose, running,
  ifnull(sum(log.requests), 0) as requests, ifnull(sum(log.tokens), 0) as tokens
from limit_counters as counter left join limit_log as log on log.scope = counter.scope and log.at > ?
where counter.scope like 'key:%/%'
group by counter.scope order by counter.scope limit 1000
"""


class CallerInfo(msgspec.Struct, frozen=True):
    """A key of another source than keys.db. `declared`: in the config file; of others `team` and `limits` are not
    known: null. `running`: its requests; `requests`, `tokens`: of the last 60 seconds; null: nothing is counted for it
    in usage.db.
    """

    source: str
    name: str
    declared: bool
    team: str | None = None
    limits: Limits | None = None
    running: int | None = None
    requests: int | None = None
    tokens: int | None = None

    @property
    def whose(self) -> str:
        """What its counters are named by."""
        return f"{self.source}/{self.name}"


def declared(config: Config) -> Iterator[tuple[str, StaticKey]]:
    """The keys in the config file, each with its source's name."""
    sources = config.auth.sources
    for name, source in zip(kinds.names(sources), sources, strict=True):
        if isinstance(source, Static):
            yield from ((name, key) for key in source.keys)


async def list_callers(desk: Desk) -> list[CallerInfo]:
    """Raises Refusal."""
    config = desk.room.declared
    is_counted_here = config.limits.storage == "local"
    counters = await desk.ask(COUNTED, [time.time() - WINDOW_S]) if is_counted_here else []
    rows = {row.pop("whose"): row for row in counters}
    named = [CallerInfo(source, key.name, True, key.team, key.limits) for source, key in declared(config)]
    found = [msgspec.structs.replace(each, **rows.pop(each.whose, {})) for each in named]
    sources = kinds.names(config.auth.sources)
    for whose, counted in rows.items():
        # A source's name may hold a slash, a key's as well.
        source = max((name for name in sources if whose.startswith(f"{name}/")), key=len, default=None)
        if source is not None:
            found.append(CallerInfo(source, whose.removeprefix(f"{source}/"), False, **counted))
    return found
