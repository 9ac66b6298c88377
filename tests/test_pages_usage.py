"""/usage as people see it: the real proxy, a real Chromium, on a desk and on a phone, with and without a mouse."""

import json
import random
import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect

from conftest import StartProxy
from llama import LlamaServer
from proxy import Key, Proxy
from visiting import DESKTOP, PHONE, visit

HOSTILE = '<img src="x" onerror="alert(1)">'
SIZES = pytest.mark.parametrize("size", [pytest.param(DESKTOP, id="desktop"), pytest.param(PHONE, id="phone")])
TODAY = datetime.now(UTC).date()
PRICES = {"currency": "EUR", "models": {"tiny": {"prompt": 100, "completion": 600}}}


def used(proxy: Proxy, key: Key, days_ago: int, model: str, requests: int, tokens: int, micros: int = 0) -> None:
    """Write a day of use into the books."""
    with closing(sqlite3.connect(proxy.usage_db, timeout=10)) as db, db:
        columns = [row[1] for row in db.execute("pragma table_info(usage_daily)")]
        row: dict[str, Any] = dict.fromkeys(columns, 0) | {
            "day": f"{TODAY - timedelta(days=days_ago)}",
            "key_id": key.id,
            "key_name": key.name,
            "model": model,
            "server": "gpu",
            "requests": requests,
            "prompt_tokens": tokens,
            "cached_tokens": tokens // 2,
            "cost_micros": micros,
        }
        db.execute(f"insert into usage_daily ({', '.join(row)}) values ({', '.join('?' * len(row))})", [*row.values()])


@pytest.fixture
def proxy(start_proxy: StartProxy, tiny: LlamaServer) -> Proxy:
    return start_proxy(
        [{"name": "gpu", "url": tiny.url, "models": ["tiny"]}],
        prices=PRICES,
        teams={"research": {"tpm": 100_000, "budgets": [{"per": "month", "tokens": 5_000_000}]}},
        limits={"models": {"tiny": {"concurrency": 4}}},
    )


@pytest.fixture
def alice(proxy: Proxy) -> Key:
    """Has used three models over a month, and has a limit, a budget and a team."""
    key = proxy.create_key("alice", "--rpm", "60", "--team", "research", "--budget", "day:money:2.5")
    chance = random.Random(7)
    for days_ago in range(1, 30):
        for model in ("qwen3-8b", "gpt-oss-120b", HOSTILE):
            used(proxy, key, days_ago, model, 10, chance.randint(1, 90_000), 1000)
    with proxy.client(key) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    return key


@SIZES
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_a_key_has_used(chromium: Browser, proxy: Proxy, alice: Key, size: tuple[int, int], scheme: Any) -> None:
    with visit(chromium, proxy, alice.key, size=size, color_scheme=scheme) as visitor:
        page = visitor.enter("/usage", alice.key)
        expect(page.locator("#use")).to_be_visible()
        expect(page.locator("#gate")).to_be_hidden()
        expect(page.locator("#whose")).to_have_text("alice · team research")
        visitor.is_tidy()
        models = page.locator("#models tbody th")
        assert sorted(models.all_text_contents()) == sorted(["qwen3-8b", "gpt-oss-120b", HOSTILE, "tiny"])
        # Bars: a day of three models each, and today's one.
        assert page.locator("#chart rect:not(.day)").count() == 29 * 3 + 1
        names = page.locator("#limit-list li, #budget-list li").locator("p b")
        assert names.all_text_contents() == [
            "Requests per minute",
            "Tokens per minute",
            "Requests at once",
            "Money per day",
            "Tokens per month",
        ]
        expect(page.locator("#limit-list li").first).to_contain_text("1 of 60 used · 59 left")
        expect(page.locator("#limit-list li").first).to_contain_text(re.compile("All of it is free again in [0-9]+ s"))
        expect(page.locator("#budget-list li").first).to_contain_text("€2.50 used")
        expect(page.locator("#budget-list li").last).to_contain_text("Resets in")
        assert alice.key not in page.content()
        assert page.input_value("#key") == ""
        assert page.evaluate("history.length") == 2  # about:blank, and the page
        assert visitor.asked == [f"{proxy.url}/usage", *visitor.asked[1:]]
        assert [url for url in visitor.asked[1:] if not url.startswith("data:")] == [f"{proxy.url}/v1/usage?days=31"]


