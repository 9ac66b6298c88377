"""The dashboard as people see it: a real Datasette over a generated usage.db, in a real Chromium."""

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page
from sqlite_utils import Database

from gateway.schema import usage
from generate_rows import COLUMNS, INSERT, add_rollups, generate
from screenshots import open_page, serve

ROOT = Path(__file__).resolve().parent.parent
METADATA: dict[str, Any] = json.loads((ROOT / "datasette-metadata.json").read_text())
DASHBOARDS: dict[str, Any] = METADATA["plugins"]["datasette-dashboards"]
QUERIES: dict[str, Any] = METADATA["databases"]["usage"]["queries"]
CHARTS = {f"{board}/{name}": chart for board in DASHBOARDS for name, chart in DASHBOARDS[board]["charts"].items()}
CHART_SQL = {name: chart["query"] for name, chart in CHARTS.items() if "query" in chart}
STATEMENTS = CHART_SQL | {name: query["sql"] for name, query in QUERIES.items()}
HOSTILE = '<img src="x" onerror="alert(1)">'
COUNTED_ONLY = "(endpoint like '%/count_tokens' or endpoint like '%/input_tokens')"


@dataclass(frozen=True)
class Site:
    url: str
    path: Path

    def rows(self, sql: str, **given: str) -> list[dict[str, Any]]:
        """What a chart gets: the answer of the endpoint that charts ask."""
        answer = httpx.get(f"{self.url}/usage.json", params={"sql": sql, "_shape": "objects", **given})
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["rows"]
        return found

    def chart(self, name: str, **given: str) -> list[dict[str, Any]]:
        return self.rows(CHART_SQL[name], **given)

    def direct(self, sql: str, *given: object) -> Any:
        """The single value of a query straight from the file."""
        db = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        try:
            return db.execute(sql, given).fetchone()[0]
        finally:
            db.close()


