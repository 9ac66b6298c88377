"""/admin/ as its administrators see it: the real proxy, a real Chromium, on a desk and on a phone."""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from conftest import StartProxy
from llama import LlamaServer
from proxy import Key, Proxy, free_port
from upstream import STALL, Upstream, chunk, head
from visiting import DESKTOP, PHONE, Visitor, visit

ADMIN_KEY = "the-admin-key-of-these-tests-0123456789"
EVENT = 'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\n'
HOSTILE = '<img src="x" onerror="alert(1)">'
VIEWS = ("Overview", "Keys", "Teams", "Aliases", "Audit", "Config")
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


@pytest.fixture
def proxy(start_proxy: StartProxy, tiny: LlamaServer, upstream: Upstream) -> Proxy:
    return start_proxy(
        [
            {"name": "gpu-1", "url": tiny.url, "models": ["tiny"], "slots": 4},
            {"name": "gpu-2", "url": upstream.url, "models": ["endless"], "slots": 2},
            {"name": "gpu-3", "url": f"http://127.0.0.1:{free_port()}", "models": ["gone"]},
        ],
        aliases={"fast": "tiny"},
        admin_key=ADMIN_KEY,
        teams={"research": {"tpm": 100_000, "budgets": [{"per": "month", "tokens": 5_000_000}]}},
        limits={"all": {"rpm": 1000}, "models": {"endless": {"concurrency": 2}}},
        prices={"currency": "EUR", "models": {"*": {"prompt": 1000, "completion": 6000}}},
    )


@pytest.fixture
def alice(proxy: Proxy) -> Key:
    key = proxy.create_key("alice", "--rpm", "60", "--team", "research", "--budget", "day:money:2.5")
    with proxy.client(key) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    return key


def of_admin(proxy: Proxy, path: str) -> Any:
    with proxy.client() as client:
        return client.get(path, headers={"Authorization": f"Bearer {ADMIN_KEY}"}).json()


def enter(visitor: Visitor) -> Page:
    page = visitor.enter("/admin/", ADMIN_KEY)
    expect(page.locator("#servers tbody tr")).to_have_count(3)
    return page


def go_to(page: Page, view: str) -> None:
    page.get_by_role("navigation").get_by_role("button", name=view).click()


def row_of(page: Page, name: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name))


@contextmanager
def running(proxy: Proxy, key: Key, upstream: Upstream) -> Iterator[None]:
    """A request that goes on until the end."""
    begun = head(200, "content-type: text/event-stream", "transfer-encoding: chunked")
    upstream.plan((begun, chunk(EVENT), STALL), path="/v1/chat/completions")
    body = {**CHAT, "model": "endless", "stream": True}
    with proxy.client(key) as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()  # to be kept: without it, the answer is closed
        assert (answer.status_code, next(lines)) == (200, EVENT.strip())
        yield


@pytest.mark.parametrize("size", [pytest.param(DESKTOP, id="desktop"), pytest.param(PHONE, id="phone")])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_at_a_glance(
    chromium: Browser, proxy: Proxy, alice: Key, upstream: Upstream, size: tuple[int, int], scheme: Any
) -> None:
    proxy.create_key(HOSTILE, "--expires", "90d")
    with running(proxy, alice, upstream), visit(chromium, proxy, ADMIN_KEY, size=size, color_scheme=scheme) as visitor:
        page = enter(visitor)
        expect(page.locator("#tiles")).to_contain_text("Servers up2 of 3")
        expect(row_of(page, "gpu-1")).to_contain_text("up")
        expect(row_of(page, "gpu-2")).to_contain_text("1 of 2 slots")
        expect(row_of(page, "gpu-3")).to_contain_text("refuses connections")
        expect(page.locator("#running tbody tr")).to_have_count(1)
        expect(page.locator("#running tbody tr")).to_contain_text(re.compile("alice.*endless.*gpu-2.*/v1/chat/compl"))
        expect(page.locator("#shared-list li").filter(has_text="model endless")).to_contain_text("1 of 2 running")
        for view in VIEWS:
            go_to(page, view)
            expect(page.get_by_role("heading", level=2).locator("visible=true").first).to_be_visible()
            visitor.is_tidy()
        go_to(page, "Keys")
        expect(row_of(page, "alice")).to_contain_text(re.compile(r"tokens.*1 requests? · €0\.\d+"))
        expect(row_of(page, "alice")).to_contain_text("Requests per minute: 2 of 60")
        expect(row_of(page, "alice")).to_contain_text(re.compile(r"Money per day: €0\.\d+ of €2\.50"))
        expect(row_of(page, "alice")).to_contain_text("team research")
        expect(row_of(page, HOSTILE)).to_contain_text("UTC")
        page.get_by_role("button", name="New key").click()
        page.get_by_role("button", name="Add a budget").click()
        visitor.is_tidy()
        box = page.get_by_role("dialog").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= size[0]
        asked = {url.removeprefix(proxy.url).partition("?")[0] for url in visitor.asked if not url.startswith("data:")}
        assert asked == {"/admin/", "/admin/overview", "/admin/audit", "/admin/config"}
        assert ADMIN_KEY not in page.content()


