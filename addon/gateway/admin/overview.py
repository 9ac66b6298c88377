"""All that the admin page shows, in one answer: servers, what runs, keys and teams with their use."""

import msgspec

from gateway.admin.aliases import AliasInfo, list_aliases
from gateway.admin.callers import CallerInfo, list_callers
from gateway.admin.desk import Desk
from gateway.admin.keys import KeyInfo, list_keys
from gateway.admin.limits import use_of
from gateway.admin.routes import Nothing, Route, Routes
from gateway.admin.servers import ServerInfo, list_servers
from gateway.admin.teams import TeamInfo, list_teams
from gateway.changes import ReloadReport
from gateway.limit_use import BudgetUse, LimitUse, cost
from gateway.prices import Prices
from gateway.records import utc_now

MAX_RUNNING = 200
RUNNING = f"select * from running limit {MAX_RUNNING}"
BY_SERVER = "select server, count(*) as running from requests where outcome = 'open' and server <> '' group by server"
SINCE_MIDNIGHT = (
    "select key_id, max(key_name) as key_name, model, sum(requests) as requests, sum(prompt_tokens) as prompt_tokens, "
    "sum(completion_tokens) as completion_tokens, sum(cost_micros) as cost_micros "
    "from usage_daily where day = ? group by key_id, iif(key_id, '', key_name), model"
)


class ServerLoad(ServerInfo, frozen=True):
    """`running`: its requests, of all workers. `waiting`: those that wait for it, in this worker."""

    running: int
    waiting: int


class Running(msgspec.Struct, frozen=True):
    """A request that runs."""

    id: str
    started_at: str
    running_s: float
    key_name: str | None
    model: str | None
    served_model: str | None
    server: str | None
    endpoint: str
    stream: int | None
    attempts: int | None


class Today(msgspec.Struct, frozen=True):
    """A key's use since midnight, UTC. `key_id` null: it is not of keys.db. `cost`: in units of the currency; null:
    nothing that it used has a price.
    """

    key_id: int | None
    key_name: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


class Overview(msgspec.Struct, frozen=True):
    """`config`: what became of reading it last. `running`: the oldest first, 200 at most. `waiting`: in this worker.
    `callers`: keys of other sources than keys.db, as far as they are known. `today`: of all keys that were used.
    """

    at: str
    currency: str
    config: ReloadReport
    servers: list[ServerLoad]
    aliases: list[AliasInfo]
    running: list[Running]
    waiting: int
    keys: list[KeyInfo]
    callers: list[CallerInfo]
    teams: list[TeamInfo]
    limits: list[LimitUse]
    budgets: list[BudgetUse]
    today: list[Today]


async def get_overview(desk: Desk, params: Nothing, body: Nothing) -> Overview:
    now = utc_now()
    use = await use_of(desk)
    return Overview(
        at=now,
        currency=desk.room.declared.prices.currency,
        config=desk.room.report(),
        servers=await _servers(desk),
        aliases=await list_aliases(desk, Nothing(), body),
        running=msgspec.convert(await desk.ask(RUNNING), list[Running]),
        waiting=desk.room.waiting(),
        keys=await list_keys(desk, Nothing(), body),
        callers=await list_callers(desk),
        teams=await list_teams(desk, Nothing(), body),
        limits=use.limits,
        budgets=use.budgets,
        today=await _today(desk, now[:10]),
    )


async def _servers(desk: Desk) -> list[ServerLoad]:
    running = {row["server"]: row["running"] for row in await desk.ask(BY_SERVER)}
    waiting = {server.name: server.waiting for server in desk.room.router.servers}
    return [
        ServerLoad(**msgspec.structs.asdict(info), running=running.get(info.name, 0), waiting=waiting.get(info.name, 0))
        for info in await list_servers(desk, Nothing(), Nothing())
    ]


async def _today(desk: Desk, day: str) -> list[Today]:
    section = desk.room.declared.prices
    prices = Prices(section.currency, section.models)
    found: dict[tuple[int, str], Today] = {}
    for row in await desk.ask(SINCE_MIDNIGHT, [day]):
        # The roll-ups know no null: a key of another source has 0 for its id.
        key_id, name = row["key_id"], row["key_name"]
        whose = (key_id, "" if key_id else name)
        before = found.get(whose) or Today(key_id or None, name, 0, 0, 0, None)
        costs = [each for each in (before.cost, cost(row["cost_micros"], row["model"], prices)) if each is not None]
        found[whose] = Today(
            key_id=before.key_id,
            key_name=name,
            requests=before.requests + row["requests"],
            prompt_tokens=before.prompt_tokens + row["prompt_tokens"],
            completion_tokens=before.completion_tokens + row["completion_tokens"],
            cost=sum(costs) if costs else None,
        )
    return list(found.values())


ROUTES: Routes = (
    Route("GET", "/admin/overview", "What the admin page shows", get_overview, Nothing, Nothing, Overview),
)
