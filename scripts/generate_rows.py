"""A usage.db full of invented but plausible requests, for pictures, measurements and tests of the dashboard.

The rows are drawn day by day, oldest first, and each day's roll-ups are summed with the ledger's own SQL
(`gateway.schema`), so that they agree with the table as they do in real life. The same seed and end give the same rows.
"""

import argparse
import re
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from sqlite_utils import Database

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "addon"))

from gateway.prices import Price
from gateway.records import ServerEvent
from gateway.schema import NONE, ROLLUP_SUMS, ROLLUPS, ttft_bucket, usage
from outages import DAY_MS, WORKERS, Outage, events, invent, since

Column = NDArray[Any]
CHUNK_ROWS = 250_000  # rows held in memory at once

PEOPLE = [
    "alice", "bob", "carol", "david", "emma", "frank", "grace", "henry", "irene", "jan", "karin", "liam", "maria",
    "noah", "olga", "paul", "quentin", "rosa", "samir", "tina", "ulrich", "vera", "walter", "xenia", "yusuf", "zoe",
    "anouk", "bruno"
]  # fmt: skip
AGENTS = [
    "agent-review", "agent-triage", "agent-docs", "agent-tests", "agent-search", "agent-mail", "ci-nightly",
    "ci-lint", "notebook-eval", "chat-web", "support-bot", "batch-tagging"
]  # fmt: skip


@dataclass(frozen=True)
class Model:
    name: str
    asked_as: str  # what clients call it: the name itself or an alias
    share: float
    prefill_per_s: float  # prompt tokens a second
    decode_per_s: float  # completion tokens a second
    thinks: bool
    price: Price


@dataclass(frozen=True)
class Server:
    name: str
    speed: float
    models: tuple[int, ...]


MODELS = (
    Model("qwen3-8b", "fast", 0.46, 2_900.0, 92.0, False, Price(0.1, 0.01, 0.4)),
    Model("qwen3-coder-30b", "qwen3-coder-30b", 0.30, 1_700.0, 64.0, False, Price(0.2, 0.02, 0.8)),
    Model("gpt-oss-120b", "gpt-oss-120b", 0.16, 800.0, 31.0, True, Price(0.5, 0.05, 2.0)),
    Model("bge-m3", "text-embedding-3-small", 0.08, 9_000.0, 0.0, False, Price(0.02)),
)
EMBEDDING = 3
SERVERS = (Server("gpu-1", 1.0, (0, 1, 3)), Server("gpu-2", 0.82, (0, 1)), Server("gpu-3", 1.15, (2,)))
# Index of the server by model, as often as it takes that model.
PLACES = ((0, 1), (0, 1, 1), (2,), (0,))
# Who stands in for a server: the other one of those that share their models. gpu-3 stands alone.
OTHER = (1, 0, 2)
# The model that answers when nobody is there for one, and its server.
FALLBACKS = {2: (1, 1)}
NOTICED_MS = 20_000  # until then, requests still go to a server that is away, and on to another one
ROUTES = ("prefix", "rendezvous", "least-busy", "only", "retry")