def test_a_key_is_made_with_the_keyboard_alone(chromium: Browser, proxy: Proxy) -> None:
    with visit(chromium, proxy, ADMIN_KEY, permissions=["clipboard-read", "clipboard-write"]) as visitor:
        page = enter(visitor)
        keyboard = page.keyboard
        assert visitor.focused() == "Overview"
        visitor.tab_to("Keys")
        keyboard.press("Enter")
        visitor.tab_to("New key")
        keyboard.press("Enter")
        assert visitor.focused() == "Name"
        keyboard.type("bob")
        visitor.tab_to("Team")
        keyboard.type("res")
        visitor.tab_to("Models")
        keyboard.type("tiny\nqwen3-*")
        visitor.tab_to("Expires")
        keyboard.type("90d")
        visitor.tab_to("Requests per minute")
        keyboard.type("5")
        visitor.tab_to("Add a budget")
        keyboard.press("Enter")
        assert visitor.focused() == "Period"
        visitor.tab_to("Amount")
        keyboard.type("1000000")
        keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_contain_text("The key of bob")
        secret = page.input_value("#secret")
        assert visitor.focused() == "Copy"
        keyboard.press("Enter")
        expect(page.locator("#copied")).to_have_text("Copied.")
        assert page.evaluate("navigator.clipboard.readText()") == secret
        visitor.tab_to("Done")
        keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(page.locator("#secret")).to_have_value("")
        expect(row_of(page, "bob")).to_contain_text("team research")
        assert visitor.focused() == "New key"
        with proxy.client() as client:
            answer = client.post("/v1/chat/completions", json=CHAT, headers={"Authorization": f"Bearer {secret}"})
            assert answer.status_code == 200
    made = of_admin(proxy, "/admin/keys")[0]
    assert {name: made[name] for name in ("name", "team", "models", "limits", "endpoints", "priority", "weight")} == {
        "name": "bob",
        "team": "research",
        "models": ["tiny", "qwen3-*"],
        "limits": {"rpm": 5, "budgets": [{"per": "month", "tokens": 1_000_000, "money": None}]},
        "endpoints": [],
        "priority": "normal",
        "weight": 1,
    }
    assert made["expires_at"]
    files = [path for path in proxy.folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert (files, secret in "".join(visitor.asked)) == ([], False)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        pytest.param("Name", "  ", "name", id="no name"),
        pytest.param("Name", "alice", "already", id="a name that is taken"),
        pytest.param("Models", "/(/", "models[0]", id="a model that is no pattern"),
        pytest.param("Expires", "soon", "expires_at", id="a time that is none"),
        pytest.param("Networks", "10.0.0.0/99", "networks[0]", id="a network that is none"),
        pytest.param("Burst of requests", "5", "limits.burst", id="a burst of nothing"),
        pytest.param("Requests per minute", "-1", "greater than or equal", id="less than nothing"),
    ],
)
def test_what_is_wrong_is_told_at_its_field(
    chromium: Browser, proxy: Proxy, alice: Key, field: str, text: str, message: str
) -> None:
    with visit(chromium, proxy, ADMIN_KEY, may_fail=True) as visitor:
        page = enter(visitor)
        go_to(page, "Keys")
        page.get_by_role("button", name="New key").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Name", exact=True).fill("bob")
        dialog.locator("summary").click()
        dialog.get_by_label(field, exact=True).fill(text)
        dialog.get_by_role("button", name="Create key").click()
        expect(dialog.get_by_role("alert")).to_contain_text(message)
        expect(dialog.get_by_label(field, exact=True)).to_be_focused()
        expect(dialog.get_by_label(field, exact=True)).to_have_attribute("aria-invalid", "true")
        page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)
    assert [key["name"] for key in of_admin(proxy, "/admin/keys")] == ["alice"]


