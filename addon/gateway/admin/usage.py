"""What was used, from usage.db: request by request, and summed up. smol-llm-proxy's columns, and ours beside them."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gateway.admin.desk import Desk
from gateway.admin.routes import MAX_INT, MAX_LIMIT, Nothing, Route, Routes, bad
from gateway.keys import iso
from gateway.limits import MICRO

type Id = Annotated[int, Meta(ge=1, le=MAX_INT)]
type Limit = Annotated[int, Meta(ge=1, le=MAX_LIMIT)]
type Offset = Annotated[int, Meta(ge=0, le=MAX_INT)]

# Requests that only counted a prompt are no use.
USED = "(endpoint not like '%/count_tokens' and endpoint not like '%/input_tokens')"
# Lists of models and their like are answered by the gateway itself: they are in the books, and no use of any model.
FOR_A_MODEL = "(model is not null or served_model is not null or server is not null)"
SUMS = (
    "count(*) as request_count, "
    f"sum(ifnull(prompt_tokens, 0) * {USED}) as total_prompt_tokens, "
    f"sum(ifnull(completion_tokens, 0) * {USED}) as total_completion_tokens, "
    f"sum((ifnull(prompt_tokens, 0) + ifnull(completion_tokens, 0)) * {USED}) as total_all_tokens, "
    "sum(cost_micros) as cost_micros"
)
LOGS = (
    "id, key_id, key_name as user_name, team, server as server_name, model as model_name, "
    "served_model as real_model_name, endpoint, stream, status, outcome, error_code, prompt_tokens, cached_tokens, "
    "completion_tokens, reasoning_tokens, tokens_source, queue_ms, ttft_ms, duration_ms, prompt_ms, predicted_ms, "
    "attempts, cost_micros, currency, started_at as created_at"
)


class UsageFilter(msgspec.Struct, frozen=True):
    """Times are ISO 8601, UTC where they name no zone; `end_date` is included. `limit` and `offset` page the logs."""

    key_id: Id | None = None
    server_id: Id | None = None
    start_date: str | None = None
    end_date: str | None = None
    limit: Limit = 100
    offset: Offset = 0


class Log(msgspec.Struct, frozen=True):
    """A request. Null: unknown, or not come to. `cost`: in units of `currency`."""

    id: str
    key_id: int | None
    server_id: int | None
    model_name: str | None
    real_model_name: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    total_tokens: int | None
    prompt_ms: float | None
    predicted_ms: float | None
    created_at: str
    user_name: str | None
    server_name: str | None
    team: str | None
    endpoint: str
    stream: int | None
    status: int | None
    outcome: str
    error_code: str | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    tokens_source: str | None
    queue_ms: float | None
    ttft_ms: float | None
    duration_ms: float | None
    attempts: int | None
    cost: float | None
    currency: str | None


class Summary(msgspec.Struct, frozen=True):
    """`cost` null: nothing of it had a price."""

    key_name: str | None
    model_name: str | None
    real_model_name: str | None
    request_count: int
    total_prompt_tokens: int
    total_completion_tokens: int
    total_all_tokens: int
    cost: float | None


class RealSummary(msgspec.Struct, frozen=True):
    """`cost` null: nothing of it had a price."""

    real_model_name: str | None
    server_id: int | None
    server_name: str | None
    request_count: int
    total_prompt_tokens: int
    total_completion_tokens: int
    total_all_tokens: int
    cost: float | None


class UsageAnswer(msgspec.Struct, frozen=True):
    """`logs`: a page, the newest first. `summary`: of all that the filter lets through; the hundred with most tokens.
    `total`: how many logs there are.
    """

    logs: list[Log]
    summary: list[Summary]
    total: int


async def get_usage(desk: Desk, params: UsageFilter, body: Nothing) -> UsageAnswer:
    ids = await _server_ids(desk)
    where, values = _where(params, ids)
    logs = await desk.ask(
        f"select {LOGS} from requests {where} order by started_at desc, id desc limit ? offset ?",
        [*values, params.limit, params.offset],
    )
    groups = await desk.ask(
        f"select key_name, model as model_name, served_model as real_model_name, {SUMS} from requests {where} "
        "group by key_name, model, served_model order by total_all_tokens desc, request_count desc limit 100",
        values,
    )
    (count,) = await desk.ask(f"select count(*) as total from requests {where}", values)
    return UsageAnswer([_log(row, ids) for row in logs], [Summary(**_with_cost(row)) for row in groups], count["total"])


async def get_real_summary(desk: Desk, params: UsageFilter, body: Nothing) -> list[RealSummary]:
    ids = await _server_ids(desk)
    where, values = _where(params, ids)
    groups = await desk.ask(
        f"select served_model as real_model_name, server as server_name, {SUMS} from requests {where} "
        "group by served_model, server order by total_all_tokens desc, request_count desc limit ? offset ?",
        [*values, params.limit, params.offset],
    )
    return [RealSummary(server_id=ids.get(row["server_name"]), **_with_cost(row)) for row in groups]


async def _server_ids(desk: Desk) -> dict[str, int]:
    declared = [server.name for server in desk.room.declared.servers]
    return await desk.registry(lambda registry: registry.server_ids(declared))


def _where(params: UsageFilter, ids: dict[str, int]) -> tuple[str, list[str | int]]:
    """SQL, and its values. The books name servers; who has no id any more has no name here either."""
    server = next((name for name, each in ids.items() if each == params.server_id), None)
    given: list[tuple[str, str | int | None]] = [
        ("key_id = ?", params.key_id),
        ("server = ?", server if server is not None or params.server_id is None else ""),
        ("started_at >= ?", read_time("start_date", params.start_date)),
        ("started_at <= ?", read_time("end_date", params.end_date, is_end=True)),
    ]
    named = [(clause, value) for clause, value in given if value is not None]
    return f"where {' and '.join([FOR_A_MODEL, *(clause for clause, _ in named)])}", [value for _, value in named]


def read_time(name: str, text: str | None, *, is_end: bool = False) -> str | None:
    """A date or a time of ISO 8601 -> as it stands in usage.db. An end takes in all of its day, or of its second.
    Raises Refusal.
    """
    if text is None:
        return None
    try:
        # A plus in a query is a blank.
        moment = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        if is_end and ":" not in text and "T" not in text:
            moment += timedelta(days=1, milliseconds=-1)
        elif is_end and not moment.microsecond:
            moment += timedelta(milliseconds=999)
        return iso(moment)
    except (ValueError, OverflowError):
        raise bad(name, f"expected a date or time of ISO 8601, got {text[:50]!r}") from None


def _log(row: dict[str, Any], ids: dict[str, int]) -> Log:
    tokens = [count for count in (row["prompt_tokens"], row["completion_tokens"]) if count is not None]
    micros = row.pop("cost_micros")
    return Log(
        server_id=ids.get(row["server_name"]),
        total_tokens=sum(tokens) if tokens else None,
        cost=None if micros is None else micros / MICRO,
        **row,
    )


def _with_cost(row: dict[str, Any]) -> dict[str, Any]:
    micros = row.pop("cost_micros")
    return {**row, "cost": None if micros is None else micros / MICRO}


ROUTES: Routes = (
    Route("GET", "/admin/usage", "Requests, and their sums", get_usage, UsageFilter, Nothing, UsageAnswer),
    Route(
        "GET",
        "/admin/usage/summary/real",
        "Sums by model and server",
        get_real_summary,
        UsageFilter,
        Nothing,
        list[RealSummary],
    ),
)