NOBODY = (503, "no_server_available")
OUTCOMES = ("ok", "client_closed", "error", "upstream_cut", "unreachable", "refused")
OUTCOME_SHARES = (0.962, 0.014, 0.009, 0.002, 0.003, 0.010)
# (status, error_code) by outcome; several when they differ. The first is the most common one.
ERRORS: dict[str, tuple[tuple[int | None, str | None], ...]] = {
    "ok": ((200, None),),
    "client_closed": ((200, None), (None, None)),
    "error": ((400, "exceed_context_size_error"), (500, "server_error"), (400, "invalid_request_error")),
    "upstream_cut": ((200, None),),
    "unreachable": ((502, "upstream_unreachable"), NOBODY, (504, "upstream_timeout")),
    "refused": ((429, "rate_limit_exceeded"), (403, "model_not_allowed"), (404, "model_not_found")),
}
COLUMNS = [
    "id", "started_at", "key_id", "key_name", "model", "served_model", "server", "endpoint", "stream", "status",
    "outcome", "error_code", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens",
    "tokens_source", "queue_ms", "ttft_ms", "duration_ms", "prompt_ms", "predicted_ms", "attempts", "request_bytes",
    "response_bytes", "client_request_id", "worker", "route", "fallback_from",
    "team", "cost_micros", "currency"
]  # fmt: skip
INSERT = f"insert into requests ({', '.join(COLUMNS)}) values ({', '.join('?' * len(COLUMNS))})"
EVENT_COLUMNS = ServerEvent.__struct_fields__
INSERT_EVENT = f"insert into server_events ({', '.join(EVENT_COLUMNS)}) values ({', '.join('?' * len(EVENT_COLUMNS))})"
# As if keys had a budget of so many tokens a day.
DAILY_BUDGET = 40_000
BUDGET_EVENTS = f"""
insert into limit_events (at, scope, per, unit, share, allowed, used, worker)
select day || iif(share < 1, 'T14:02:11.000Z', 'T16:45:07.000Z'), 'key:' || key_id, 'day', 'tokens', share,
  {DAILY_BUDGET}, cast({DAILY_BUDGET} * share as integer) + key_id, ?
from usage_daily join (select 0.8 as share union all select 1.0)
group by day, key_id, share having sum(prompt_tokens + completion_tokens) > {DAILY_BUDGET} * share order by 1
"""
WITHIN = "started_at >= ? and started_at < ?"


def moments(random: np.random.Generator, start_ms: int, stop_ms: int, rows: int) -> NDArray[np.int64]:
    """Sorted times in ms from start to stop, with a working day's two humps on top of the agents' even stream."""
    even = random.random(rows)
    humps = np.where(random.random(rows) < 0.5, random.normal(0.42, 0.07, rows), random.normal(0.62, 0.08, rows))
    part = np.where(random.random(rows) < 0.35, even, np.clip(humps, 0, 0.999999))
    day_ms = start_ms - start_ms % DAY_MS + part * DAY_MS
    # What falls outside the period (the first and the last day are parts of a day) is spread over it.
    outside = (day_ms < start_ms) | (day_ms >= stop_ms)
    return np.sort(np.where(outside, start_ms + even * (stop_ms - start_ms), day_ms).astype(np.int64))


@dataclass(frozen=True)
class Places:
    """Where requests went, each an array: indexes of MODELS, SERVERS and ROUTES, and what happened on the way."""

    model: Column
    served: Column
    server: Column
    route: Column
    fell_back: Column
    retried: Column
    lost: Column  # nobody was there


def find_places(random: np.random.Generator, at_ms: NDArray[np.int64], outages: list[Outage]) -> Places:
    n = len(at_ms)
    model = random.choice(len(MODELS), n, p=[m.share for m in MODELS])
    places = [np.array(PLACES[i]) for i in range(len(MODELS))]
    home = np.select([model == i for i in range(len(MODELS))], [p[random.integers(0, len(p), n)] for p in places])
    away_ms = since(outages, home, at_ms)
    away = away_ms >= 0
    shared = np.isin(model, [i for i, places in enumerate(PLACES) if len(places) > 1])
    fell_back = away & np.isin(model, list(FALLBACKS))
    served, server = model, np.where(away & shared, np.array(OTHER)[home], home)
    for missing, (stand_in, place) in FALLBACKS.items():
        here = fell_back & (model == missing)
        served, server = np.where(here, stand_in, served), np.where(here, place, server)
    retried = (away & (away_ms < NOTICED_MS)) | (random.random(n) < 0.003)
    route = random.choice(3, n, p=(0.74, 0.19, 0.07))
    route = np.where(away, ROUTES.index("rendezvous"), np.where(shared, route, ROUTES.index("only")))
    route = np.where(retried, ROUTES.index("retry"), route)
    return Places(model, served, server, route, fell_back, retried, away & ~shared & ~fell_back)


def waits_ms(random: np.random.Generator, at_ms: NDArray[np.int64], moved: Column) -> Column:
    """In the queue for a slot: most find one free at once, fewer at the day's humps and where a server is missing."""
    n = len(at_ms)
    part = at_ms % DAY_MS / DAY_MS
    hump = np.exp(-(((part - 0.42) / 0.08) ** 2)) + 0.8 * np.exp(-(((part - 0.62) / 0.09) ** 2))
    waits = random.random(n) < 0.02 + 0.3 * hump + 0.4 * moved
    return np.where(waits, random.lognormal(5.0 + 1.5 * hump + 1.5 * moved, 1.0, n), random.random(n) * 0.4)