def test_a_key_is_changed_rotated_disabled_and_deleted(chromium: Browser, proxy: Proxy, alice: Key) -> None:
    def status(secret: str) -> int:
        with proxy.client() as client:
            return client.get("/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code

    with visit(chromium, proxy, ADMIN_KEY, alice.key, may_fail=True) as visitor:
        page = enter(visitor)
        go_to(page, "Keys")
        row, dialog = row_of(page, "alice"), page.get_by_role("dialog")

        row.get_by_role("button", name="Edit").click()
        expect(dialog.get_by_label("Requests per minute")).to_have_value("60")
        dialog.get_by_label("Requests per minute").fill("7")
        dialog.get_by_label("Amount").fill("3.5")
        dialog.get_by_role("button", name="Save").click()
        expect(row).to_contain_text("Requests per minute: 1 of 7")
        expect(row).to_contain_text("of €3.50")
        assert list(of_admin(proxy, "/admin/audit")["entries"][0]["detail"]) == ["limits"]

        row.get_by_role("button", name="Rotate").click()
        dialog.get_by_label("The old key ends").select_option("in an hour")
        dialog.get_by_role("button", name="Rotate key").click()
        expect(dialog).to_contain_text("The new key of alice")
        new = page.input_value("#secret")
        page.keyboard.press("Escape")
        expect(page.locator("#secret")).to_have_value("")
        expect(row).to_contain_text("old key until")
        assert (status(alice.key), status(new)) == (200, 200)

        row.get_by_role("button", name="Disable").click()
        expect(row).to_contain_text("disabled")
        assert status(new) == 403
        row.get_by_role("button", name="Enable").click()
        expect(row).to_contain_text("active")
        assert status(new) == 200

        row.get_by_role("button", name="Delete").click()
        expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
        page.keyboard.press("Enter")
        expect(row).to_have_count(1)
        row.get_by_role("button", name="Delete").click()
        dialog.get_by_role("button", name="Delete").click()
        expect(row).to_have_count(0)
        expect(page.locator("#no-keys")).to_be_visible()
        assert status(new) == 401
        go_to(page, "Audit")
        expect(page.locator("#audit-table tbody tr").first).to_contain_text("key alice")
        assert new not in page.content()


def test_what_comes_anew_disturbs_nobody(chromium: Browser, proxy: Proxy, alice: Key) -> None:
    with visit(chromium, proxy, ADMIN_KEY) as visitor:
        page = enter(visitor)
        go_to(page, "Keys")
        edit = row_of(page, "alice").get_by_role("button", name="Edit")
        edit.focus()
        proxy.create_key("bob")
        expect(row_of(page, "bob")).to_have_count(1)
        expect(edit).to_be_focused()
        edit.click()
        models = page.get_by_role("dialog").get_by_label("Models")
        models.fill("half of a na")
        models.evaluate("field => field.setSelectionRange(3, 5)")
        proxy.create_key("carol")
        expect(page.locator("#key-table tbody tr")).to_have_count(3)
        expect(models).to_be_focused()
        expect(models).to_have_value("half of a na")
        assert models.evaluate("field => [field.selectionStart, field.selectionEnd]") == [3, 5]
        page.keyboard.press("Escape")
        expect(edit).to_be_focused()
        page.get_by_label("Find keys").fill("ali")
        expect(page.locator("#key-table tbody tr")).to_have_count(1)
        proxy.create_key("alina")
        expect(page.locator("#key-table tbody tr")).to_have_count(2)
        expect(page.get_by_label("Find keys")).to_have_value("ali")
        expect(page.get_by_label("Find keys")).to_be_focused()


def test_live_check(chromium: Browser, proxy: Proxy) -> None:
    with visit(chromium, proxy, ADMIN_KEY) as visitor:
        page = enter(visitor)
        dialog = page.get_by_role("dialog")
        row_of(page, "gpu-1").get_by_role("button", name="Check").click()
        expect(dialog).to_contain_text("Live check of gpu-1")
        expect(dialog.get_by_role("status")).to_contain_text("All is well.", timeout=30_000)
        expect(dialog.locator("tbody tr")).to_have_text(re.compile(r"tinyanswers[\d,.]+ ms"))
        page.keyboard.press("Escape")
        row_of(page, "gpu-3").get_by_role("button", name="Check").click()
        expect(dialog.get_by_role("status")).to_contain_text("Something is wrong.", timeout=30_000)


def test_teams_and_aliases(chromium: Browser, proxy: Proxy, alice: Key) -> None:
    with visit(chromium, proxy, ADMIN_KEY, may_fail=True) as visitor:
        page = enter(visitor)
        dialog = page.get_by_role("dialog")
        go_to(page, "Teams")
        expect(row_of(page, "research")).to_contain_text("in the config file")
        expect(row_of(page, "research")).to_contain_text("alice")
        expect(row_of(page, "research").get_by_role("button")).to_have_count(0)
        page.get_by_role("button", name="New team").click()
        dialog.get_by_label("Name").fill("a/b ?#")
        dialog.get_by_label("Tokens per minute").fill("500")
        dialog.get_by_role("button", name="Create team").click()
        team = row_of(page, "a/b ?#")
        expect(team).to_contain_text("Tokens per minute: 0 of 500")
        team.get_by_role("button", name="Limits").click()
        dialog.get_by_label("Requests at once").fill("3")
        dialog.get_by_role("button", name="Save").click()
        expect(team).to_contain_text("Requests at once: 0 of 3")
        proxy.create_key("bob", "--team", "a/b ?#")
        expect(team).to_contain_text("bob")
        team.get_by_role("button", name="Delete").click()
        dialog.get_by_role("button", name="Delete").click()
        expect(dialog.get_by_role("alert")).to_contain_text("bob")
        proxy.keys("revoke", "bob")
        dialog.get_by_role("button", name="Delete").click()
        expect(team).to_have_count(0)

        go_to(page, "Aliases")
        expect(row_of(page, "fast").get_by_role("button")).to_have_count(0)
        page.get_by_role("button", name="New alias").click()
        dialog.get_by_label("Name that clients use").fill("gpt-*")
        dialog.get_by_label("Model that answers").fill("tiny")
        dialog.get_by_role("button", name="Create alias").click()
        expect(page.locator("#news")).to_have_text("The alias gpt-* is made.")
        with proxy.client(alice) as client:
            assert client.post("/v1/chat/completions", json={**CHAT, "model": "gpt-4o"}).status_code == 200
        row_of(page, "gpt-*").get_by_role("button", name="Delete").click()
        dialog.get_by_role("button", name="Delete").click()
        expect(row_of(page, "gpt-*")).to_have_count(0)


def test_names_are_text(chromium: Browser, proxy: Proxy) -> None:
    proxy.create_key(HOSTILE)
    with closing(sqlite3.connect(proxy.usage_db, timeout=10)) as db, db:
        db.execute(
            "insert into requests (id, started_at, endpoint, outcome, key_name, model, server, worker) "
            "values ('1', '2026-11-21T00:00:00.000Z', ?, 'open', ?, ?, ?, '')",
            [f"/v1/{HOSTILE}", HOSTILE, HOSTILE, HOSTILE],
        )
    with visit(chromium, proxy, ADMIN_KEY) as visitor:
        page = enter(visitor)
        expect(page.locator("#running tbody tr")).to_contain_text(f"/v1/{HOSTILE}")
        go_to(page, "Keys")
        row_of(page, HOSTILE).get_by_role("button", name="Edit").click()
        expect(page.get_by_role("dialog")).to_contain_text(f"Edit {HOSTILE}")
        page.keyboard.press("Escape")
        row_of(page, HOSTILE).get_by_role("button", name="Delete").click()
        expect(page.get_by_role("dialog")).to_contain_text(f"Delete the key {HOSTILE}?")
        page.keyboard.press("Escape")
        go_to(page, "Audit")
        expect(page.locator("#audit-table")).to_contain_text(HOSTILE)


def test_a_config_that_is_wrong(chromium: Browser, proxy: Proxy) -> None:
    with visit(chromium, proxy, ADMIN_KEY, may_fail=True) as visitor:
        page = enter(visitor)
        expect(page.locator("#config-alert")).to_be_hidden()
        proxy.write_config(max_body_mb="many")
        expect(page.locator("#config-alert")).to_contain_text("max_body_mb")
        go_to(page, "Config")
        expect(page.locator("#config-text")).to_contain_text('"name": "gpu-1"')
        page.get_by_role("button", name="Reload the file").click()
        expect(page.locator("#news")).to_have_text("The file is wrong: nothing has changed.")
        proxy.write_config(max_body_mb=50, drain_s=31)
        page.get_by_role("button", name="Reload the file").click()
        expect(page.locator("#news")).to_have_text("The config is read again.")
        expect(page.locator("#config-alert")).to_be_hidden()
        expect(page.locator("#config-text")).to_contain_text('"max_body_mb": 50')
        assert ADMIN_KEY not in page.content()


def test_another_admin_key_ends_the_visit(chromium: Browser, proxy: Proxy) -> None:
    with visit(chromium, proxy, ADMIN_KEY, may_fail=True) as visitor:
        page = enter(visitor)
        page.get_by_role("navigation").get_by_role("button", name="Keys").click()
        page.get_by_role("button", name="New key").click()
        proxy.write_config(admin_key="another-admin-key-0123456789")
        expect(page.locator("#gate-alert")).to_have_text("Invalid admin key")
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(page.locator("#key")).to_be_focused()
        assert page.locator("tbody tr").count() == 0
        page.keyboard.type("a-wrong-one")
        page.keyboard.press("Enter")
        expect(page.locator("#gate-alert")).to_have_text("Invalid admin key")
        expect(page.locator("#key")).to_have_attribute("aria-invalid", "true")


def test_a_gateway_that_is_away_for_a_while(chromium: Browser, proxy: Proxy, alice: Key) -> None:
    with visit(chromium, proxy, ADMIN_KEY, may_fail=True) as visitor:
        page = enter(visitor)
        go_to(page, "Keys")
        proxy.stop()
        expect(page.locator("#alert")).to_contain_text("The server can't be reached.")
        expect(row_of(page, "alice")).to_have_count(1)
        proxy.start()
        expect(page.locator("#alert")).to_be_hidden(timeout=15_000)


def test_signing_out_leaves_nothing(chromium: Browser, proxy: Proxy, alice: Key) -> None:
    with visit(chromium, proxy, ADMIN_KEY) as visitor:
        page = enter(visitor)
        for view in VIEWS:
            go_to(page, view)
        expect(page.locator("#config-text")).to_contain_text("gpu-1")
        page.get_by_role("button", name="Sign out").click()
        expect(page.locator("#key")).to_be_focused()
        text = page.locator("body").inner_text() + page.locator("main").inner_html()
        assert [word for word in ("alice", "gpu-1", "research", "fast", "tiny") if word in text] == []
        page.keyboard.type(ADMIN_KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#servers tbody tr")).to_have_count(3)
        expect(page.locator("#config")).to_be_hidden()


def test_without_an_admin_key_there_is_nothing(start_proxy: StartProxy, tiny: LlamaServer) -> None:
    proxy = start_proxy([{"name": "gpu", "url": tiny.url, "models": ["tiny"]}])
    with proxy.client() as client:
        assert [client.get(path).status_code for path in ("/admin", "/admin/", "/admin/overview")] == [404] * 3
        assert client.get("/usage").status_code == 200


def test_paths_lead_to_the_pages(proxy: Proxy) -> None:
    with proxy.client(follow_redirects=True) as client:
        assert client.get("/admin").url.path == "/admin/"
        assert client.get("/usage/").url.path == "/usage"
        head = client.head("/admin/")
        assert (head.status_code, head.content) == (200, b"")
        assert client.get("/admin/admin.js").status_code == 401
        assert client.get("/usage/usage.js").status_code == 401
