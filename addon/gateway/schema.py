"""usage.db as numbered migrations: the table of requests, and roll-ups that keep dashboards cheap.

Every column has an explicit type. A number that nobody reported is NULL; 0 was measured. Roll-ups are written by the
ledger in the transaction that settles the request, so that they always agree with the table.
"""

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

usage = Migrations("llmproxy")

# A request without a served model or a server (refused before either was known) counts under this. The model that was
# asked for is no key of a roll-up: clients invent names without end.
NONE = "(none)"

# Roll-up column -> what one settled request adds to it, as SQL over the bound columns of `requests`.
# Tokens of requests that only counted a prompt (count_tokens, input_tokens) are not use: they add nothing.
_COUNTING = ("/v1/messages/count_tokens", "/v1/chat/completions/input_tokens", "/v1/responses/input_tokens")
USED = f"(:endpoint not in {_COUNTING})"
ROLLUP_SUMS = {
    "requests": "1",
    "ok": "(:outcome = 'ok')",
    "errors": "(:outcome in ('error', 'upstream_cut', 'unreachable', 'interrupted'))",
    "client_closed": "(:outcome = 'client_closed')",
    "refused": "(:outcome = 'refused')",
    "prompt_tokens": f"ifnull(:prompt_tokens, 0) * {USED}",
    "cached_tokens": f"ifnull(:cached_tokens, 0) * {USED}",
    "completion_tokens": f"ifnull(:completion_tokens, 0) * {USED}",
    "reasoning_tokens": f"ifnull(:reasoning_tokens, 0) * {USED}",
    "counted_requests": "(:tokens_source is 'counted')",
    "timed_tokens": "iif(:predicted_ms > 0, ifnull(:completion_tokens, 0), 0)",
    "predicted_ms": "iif(:predicted_ms > 0, :predicted_ms, 0.0)",
    "prompt_ms": "ifnull(:prompt_ms, 0.0)",
    "duration_ms": "ifnull(:duration_ms, 0.0)",
    "cost_micros": "ifnull(:cost_micros, 0)",
}
_REAL = {"predicted_ms", "prompt_ms", "duration_ms"}
_LATER = {"cost_micros"}  # columns that a later migration adds

# Roll-up table -> its period, cut from started_at (2026-11-21T09:30:00.000Z).
ROLLUPS = {
    "usage_hourly": ("hour", "substr(:started_at, 1, 13) || ':00Z'"),
    "usage_daily": ("day", "substr(:started_at, 1, 10)"),
}


@usage()
def m001_requests(db: Database) -> None:
    db.table("requests").create(
        {
            "id": str,
            "started_at": str,
            "key_id": int,
            "key_name": str,
            "model": str,
            "served_model": str,
            "server": str,
            "endpoint": str,
            "stream": int,
            "status": int,
            "outcome": str,
            "error_code": str,
            "prompt_tokens": int,
            "cached_tokens": int,
            "completion_tokens": int,
            "reasoning_tokens": int,
            "tokens_source": str,
            "queue_ms": float,
            "ttft_ms": float,
            "duration_ms": float,
            "prompt_ms": float,
            "predicted_ms": float,
            "attempts": int,
            "request_bytes": int,
            "response_bytes": int,
            "client_request_id": str,
            "worker": str,
        },
        pk="id",
        not_null={"started_at", "endpoint", "outcome"},
    )
    db.execute("create index requests_started_at on requests (started_at)")
    db.execute("create index requests_key_name on requests (key_name, started_at)")
    db.execute("create index requests_open on requests (worker) where outcome = 'open'")
    # A few percent of the rows, so cheap to keep, and all that "who was cut off" and "errors by code" read.
    db.execute("create index requests_not_ok on requests (started_at) where outcome not in ('ok', 'open')")


@usage()
def m002_rollups(db: Database) -> None:
    for table, (period, _) in ROLLUPS.items():
        sums = {name: float if name in _REAL else int for name in ROLLUP_SUMS if name not in _LATER}
        keys = {period: str, "key_id": int, "key_name": str, "model": str, "server": str}
        db.table(table).create({**keys, **sums}, pk=tuple(keys), not_null=set(keys) | set(sums))


@usage()
def m003_ttft(db: Database) -> None:
    """Time to first token as a histogram: buckets ten to a decade, named by their upper bound in ms."""
    keys = {"day": str, "key_name": str, "model": str, "server": str, "upto_ms": float}
    db.table("ttft_daily").create({**keys, "requests": int}, pk=tuple(keys), not_null=set(keys) | {"requests"})