def day_columns(random: np.random.Generator, at_ms: NDArray[np.int64], outages: list[Outage]) -> dict[str, list[Any]]:
    """Column name -> values, for one row per moment."""
    n = len(at_ms)
    users = PEOPLE + AGENTS
    # A few users make most of the traffic, and agents more than people.
    weight = np.concatenate([1.0 / np.arange(2, len(PEOPLE) + 2), 2.2 / np.arange(2, len(AGENTS) + 2)])
    user = random.choice(len(users), n, p=weight / weight.sum())
    agent = user >= len(PEOPLE)
    places = find_places(random, at_ms, outages)
    model, server = places.served, places.server
    outcome = random.choice(len(OUTCOMES), n, p=OUTCOME_SHARES)
    outcome = np.where(places.lost, OUTCOMES.index("unreachable"), outcome)
    embedding = model == EMBEDDING
    stream = (random.random(n) < np.where(agent, 0.55, 0.92)) & ~embedding

    met_server = np.isin(outcome, [OUTCOMES.index(o) for o in ("ok", "client_closed", "upstream_cut")])
    finished = outcome == OUTCOMES.index("ok")
    prompt = np.clip(random.lognormal(np.where(agent, 8.0, 6.6), 1.1, n), 8, 60_000).astype(np.int64)
    # A server that knows the conversation has most of it in its cache; one that does not, the system prompt at best.
    knows = np.isin(places.route, [ROUTES.index("prefix"), ROUTES.index("only")]) & (random.random(n) < 0.85)
    cached = (prompt * np.where(knows, random.beta(9, 1.5, n), random.beta(1, 6, n))).astype(np.int64)
    cached = np.where(embedding, 0, np.minimum(cached, prompt - 1))
    completion = np.clip(random.lognormal(5.3, 1.0, n), 1, 8_000)
    completion = np.where(finished, completion, completion * random.random(n)).astype(np.int64)
    completion = np.where(embedding, 0, completion)
    thinks = np.array([m.thinks for m in MODELS])[model]
    reasoning = np.where(thinks, (completion * 0.6).astype(np.int64), 0)

    speed = np.array([s.speed for s in SERVERS])[server] * random.lognormal(0, 0.15, n)
    prompt_ms = (prompt - cached) / (np.array([m.prefill_per_s for m in MODELS])[model] * speed) * 1000 + 2
    decode = np.where(embedding, 1.0, np.array([m.decode_per_s for m in MODELS])[model])
    predicted_ms = np.where(embedding, 0, completion / (decode * speed) * 1000)
    queue_ms = waits_ms(random, at_ms, places.retried | places.fell_back)
    ttft_ms = queue_ms + prompt_ms + 4 + random.random(n) * 6
    duration_ms = np.where(met_server, queue_ms + prompt_ms + predicted_ms + 6, random.lognormal(1.0, 1.0, n))

    # A client that hung up gets no usage: the deltas were counted, the prompt is unknown.
    counted = met_server & ~finished
    first = random.random(n) < 0.6
    asked = np.array([m.asked_as for m in MODELS])[places.model]
    endpoints = np.where(embedding, "/v1/embeddings", np.where(agent & first, "/v1/messages", "/v1/chat/completions"))
    stamp = np.datetime_as_string(at_ms.astype("datetime64[ms]"), unit="ms")
    tails = random.integers(0, 2**62, (n, 2))
    codes = [ERRORS[name] for name in OUTCOMES]
    pick = random.integers(0, 6, n)
    chosen = zip(outcome.tolist(), pick.tolist(), strict=True)
    answers = [codes[o][0 if p > 2 else p % len(codes[o])] for o, p in chosen]
    answers = [NOBODY if lost else answer for lost, answer in zip(places.lost.tolist(), answers, strict=True)]

    routed = np.array([code != "model_not_found" for _, code in answers], bool)
    sent = np.array([answer != NOBODY for answer in answers], bool) & (outcome != OUTCOMES.index("refused"))
    # A request that failed everywhere was tried as often as config.yaml allows.
    attempts = np.where(outcome == OUTCOMES.index("unreachable"), 5, np.where(places.retried, 2, 1))

    def known(values: Column, where: Column) -> list[Any]:
        return [v if w else None for v, w in zip(values.tolist(), where.tolist(), strict=True)]

    def ms(values: Column, where: Column) -> list[Any]:
        return known(np.round(values, 3), where)

    # A price per million tokens is one of micro-units per token.
    prices = [MODELS[index].price for index in model.tolist()]
    cached_price = np.array([each.prompt if each.cached is None else each.cached for each in prices])
    prompt_cost = (prompt - cached) * np.array([each.prompt for each in prices]) + cached * cached_price
    cost = np.where(finished, prompt_cost, 0) + completion * np.array([each.completion for each in prices])

    return {
        "id": [uuid7(t, a, b) for t, (a, b) in zip(at_ms.tolist(), tails.tolist(), strict=True)],
        "started_at": [f"{s}Z" for s in stamp.tolist()],
        "key_id": (user + 1).tolist(),
        "key_name": np.array(users)[user].tolist(),
        "model": asked.tolist(),
        "served_model": known(np.array([m.name for m in MODELS])[model], routed),
        "server": known(np.array([s.name for s in SERVERS])[server], sent),
        "endpoint": endpoints.tolist(),
        "stream": stream.astype(int).tolist(),
        "status": [status for status, _ in answers],
        "outcome": np.array(OUTCOMES)[outcome].tolist(),
        "error_code": [code for _, code in answers],
        "prompt_tokens": known(prompt, finished),
        "cached_tokens": known(cached, finished),
        "completion_tokens": known(completion, met_server),
        "reasoning_tokens": known(reasoning, met_server & thinks),
        "tokens_source": [
            "counted" if c else "usage" if f else None for c, f in zip(counted.tolist(), finished.tolist(), strict=True)
        ],
        "queue_ms": ms(queue_ms, sent),
        "ttft_ms": ms(ttft_ms, met_server),
        "duration_ms": ms(duration_ms, np.ones(n, bool)),
        "prompt_ms": ms(prompt_ms, finished),
        "predicted_ms": ms(predicted_ms, finished & ~embedding),
        "attempts": np.where(sent, attempts, 0).tolist(),
        "request_bytes": (prompt * 4 + 220).tolist(),
        "response_bytes": known(np.where(stream, completion * 190, completion * 4) + 400, met_server),
        "client_request_id": [None] * n,
        "worker": random.choice(WORKERS, n).tolist(),
        "route": known(np.array(ROUTES)[places.route], sent),
        "fallback_from": known(np.array([m.name for m in MODELS])[places.model], places.fell_back & sent),
        "team": np.where(agent, "agents", "people").tolist(),
        "cost_micros": known(np.round(cost).astype(np.int64), met_server),
        "currency": known(np.full(n, "EUR"), met_server),
    }