def start_of(days: int) -> str:
    """First UTC day of the last so many days."""
    return f"{datetime.now(UTC) - timedelta(days=days - 1):%Y-%m-%d}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """4,000 requests over 90 days; a user, a model, a server and a reason have names that would be harmful as HTML."""
    path = tmp_path_factory.mktemp("data") / "usage.db"
    generate(path, 4000, seed=7)
    db = Database(path)
    for table in ("requests", "usage_hourly", "usage_daily", "ttft_daily"):
        db.execute(f"update {table} set key_name = ? where key_name = 'zoe'", (HOSTILE,))
        db.execute(f"update {table} set server = ? where server = 'gpu-3'", (HOSTILE,))
    # The last 48 hours may be a weekend, with next to nothing of this.
    newest = "id in (select id from requests where outcome = 'ok' order by started_at desc limit 5)"
    db.execute(f"update requests set attempts = 2, route = 'retry', queue_ms = 1500.0 where {newest}")
    db.execute("update server_events set server = ? where server = 'gpu-3'", (HOSTILE,))
    db.execute("update server_events set reason = ? where state = 'down'", (HOSTILE,))
    db.execute("update requests set served_model = ? where outcome = 'open'", (HOSTILE,))
    db.conn.commit()
    db.close()
    with serve(path) as url:
        yield Site(url.rstrip("/"), path)


@pytest.fixture(scope="module")
def empty_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    path = tmp_path_factory.mktemp("data") / "usage.db"
    with serve(new_db(path)) as url:
        yield Site(url.rstrip("/"), path)


def new_db(path: Path) -> Path:
    db = Database(path)
    usage.apply(db)
    db.execute("pragma journal_mode = wal")
    db.close()
    return path


@pytest.fixture
def watched(chromium: Browser) -> Iterator["Watched"]:
    watched = Watched(chromium)
    yield watched
    watched.close()


class Watched:
    """Opens pages, and keeps every address asked for and all that went wrong in them."""

    def __init__(self, browser: Browser) -> None:
        self.context = browser.new_context()
        self.asked: list[str] = []
        self.trouble: list[str] = []
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.context.on("response", lambda got: self.trouble.append(got.url) if got.status >= 400 else None)
        self.context.on("weberror", lambda error: self.trouble.append(str(error.error)))
        self.context.on("console", lambda said: self.trouble.append(said.text) if said.type != "log" else None)
        self.context.on("dialog", lambda dialog: self.trouble.append(dialog.message))

    def open(self, url: str) -> Page:
        return open_page(self.context, url)

    def close(self) -> None:
        self.context.close()


@pytest.mark.parametrize("board", DASHBOARDS)
@pytest.mark.parametrize("filled", [True, False], ids=["filled", "empty"])
def test_every_chart_is_drawn_and_nothing_leaves_the_machine(
    board: str, filled: bool, watched: Watched, request: pytest.FixtureRequest
) -> None:
    site: Site = request.getfixturevalue("site" if filled else "empty_site")
    page = watched.open(f"{site.url}/-/dashboards/{board}")
    charts = DASHBOARDS[board]["charts"]
    for name, chart in charts.items():
        card = page.locator(f"#chart-{name}")
        assert card.locator("p" if chart["library"] in ("metric", "markdown") else "svg.marks, canvas.marks").count()
        if chart["library"] == "metric":
            assert re.fullmatch(r"[\d,.]+( [kMG%])?|\d+ of \d+|–", card.inner_text()), name
    # A chart over no rows says so instead of standing empty.
    assert (page.locator("svg text", has_text="Nothing in this period").count() > 0) is not filled
    assert watched.trouble == []
    hosts = {urlsplit(url).netloc for url in watched.asked if not url.startswith("data:")}
    assert hosts == {urlsplit(site.url).netloc}


TABLES = ("requests", "running", "server_events", "spend_daily", "limit_events")


@pytest.mark.parametrize("where", ["/", "/usage", *[f"/usage/{name}" for name in (*TABLES, *QUERIES)]])
def test_other_pages_stay_on_the_machine(where: str, watched: Watched, site: Site) -> None:
    watched.open(site.url + where)
    assert watched.trouble == []
    assert {urlsplit(url).netloc for url in watched.asked if not url.startswith("data:")} == {urlsplit(site.url).netloc}


def test_names_are_text_and_never_html(watched: Watched, site: Site) -> None:
    of_user = f"/usage/requests?{urlencode({'key_name': HOSTILE})}"
    pages = ("/usage/bill", "/usage/server_changes", "/usage/server_events", of_user)
    for where in (*[f"/-/dashboards/{board}" for board in DASHBOARDS], *pages):
        page = watched.open(site.url + where)
        assert page.locator("img").count() == 0
    assert watched.trouble == []


def test_filters_by_user_model_and_dates(watched: Watched, site: Site) -> None:
    page = watched.open(f"{site.url}/-/dashboards/usage")
    assert page.locator("#period").input_value() == "30 days"
    first = start_of(60)
    page.select_option("#user", "alice")
    page.select_option("#model", "qwen3-8b")
    page.fill("#from", first)
    page.fill("#to", start_of(10))
    page.click("input[type=submit]")
    page.wait_for_selector("#chart-requests p")
    expected = site.direct(
        "select count(*) from requests where key_name = 'alice' and served_model = 'qwen3-8b' and outcome != 'open' "
        "and substr(started_at, 1, 10) between ? and ?",
        first,
        start_of(10),
    )
    assert expected > 0
    assert page.locator("#chart-requests").inner_text() == f"{expected:,}"
    assert page.locator("#user").input_value() == "alice"


@pytest.mark.parametrize("name", STATEMENTS)
def test_every_statement_runs_over_few_and_over_no_rows(name: str, site: Site, empty_site: Site) -> None:
    given = dict.fromkeys(re.findall(r":([a-z]+)\b", STATEMENTS[name]), "")
    assert isinstance(empty_site.rows(STATEMENTS[name], **given), list)
    given |= {"period": "90 days", "days": "90", "user": "alice" if name == "user_by_day" else ""}
    assert site.rows(STATEMENTS[name], **given)


FILTERS: list[dict[str, str]] = [{}, {"period": "30 days"}, {"user": "alice", "period": "90 days"}, {"server": "gpu-2"}]


@pytest.mark.parametrize("given", FILTERS, ids=str)
def test_figures_are_the_sums_of_the_requests(given: dict[str, str], site: Site) -> None:
    first = start_of(int(given["period"].split()[0])) if "period" in given else ""
    where = (
        "from requests where outcome != 'open' and started_at >= ? "
        "and (? = '' or key_name = ?) and (? = '' or server = ?)"
    )
    user, server = given.get("user", ""), given.get("server", "")
    bound = (first, user, user, server, server)
    tokens = site.direct(
        f"select sum(ifnull(prompt_tokens, 0) + ifnull(completion_tokens, 0)) {where} and not {COUNTED_ONLY}", *bound
    )
    requests = site.direct(f"select count(*) {where}", *bound)
    for name in ("tokens_by_model", "tokens_by_user"):
        assert sum(row["tokens"] for row in site.chart(f"usage/{name}", **given)) == tokens
    assert sum(row["requests"] for row in site.chart("usage/outcomes", **given)) == requests
    assert site.chart("usage/requests", **given)[0]["value"] == f"{requests:,}"
    assert sum(row["requests"] for row in site.chart("usage/problems", **given)) == site.direct(
        f"select count(*) {where} and outcome != 'ok'", *bound
    )
    share = site.direct(f"select sum(cached_tokens) * 100.0 / sum(prompt_tokens) {where}", *bound)
    assert site.chart("usage/cached", **given)[0]["value"] == f"{share:.1f} %"
    speed = (
        f"select sum(completion_tokens) * 1000 / sum(predicted_ms) {where} and predicted_ms > 0 and started_at like ?"
    )
    for row in site.chart("usage/speed", **given)[-3:]:
        if row["tokens_per_s"] is not None and (not server or row["server"] == server):
            wanted = site.direct(speed, first, user, user, row["server"], row["server"], row["day"] + "%")
            assert row["tokens_per_s"] == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("given", FILTERS, ids=str)
def test_costs_are_the_sums_of_the_requests(given: dict[str, str], site: Site) -> None:
    first = start_of(int(given["period"].split()[0])) if "period" in given else ""
    user, server = given.get("user", ""), given.get("server", "")
    where = "from requests where started_at >= ? and (? = '' or key_name = ?) and (? = '' or server = ?)"
    cost = site.direct(f"select sum(cost_micros) / 1e6 {where}", first, user, user, server, server)
    assert cost > 0
    # Two digits that matter, or more.
    assert float(site.chart("costs/cost", **given)[0]["value"]) == pytest.approx(cost, rel=0.051)
    for name in ("by_model", "by_user"):
        assert sum(row["cost"] for row in site.chart(f"costs/{name}", **given)) == pytest.approx(cost)
    today, month = (
        site.direct(f"select sum(cost_micros) / 1e6 {where}", since, user, user, server, server)
        for since in (start_of(1), f"{datetime.now(UTC):%Y-%m-01}")
    )
    for name, sum_ in (("today", today), ("month", month)):
        shown = site.chart(f"costs/{name}", **given)[0]["value"]
        assert shown == "–" if not sum_ else float(shown) == pytest.approx(sum_, rel=0.051)
    bill = site.rows(QUERIES["bill"]["sql"], month="")
    since = f"{datetime.now(UTC):%Y-%m-01}"
    billed = site.direct("select sum(cost_micros) / 1e6 from usage_daily where day >= ?", since)
    assert bill[-1]["cost"] == pytest.approx(billed, abs=0.005)


@pytest.mark.parametrize(
    ("micros", "tile", "billed"),
    [
        pytest.param(1, "0.000001", 0.000001, id="the smallest amount"),
        pytest.param(4_321, "0.0043", 0.004321, id="less than a cent"),
        pytest.param(1_234_567, "1.23", 1.23, id="more"),
    ],
)
def test_tiny_costs_are_seen(micros: int, tile: str, billed: float) -> None:
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    with closing(Database(memory=True)) as db:
        usage.apply(db)
        columns = [column.name for column in db.table("usage_daily").columns]
        used = {"day": day, "key_name": "a", "model": "m", "server": "s", "requests": 1, "cost_micros": micros}
        db.table("usage_daily").insert(dict.fromkeys(columns, 0) | used)
        everything = dict.fromkeys(("user", "model", "server", "month", "period", "from", "to"), "")
        for name in ("cost", "today", "month"):
            shown = list(
                db.query(METADATA["plugins"]["datasette-dashboards"]["costs"]["charts"][name]["query"], everything)
            )
            assert shown == [{"value": tile}]
        bill = list(db.query(QUERIES["bill"]["sql"], everything))
        assert [row["cost"] for row in bill] == [billed, billed]


def test_budgets_that_ran_out_are_counted_and_named(site: Site) -> None:
    names = {row["whose"] for row in site.rows(QUERIES["budget_events"]["sql"], days="90")}
    assert {"key agent-review", "key agent-docs"} <= names
    since = start_of(30)
    for state, share, name in (("used up to 80 %", 0.8, "warned"), ("used up", 1.0, "spent")):
        events = site.direct("select count(*) from limit_events where share = ? and at >= ?", share, since)
        shown = [row for row in site.chart("costs/budgets", period="30 days") if row["state"] == state]
        assert events == sum(row["events"] for row in shown) > 0
        assert site.chart(f"costs/{name}", period="30 days")[0]["value"] == f"{events:,}"
    key_id = site.direct("select key_id from usage_daily where key_name = 'agent-review' limit 1")
    events = site.direct("select count(*) from limit_events where scope = ?", f"key:{key_id}")
    assert sum(row["events"] for row in site.chart("costs/budgets", user="agent-review")) == events > 0


def test_percentiles_are_within_a_step_of_the_true_ones(site: Site) -> None:
    step = 10**0.1
    rows = [row for row in site.chart("usage/ttft", period="30 days") if row["seconds"] is not None]
    assert len(rows) > 40
    for row in rows:
        db = sqlite3.connect(f"file:{site.path}?mode=ro", uri=True)
        found = db.execute(
            "select ttft_ms from requests where ttft_ms is not null and started_at like ? order by 1",
            (row["day"] + "%",),
        ).fetchall()
        db.close()
        rank = {"p50": 0.5, "p95": 0.95}[row["percentile"]] * len(found)
        true_ms = found[max(0, -int(-rank // 1) - 1)][0]
        assert true_ms / step <= row["seconds"] * 1000 <= true_ms * step


def test_a_months_bill_adds_up(site: Site) -> None:
    month = f"{datetime.now(UTC):%Y-%m}"
    rows = site.rows(QUERIES["bill"]["sql"], month=month)
    tokens = site.direct(
        "select sum(ifnull(prompt_tokens, 0) + ifnull(completion_tokens, 0)) from requests "
        f"where outcome != 'open' and started_at like ? and not {COUNTED_ONLY}",
        month + "%",
    )
    assert rows[-1]["key_name"] == "(everyone)"
    assert rows[-1]["total_tokens"] == tokens == sum(row["total_tokens"] for row in rows[:-1])


LAST_48_HOURS = "started_at >= strftime('%Y-%m-%dT%H', 'now', '-47 hours')"


@pytest.mark.parametrize("given", [{}, {"server": "gpu-2"}, {"model": "qwen3-8b"}], ids=str)
def test_figures_of_the_servers_are_those_of_the_requests(given: dict[str, str], site: Site) -> None:
    where = f"from requests where {LAST_48_HOURS} and (? = '' or server = ?) and (? = '' or served_model = ?)"
    server, model = given.get("server", ""), given.get("model", "")
    bound = (server, server, model, model)

    def count(condition: str) -> int:
        found: int = site.direct(f"select count(*) {where} and {condition}", *bound)
        return found

    def chart(name: str) -> list[dict[str, Any]]:
        return [row for row in site.chart(f"servers/{name}", **given) if row["found"]]

    settled = count("outcome != 'open'")
    assert settled > 0
    assert site.chart("servers/requests", **given)[0]["value"] == f"{settled:,}"
    assert sum(row["requests"] for row in chart("by_server")) == settled
    assert site.chart("servers/retries", **given)[0]["value"] == f"{count('attempts > 1'):,}"
    assert site.chart("servers/fallbacks", **given)[0]["value"] == f"{count('fallback_from is not null'):,}"
    kinds = {"sent more than once": "attempts > 1", "for another model": "fallback_from is not null"}
    for kind, condition in kinds.items():
        assert sum(row["requests"] for row in chart("moved") if row["kind"] == kind) == count(condition)
    assert sum(row["requests"] for row in chart("routes")) == count("route is not null and server is not null")
    for row in chart("routes"):
        same = f"server = '{row['server'].replace(chr(39), chr(39) * 2)}' and route is not null"
        assert row["requests"] == count(f"{same} and route = '{row['route']}'")
        assert row["share"] == pytest.approx(row["requests"] / count(same))


def test_waits_are_the_true_ones(site: Site) -> None:
    rows = [row for row in site.chart("servers/wait") if row["seconds"] is not None]
    assert any(row["seconds"] for row in rows)
    with closing(sqlite3.connect(f"file:{site.path}?mode=ro", uri=True)) as db:
        for row in rows:
            found = db.execute(
                "select queue_ms from requests where started_at like ? and server is not null and outcome != 'open' "
                "order by 1",
                (row["hour"][:13] + "%",),
            ).fetchall()
            true_ms = found[-(-len(found) * int(row["percentile"][1:]) // 100) - 1][0]
            assert row["seconds"] == pytest.approx(true_ms / 1000 if true_ms >= 1 else 0, abs=0.0005)


def ago(minutes: float) -> str:
    return f"{datetime.now(UTC) - timedelta(minutes=minutes):%Y-%m-%dT%H:%M:%S.000Z}"


DAY = 24 * 60
# (minutes ago, server, state before, state, reason, worker): three workers, one after the other and side by side.
EVENTS: list[tuple[float, str, str, str, str | None, str]] = [
    (5 * DAY, "removed", "unknown", "up", None, "a"),
    (5 * DAY, "steady", "unknown", "up", None, "a"),
    (5 * DAY, "flaky", "unknown", "up", None, "a"),
    (3 * DAY, "flaky", "up", "down", "refuses connections", "a"),
    (90, "steady", "unknown", "up", None, "b"),
    (90, "flaky", "unknown", "down", "refuses connections", "b"),
    (90, "steady", "unknown", "up", None, "c"),
    (89, "flaky", "unknown", "down", "refuses connections", "c"),
    (60, "flaky", "down", "loading", "loads its model", "c"),
    (59, "flaky", "down", "loading", "loads its model", "b"),
    (58, "flaky", "loading", "up", "answers its probe again", "b"),
    (57, "flaky", "loading", "up", "answers its probe again", "c"),
    (30, "flaky", "up", "ejected", "answered with HTTP 502; left alone for 2 s", "b"),
]


@pytest.fixture
def eventful(tmp_path: Path) -> Iterator[Site]:
    path = new_db(tmp_path / "usage.db")
    with closing(sqlite3.connect(path)) as db, db:
        rows = [(ago(minutes), *others) for minutes, *others in EVENTS]
        sql = "insert into server_events (at, server, previous, state, reason, worker) values (?, ?, ?, ?, ?, ?)"
        db.executemany(sql, rows)
    with serve(path) as url:
        yield Site(url.rstrip("/"), path)


def minutes_ago(at: str) -> int:
    return round((datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds() / 60)


def test_the_servers_of_now_and_their_states(eventful: Site) -> None:
    """Those that the newest worker knows; a state lasts since the first worker saw it."""
    for board in ("servers", "now"):
        rows = eventful.chart(f"{board}/states")
        assert [(row["server"], row["state"], minutes_ago(row["at"]), row["lasts"]) for row in rows] == [
            ("flaky", "ejected", 30, "30 min"),
            ("steady", "up", 5 * DAY, "5 days"),
        ]
    assert eventful.chart("servers/up") == [{"value": "1 of 2"}]
    assert eventful.chart("servers/up", server="steady") == [{"value": "1 of 1"}]


# (minutes ago, server, status, outcome): what ended lately, and what does not count.
ENDED: list[tuple[float, str | None, int | None, str]] = [
    (1, "steady", 200, "ok"),
    (2, "steady", 400, "ok"),
    (3, "steady", None, "client_closed"),
    (4, "steady", 500, "error"),
    (5, "steady", 200, "upstream_cut"),
    (59, "steady", 502, "unreachable"),
    (61, "steady", 500, "error"),
    (1, "steady", None, "open"),
    (1, "flaky", 503, "ok"),
    (1, None, 503, "refused"),
]


def test_the_servers_of_now_and_their_errors(eventful: Site) -> None:
    """Of the last hour, by server."""
    assert [(row["requests"], row["errors"]) for row in eventful.chart("servers/states")] == [(0, 0), (0, 0)]
    with closing(sqlite3.connect(eventful.path)) as db, db:
        for number, (minutes, server, status, outcome) in enumerate(ENDED):
            given = {"id": str(number), "started_at": ago(minutes), "endpoint": "/x", "worker": "c"}
            row = dict.fromkeys(COLUMNS) | given | {"server": server, "status": status, "outcome": outcome}
            db.execute(INSERT, list(row.values()))
    try:
        rows = eventful.chart("servers/states")
        found = [(row["server"], row["running"], row["requests"], row["errors"]) for row in rows]
        assert found == [("flaky", 0, 1, 1), ("steady", 1, 6, 3)]
    finally:
        with closing(sqlite3.connect(eventful.path)) as db, db:
            db.execute("delete from requests")


CHANGES = [
    (30, "flaky", "up", "ejected"),
    (58, "flaky", "loading", "up"),
    (60, "flaky", "down", "loading"),
]


def test_what_several_workers_saw_is_shown_once(eventful: Site) -> None:
    rows = eventful.chart("servers/events")
    assert [(minutes_ago(row["at"]), row["server"], row["previous"], row["state"]) for row in rows] == CHANGES

    def changes(**given: str) -> list[tuple[int, str, str, str]]:
        rows = eventful.rows(QUERIES["server_changes"]["sql"], **{"days": "", "server": "", **given})
        return [(minutes_ago(row["at"]), row["server"], row["previous"], row["state"]) for row in rows]

    assert changes(days="1") == CHANGES
    assert changes(days="4", server="flaky") == [*CHANGES, (3 * DAY, "flaky", "up", "down")]
    assert changes(days="4", server="steady") == []
    assert changes(server="steady") == [(5 * DAY, "steady", "unknown", "up")]


def test_states_follow_one_another_in_the_timeline(eventful: Site) -> None:
    rows = eventful.chart("servers/timeline", server="flaky")
    spans = [(row["state"], minutes_ago(row["at"]), minutes_ago(row["until"])) for row in rows]
    assert sorted(spans, key=lambda span: -span[1]) == [
        ("down", 2 * DAY, 60),
        ("loading", 60, 58),
        ("up", 58, 30),
        ("ejected", 30, 0),
    ]
    assert rows[0]["state"] == "up"  # it is drawn first, under the others
    assert [row["server"] for row in eventful.chart("servers/timeline", server="removed")] == [""]


@pytest.mark.parametrize("name", [name for name in CHART_SQL if not name.startswith("usage/")])
def test_no_chart_of_the_last_48_hours_reads_all_requests(name: str, site: Site) -> None:
    given = dict.fromkeys(re.findall(r":([a-z]+)\b", CHART_SQL[name]), "")
    with closing(sqlite3.connect(f"file:{site.path}?mode=ro", uri=True)) as db:
        plan = [row[3] for row in db.execute(f"explain query plan {CHART_SQL[name]}", given)]
    tables = ("requests", "usage_hourly", "usage_daily")
    scans = [step for step in plan if re.match(rf"SCAN ({'|'.join(tables)})\b(?!.*requests_open)", step)]
    assert scans == []


def test_new_rows_of_a_running_writer_show_on_reload(tmp_path: Path) -> None:
    path = new_db(tmp_path / "usage.db")
    with serve(path) as url:
        site = Site(url.rstrip("/"), path)
        assert site.chart("usage/running") == [{"value": 0}]
        writer = Database(path)  # its journal is not checkpointed while it lives
        today = start_of(1)
        began = f"{today}T00:00:00.000Z"
        row = dict.fromkeys(COLUMNS) | {"id": "1", "started_at": began, "endpoint": "/x", "outcome": "open"}
        writer.conn.execute(INSERT, list(row.values()))
        writer.conn.commit()
        assert site.chart("usage/running") == [{"value": 1}]
        writer.execute("update requests set outcome = 'ok', key_name = 'alice', prompt_tokens = 5")
        writer.execute("create temp table bounds as select 1.0 as upto_ms")
        add_rollups(writer, today, f"{today}T24")
        writer.conn.commit()
        assert [site.chart(f"usage/{name}")[0]["value"] for name in ("running", "requests", "tokens")] == [0, "1", "5"]
        page = httpx.get(f"{site.url}/usage/requests")
        assert "alice" in page.text
        assert page.headers["cache-control"] == "no-cache"
        writer.close()


WRITES = [
    "delete from requests",
    "with a as (select 1) delete from requests",
    "with a as (select 1) update requests set outcome = 'ok' returning id",
    "with a as (select 1) insert into requests (id, started_at, endpoint, outcome) values (1, 2, 3, 4) returning id",
    "drop table requests",
    "attach '{folder}/keys.db' as keys",
    "vacuum into '{folder}/copy.db'",
    "pragma journal_mode = delete",
    "select * from pragma_journal_mode",
    "select load_extension('x')",
    "select readfile('{folder}/keys.db')",
    "select writefile('{folder}/copy.db', 'x')",
]


@pytest.mark.parametrize("sql", WRITES)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_can_be_written(sql: str, method: str, site: Site) -> None:
    before = site.direct("select count(*) || '/' || sum(outcome = 'ok') from requests")
    sql = sql.format(folder=site.path.parent)
    for where in ("/usage.json", "/usage", "/usage/requests", "/usage/bill"):
        answer = httpx.request(method, site.url + where, params={"sql": sql}, headers={"accept": "application/json"})
        if where.startswith("/usage.json") or (method == "POST"):
            assert answer.status_code >= 400
    assert site.direct("select count(*) || '/' || sum(outcome = 'ok') from requests") == before
    assert sorted(p.name for p in site.path.parent.iterdir() if not p.name.endswith(("-wal", "-shm"))) == ["usage.db"]


def test_no_canned_query_writes() -> None:
    assert [name for name, query in QUERIES.items() if query.get("write")] == []


@pytest.mark.parametrize(
    "where", ["/usage.db", "/keys", "/keys.db", "/_memory", "/_internal", "/-/static/../../../../keys.db"]
)
def test_only_usage_db_is_published(where: str, site: Site) -> None:
    keys = site.path.parent / "keys.db"
    keys.write_bytes(b"SQLite format 3\0")
    try:
        assert httpx.get(site.url + where).status_code in (403, 404)
        assert [db["name"] for db in httpx.get(f"{site.url}/-/databases.json").json()] == ["usage"]
    finally:
        keys.unlink()


def test_a_query_without_end_is_stopped(site: Site) -> None:
    sql = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"
    answer = httpx.get(f"{site.url}/usage.json", params={"sql": sql}, timeout=30)
    assert (answer.status_code, answer.json()["title"]) == (400, "SQL Interrupted")


def test_no_column_holds_a_key_or_its_hash(site: Site) -> None:
    columns = site.rows(
        "select c.name as col from sqlite_master m, pragma_table_info(m.name) c where m.type in ('table', 'view')"
    )
    assert {row["col"] for row in columns if re.search("key|hash|secret|token$", row["col"])} == {"key_id", "key_name"}


def test_every_column_is_described(site: Site) -> None:
    tables = METADATA["databases"]["usage"]["tables"]
    assert METADATA["license"]
    assert METADATA["source"]
    for table in {*TABLES, "usage_hourly", "usage_daily", "ttft_daily"} - {"running"}:
        columns = {row["name"] for row in site.rows(f"select name from pragma_table_info('{table}')")}
        assert set(tables[table]["columns"]) == columns
        assert set(tables[table].get("units", {})) <= columns
        assert set(tables[table]["facets"]) <= columns
        assert {column for column in columns if column.endswith("_ms")} <= set(tables[table].get("units", {}))


@pytest.mark.parametrize("board", DASHBOARDS)
def test_the_layout_names_every_chart_once(board: str) -> None:
    layout = DASHBOARDS[board]["layout"]
    assert {len(row) for row in layout} == {6}
    assert {name for row in layout for name in row} == set(DASHBOARDS[board]["charts"])