def test_what_has_no_price_has_no_cost(chromium: Browser, proxy: Proxy) -> None:
    key = proxy.create_key("bob")
    used(proxy, key, 0, "tiny", 1, 10, 1)
    used(proxy, key, 0, "unpriced", 1, 10)
    with visit(chromium, proxy, key.key) as visitor:
        page = visitor.enter("/usage", key.key)
        models = page.locator("#models tbody tr")
        expect(models.filter(has_text="unpriced").locator("td").last).to_have_text("–")
        expect(models.filter(has_text="tiny").locator("td").last).to_have_text("€0.000001")
        expect(page.locator("#tiles")).to_contain_text("€0.000001")


def test_with_the_keyboard_alone(chromium: Browser, proxy: Proxy, alice: Key) -> None:
    with visit(chromium, proxy, alice.key) as visitor:
        page = visitor.page
        page.goto(f"{proxy.url}/usage")
        expect(page.locator("#key")).to_be_focused()
        assert visitor.focused() == "API key"
        page.keyboard.type(alice.key)
        page.keyboard.press("Tab")
        assert visitor.focused() == "Show my usage"
        page.keyboard.press("Enter")
        expect(page.locator("#use-title")).to_be_focused()
        expect(page.locator("#tiles dt").first).to_have_text("Tokens, 31 days")
        visitor.tab_to("Tokens")
        page.keyboard.press("ArrowRight")
        assert visitor.focused() == "Requests"
        expect(page.locator("#readout b")).to_contain_text("1 request")
        page.keyboard.press("ArrowRight")
        assert visitor.focused() == "Cost"
        expect(page.locator("#readout b")).to_contain_text("€")
        visitor.tab_to("31 days")
        page.keyboard.press("ArrowLeft")
        assert visitor.focused() == "7 days"
        expect(page.locator("#tiles dt").first).to_have_text("Tokens, 7 days")
        visitor.tab_to("Cost by day. Arrow keys choose a day.")
        slider = page.get_by_role("slider")
        expect(slider).to_have_attribute("aria-valuenow", "7")
        page.keyboard.press("ArrowLeft")
        expect(slider).to_have_attribute("aria-valuenow", "6")
        expect(slider).to_have_attribute("aria-valuetext", re.compile(r"€0\.003.*qwen3-8b €0\.001"))
        page.keyboard.press("Home")
        expect(slider).to_have_attribute("aria-valuenow", "1")
        visitor.tab_to("Day by day")
        page.keyboard.press("Enter")
        visitor.tab_to("Use by day and model")
        assert page.locator("#days tbody tr").count() == 6 * 3 + 1
        page.keyboard.press("Shift+Tab")
        for name in ("Sign out", "Refresh"):
            while visitor.focused() != name:
                page.keyboard.press("Shift+Tab")
        used(proxy, alice, 0, "a-new-model", 1, 1)
        page.keyboard.press("Enter")
        expect(page.locator("#models")).to_contain_text("a-new-model")
        assert visitor.focused() == "Refresh"
        visitor.tab_to("Sign out")
        page.keyboard.press("Enter")
        assert visitor.focused() == "API key"
        expect(page.locator("#use")).to_be_hidden()
        assert "qwen3" not in page.locator("main").inner_html()


def test_names_are_text_and_limits_may_be_none(chromium: Browser, start_proxy: StartProxy, tiny: LlamaServer) -> None:
    proxy = start_proxy([{"name": "gpu", "url": tiny.url, "models": ["tiny"]}])
    key = proxy.create_key(HOSTILE)
    used(proxy, key, 0, HOSTILE, 3, 300)
    with visit(chromium, proxy, key.key) as visitor:
        page = visitor.enter("/usage", key.key)
        expect(page.locator("#whose")).to_have_text(HOSTILE)
        expect(page.locator("#models tbody th")).to_have_text([HOSTILE])
        expect(page.locator("#readout")).to_contain_text(f"{HOSTILE} 300 tokens")
        expect(page.locator("#cost-choice")).to_be_hidden()
        expect(page.locator("#no-limits")).to_be_visible()
        expect(page.locator("#no-budgets")).to_be_visible()