def uuid7(at_ms: int, a: int, b: int) -> str:
    """The text of a version 7 UUID: 48 bits of time, then 74 random bits out of two numbers."""
    time = f"{at_ms >> 16:08x}-{at_ms & 0xFFFF:04x}"
    return f"{time}-7{a & 0xFFF:03x}-{0x8000 | (a >> 12) & 0x3FFF:04x}-{b & 0xFFFFFFFFFFFF:012x}"


def columns_of(expression: str) -> str:
    """The ledger's SQL over bound values, made one over the columns of `requests`."""
    return re.sub(r":([a-z_]+)", r"\1", expression)


def add_rollups(db: Database, start: str, stop: str) -> None:
    """Sum the settled requests from start to stop into every roll-up: whole days only."""
    names = f"ifnull(key_name, '{NONE}'), ifnull(served_model, '{NONE}'), ifnull(server, '{NONE}')"
    sums = ", ".join(f"sum({columns_of(expression)})" for expression in ROLLUP_SUMS.values())
    for table, (_, cut) in ROLLUPS.items():
        db.execute(
            f"insert into {table} select {columns_of(cut)}, ifnull(key_id, 0), {names}, {sums} from requests "
            f"where {WITHIN} and outcome != 'open' group by 1, 2, 3, 4, 5",
            (start, stop),
        )
    db.execute(
        f"insert into ttft_daily select substr(started_at, 1, 10), {names}, "
        "(select min(upto_ms) from temp.bounds where upto_ms >= ttft_ms), count(*) from requests "
        f"where {WITHIN} and outcome != 'open' and ttft_ms is not null group by 1, 2, 3, 4, 5",
        (start, stop),
    )