@usage()
def m004_running(db: Database) -> None:
    """What runs now, the oldest first. The plus keeps SQLite from reading all of started_at's index for the order."""
    db.execute(
        "create view running as select id, started_at, "
        "round((julianday('now') - julianday(started_at)) * 86400, 1) as running_s, "
        "key_name, model, served_model, server, endpoint, stream, attempts, request_bytes "
        "from requests where outcome = 'open' order by +started_at"
    )


@usage()
def m005_servers(db: Database) -> None:
    """Why a server was chosen, and what happened to servers: one row for each change that a worker saw."""
    db.execute("alter table requests add column route text")
    db.execute("alter table requests add column fallback_from text")
    db.table("server_events").create(
        {"id": int, "at": str, "server": str, "state": str, "previous": str, "reason": str, "worker": str},
        pk="id",
        not_null={"at", "server", "state", "previous", "worker"},
    )
    db.execute("create index server_events_at on server_events (at)")
    db.execute("create index server_events_server on server_events (server, id)")
    db.execute("create index server_events_worker on server_events (worker, server)")


@usage()
def m006_limits(db: Database) -> None:
    """What requests cost, what is spent of budgets, and the counters of limits: see `accounts`."""
    db.execute("alter table requests add column team text")
    db.execute("alter table requests add column cost_micros integer")
    db.execute("alter table requests add column currency text")
    for table in ROLLUPS:
        db.execute(f"alter table {table} add column cost_micros integer not null default 0")
    amounts = "tokens integer not null, micros integer not null"
    db.execute(
        f"create table spend_daily (scope text not null, day text not null, {amounts}, primary key (scope, day)) "
        "without rowid"
    )
    db.table("limit_events").create(
        {
            "id": int,
            "at": str,
            "scope": str,
            "per": str,
            "unit": str,
            "share": float,
            "allowed": int,
            "used": int,
            "worker": str,
        },
        pk="id",
        not_null={"at", "scope", "per", "unit", "share", "allowed", "used", "worker"},
    )
    db.execute("create index limit_events_at on limit_events (at)")
    db.execute(
        "create table limit_counters (scope text primary key not null, requests integer not null, "
        "tokens integer not null, running integer not null, held_tokens integer not null, "
        "held_micros integer not null, tat real not null) without rowid"
    )
    db.execute(
        "create table limit_log (scope text not null, at real not null, id text not null, requests integer not null, "
        "tokens integer not null, primary key (scope, at, id, requests)) without rowid"
    )
    db.execute(
        f"create table limit_held (id text not null, scope text not null, worker text not null, at real not null, "
        f"{amounts}, primary key (id, scope)) without rowid"
    )


def rollup_statements() -> list[str]:
    """SQL, bound to one settled row of `requests` by name, that adds it to every roll-up."""
    keys = (
        f"ifnull(:key_id, 0), ifnull(:key_name, '{NONE}'), ifnull(:served_model, '{NONE}'), ifnull(:server, '{NONE}')"
    )
    statements = []
    for table, (period, cut) in ROLLUPS.items():
        adds = ", ".join(f"{name} = {name} + excluded.{name}" for name in ROLLUP_SUMS)
        statements.append(
            f"insert into {table} ({period}, key_id, key_name, model, server, {', '.join(ROLLUP_SUMS)}) "
            f"values ({cut}, {keys}, {', '.join(ROLLUP_SUMS.values())}) "
            f"on conflict ({period}, key_id, key_name, model, server) do update set {adds}"
        )
    statements.append(
        "insert into ttft_daily (day, key_name, model, server, upto_ms, requests) "
        f"select substr(:started_at, 1, 10), ifnull(:key_name, '{NONE}'), ifnull(:served_model, '{NONE}'), "
        f"ifnull(:server, '{NONE}'), :ttft_upto_ms, 1 where :ttft_ms is not null "
        "on conflict (day, key_name, model, server, upto_ms) do update set requests = requests + 1"
    )
    return statements


def ttft_bucket(ttft_ms: float) -> float:
    """Upper bound, in ms, of the histogram bucket of a time to first token: 10 ** (n / 10), at least 1 ms."""
    bound = 1.0
    step = 0
    while bound < ttft_ms and step < 80:
        step += 1
        bound = round(10 ** (step / 10), 3)
    return bound