def test_the_policy_is_the_browsers(chromium: Browser, proxy: Proxy, alice: Key) -> None:
    """Nothing can be made markup, asked elsewhere or loaded, whatever got into the page."""
    visitor = chromium.new_context()
    try:
        page = visitor.new_page()
        page.goto(f"{proxy.url}/usage")
        tries = {
            "markup": "document.body.innerHTML = '<b>x</b>'",
            "script": "document.createElement('script').text = '1'",
        }
        for name, code in tries.items():
            refused = page.evaluate(f"() => {{ try {{ {code}; return null }} catch (error) {{ return error.name }} }}")
            assert refused == "TypeError", name
        away = "fetch('http://127.0.0.1:1/').then(() => 'sent', (error) => error.name)"
        with page.expect_event("console", lambda said: "Content Security Policy" in said.text):
            assert page.evaluate(away) == "TypeError"
        framed = visitor.new_page()
        framed.goto(f"{proxy.url}/health")
        with framed.expect_event("framenavigated", lambda frame: frame.url == "chrome-error://chromewebdata/"):
            framed.evaluate("document.body.append(Object.assign(document.createElement('iframe'), {src: '/usage'}))")
    finally:
        visitor.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param("sk-nobody-knows-this-key", "This API key is not known here.", id="unknown"),
        pytest.param("a key with spaces", "This can't be a key", id="no key"),
        pytest.param("ключ", "This can't be a key", id="letters that no header holds"),
    ],
)
def test_keys_that_are_none(chromium: Browser, proxy: Proxy, given: str, message: str) -> None:
    with visit(chromium, proxy, may_fail=True) as visitor:
        page = visitor.enter("/usage", given)
        expect(page.get_by_role("alert").filter(has_text=message)).to_be_visible()
        expect(page.locator("#key")).to_be_focused()
        expect(page.locator("#key")).to_have_attribute("aria-invalid", "true")
        expect(page.locator("#use")).to_be_hidden()
        visitor.is_tidy()


def test_a_key_that_is_disabled_while_it_looks(chromium: Browser, proxy: Proxy, alice: Key) -> None:
    with visit(chromium, proxy, alice.key, may_fail=True) as visitor:
        page = visitor.enter("/usage", alice.key)
        expect(page.locator("#models")).to_contain_text("qwen3-8b")
        proxy.keys("disable", "alice")
        page.get_by_role("button", name="Refresh").click()
        expect(page.locator("#gate-alert")).to_contain_text("is disabled")
        expect(page.locator("#use")).to_be_hidden()
        assert "qwen3" not in page.locator("main").inner_html()
        page.keyboard.type(alice.key)
        page.keyboard.press("Enter")
        expect(page.locator("#gate-alert")).to_contain_text("is disabled")


def answer_with(status: int, message: str) -> Any:
    error = json.dumps({"error": {"message": message, "code": "x", "param": None, "type": "x"}})
    return lambda route: route.fulfill(status=status, body=error, headers={"retry-after": "5"})


def cut(route: Route) -> None:
    route.abort()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(answer_with(503, "Use can't be read."), "Use can't be read. Try again in 5 s.", id="503"),
        pytest.param(answer_with(502, "A\u202e<b>"), "A\u202e<b>", id="text is text"),
        pytest.param(lambda route: route.fulfill(status=502, body="<h1>"), "The server answered 502.", id="no JSON"),
        pytest.param(cut, "The server can't be reached.", id="network"),
    ],
)
def test_faults_leave_what_is_shown(chromium: Browser, proxy: Proxy, alice: Key, fault: Any, message: str) -> None:
    with visit(chromium, proxy, alice.key, may_fail=True) as visitor:
        page = visitor.enter("/usage", alice.key)
        expect(page.locator("#models")).to_contain_text("qwen3-8b")
        page.route("**/v1/usage*", fault)
        page.get_by_role("button", name="Refresh").click()
        expect(page.locator("#alert")).to_contain_text(message)
        expect(page.locator("#models")).to_contain_text("qwen3-8b")
        page.unroute_all()
        page.get_by_role("button", name="Refresh").click()
        expect(page.locator("#alert")).to_be_hidden()


def test_the_way_back_shows_nothing(chromium: Browser, proxy: Proxy, alice: Key) -> None:
    with visit(chromium, proxy, alice.key) as visitor:
        page = visitor.enter("/usage", alice.key)
        expect(page.locator("#models")).to_contain_text("qwen3-8b")
        page.goto("about:blank")
        page.go_back()
        expect(page.locator("#gate")).to_be_visible()
        assert "qwen3" not in page.locator("main").inner_html()
        assert page.input_value("#key") == ""