def open_rows(random: np.random.Generator, end: datetime, rows: int, outages: list[Outage]) -> dict[str, list[Any]]:
    """Requests that began within the last 40 seconds and are still running."""
    end_ms = int(end.timestamp() * 1000)
    columns = day_columns(random, np.sort(end_ms - random.integers(50, 40_000, rows)), outages)
    unknown = set(COLUMNS[COLUMNS.index("status") : COLUMNS.index("attempts")]) | {
        "response_bytes",
        "cost_micros",
        "currency",
    }
    for name in unknown - {"outcome"}:
        columns[name] = [None] * rows
    columns["outcome"] = ["open"] * rows
    return columns


def generate(path: Path, rows: int, *, seed: int = 1, days: int = 90, end: datetime | None = None) -> None:
    """Write a fresh usage.db of about `days` days that end at `end` (now), with exactly `rows` requests."""
    if path.exists():
        raise SystemExit(f"{path} exists already: give the name of a new file")
    end = (end or datetime.now(UTC)).replace(microsecond=0)
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    db = Database(path)
    usage.apply(db)
    for pragma in ("journal_mode = off", "synchronous = off", "cache_size = -500000"):  # a file that can be made again
        db.execute(f"pragma {pragma}")
    bounds = sorted({ttft_bucket(10 ** (step / 10 - 0.05)) for step in range(81)})  # from the middle of each bucket
    db.execute("create temp table bounds (upto_ms real primary key)")
    db.conn.executemany("insert into temp.bounds values (?)", [(bound,) for bound in bounds])

    running = min(7, rows // 100)
    first = (end - timedelta(days=days - 1)).replace(hour=0, minute=0, second=0)
    starts = [first + timedelta(days=n) for n in range(days)]
    # Growth over the period, quiet weekends, a lively last day; the last day is only as long as it is old.
    busy = np.array([(0.5 + n / days) * (0.3 if day.weekday() > 4 else 1) for n, day in enumerate(starts)])
    busy[-1] *= max((end - starts[-1]).total_seconds() / 86_400, 0.001)
    per_day = random.multinomial(rows - running, busy / busy.sum())
    first_ms, end_ms = int(first.timestamp() * 1000), int(end.timestamp() * 1000)
    outages = invent(random, first_ms, end_ms, len(SERVERS))
    told = events(random, outages, [server.name for server in SERVERS], first_ms, end_ms)
    db.conn.executemany(INSERT_EVENT, map(msgspec.structs.astuple, told))
    for day, count in zip(starts, per_day.tolist(), strict=True):
        stop = min(day + timedelta(days=1), end)
        at_ms = moments(random, int(day.timestamp() * 1000), int(stop.timestamp() * 1000), count)
        for offset in range(0, count, CHUNK_ROWS):
            columns = day_columns(random, at_ms[offset : offset + CHUNK_ROWS], outages)
            db.conn.executemany(INSERT, zip(*(columns[name] for name in COLUMNS), strict=True))
        add_rollups(db, f"{day:%Y-%m-%d}", f"{day + timedelta(days=1):%Y-%m-%d}")
        db.conn.commit()
    db.execute(BUDGET_EVENTS, (WORKERS[0],))
    columns = open_rows(random, end, running, outages)
    db.conn.executemany(INSERT, zip(*(columns[name] for name in COLUMNS), strict=True))
    db.conn.commit()
    db.execute("pragma journal_mode = wal")
    db.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a usage.db of invented requests.")
    parser.add_argument("path", type=Path, help="the file to write; it must not exist")
    parser.add_argument("rows", type=int, nargs="?", default=100_000, help="how many requests (100000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--days", type=int, default=90)
    parser.add_argument("--end", type=datetime.fromisoformat, help="newest moment, as 2026-01-31T12:00:00+00:00 (now)")
    given = parser.parse_args()
    began = time.monotonic()
    generate(given.path, given.rows, seed=given.seed, days=given.days, end=given.end)
    print(f"{given.rows} requests in {given.path} ({time.monotonic() - began:.1f} s)")


if __name__ == "__main__":
    main()
