"""/admin/: what is made and changed there besides keys and teams, and what is shown of keys that are made elsewhere."""

import re
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from conftest import StartProxy
from llama import LlamaServer
from proxy import Key, Proxy
from test_pages_admin import ADMIN_KEY, CHAT, go_to, of_admin, row_of
from upstream import Upstream, reply
from visiting import DESKTOP, PHONE, Visitor, visit

CI = "a-key-of-the-config-file-0123456789"
SIZES = pytest.mark.parametrize("size", [pytest.param(DESKTOP, id="desktop"), pytest.param(PHONE, id="phone")])


@pytest.fixture
def proxy(start_proxy: StartProxy, tiny: LlamaServer) -> Proxy:
    static = {"type": "static", "keys": [{"name": "ci", "key": CI, "team": "research", "limits": {"rpm": 5}}]}
    return start_proxy(
        [{"name": "gpu-1", "url": tiny.url, "models": ["tiny"], "slots": 4}],
        aliases={"fast": "tiny"},
        admin_key=ADMIN_KEY,
        auth={"sources": [{"type": "local"}, static]},
        teams={"research": {"tpm": 100_000}},
    )


def enter(visitor: Visitor) -> Page:
    page = visitor.enter("/admin/", ADMIN_KEY)
    expect(row_of(page, "gpu-1")).to_contain_text("up")
    return page


def made(proxy: Proxy) -> dict[str, Any]:
    (server,) = [each for each in of_admin(proxy, "/admin/servers") if not each["declared"]]
    return {name: server[name] for name in ("name", "url", "models", "slots", "weight", "active", "api_key")}


@SIZES
def test_servers(chromium: Browser, proxy: Proxy, upstream: Upstream, size: tuple[int, int]) -> None:
    upstream.always("/v1/models", lambda request: reply({"error": "what models?"}, status=404))
    key = "sk-of-the-server-0123456789"
    with visit(chromium, proxy, ADMIN_KEY, key, size=size, may_fail=True) as visitor:
        page = enter(visitor)
        dialog = page.get_by_role("dialog")
        declared = row_of(page, "gpu-1")
        expect(declared).to_contain_text("in the config file")
        expect(declared.get_by_role("button")).to_have_count(1)

        page.get_by_role("button", name="New server").click()
        visitor.is_tidy()
        dialog.get_by_label("Name").fill("gpu-1")
        dialog.get_by_label("URL").fill(upstream.url)
        dialog.get_by_label("API key").fill(key)
        dialog.get_by_role("button", name="Add server").click()
        expect(dialog.get_by_role("alert")).to_contain_text("already exists")
        expect(dialog.get_by_label("Name")).to_be_focused()
        dialog.get_by_label("Name").fill("mute")
        dialog.get_by_role("button", name="Add server").click()
        row = row_of(page, "mute")
        expect(row).to_contain_text("tells no models at /v1/models", timeout=15_000)
        visitor.is_tidy()

        row.get_by_role("button", name="Edit").click()
        expect(dialog.get_by_label("API key")).to_have_value("")
        dialog.get_by_label("Models").fill("m-1\nm-2")
        dialog.get_by_label("Slots").fill("2")
        dialog.get_by_role("button", name="Save").click()
        expect(row).to_contain_text("m-1, m-2")
        expect(row).to_contain_text("0 of 2 slots")
        facts = {"name": "mute", "url": upstream.url, "models": ["m-1", "m-2"], "slots": 2, "weight": 1}
        assert made(proxy) == {**facts, "active": 1, "api_key": "sk-of-t…6789"}

        row.get_by_role("button", name="Deactivate").click()
        expect(row).to_contain_text("inactive")
        assert made(proxy)["active"] == 0
        row.get_by_role("button", name=re.compile("^Activate")).click()
        expect(row).to_contain_text("up")
        row.get_by_role("button", name="Remove").click()
        dialog.get_by_role("button", name="Remove").click()
        expect(row).to_have_count(0)
        assert key not in page.content()


def test_a_server_is_added_with_the_keyboard_alone(chromium: Browser, proxy: Proxy, tiny: LlamaServer) -> None:
    with visit(chromium, proxy, ADMIN_KEY) as visitor:
        page = enter(visitor)
        visitor.tab_to("New server")
        page.keyboard.press("Enter")
        assert visitor.focused() == "Name"
        page.keyboard.type("gpu-2")
        visitor.tab_to("URL")
        page.keyboard.type(tiny.url)
        page.keyboard.press("Enter")
        expect(row_of(page, "gpu-2")).to_contain_text("up", timeout=15_000)
        expect(row_of(page, "gpu-2")).to_contain_text("tiny")
        assert visitor.focused() == "New server"


def test_an_alias_is_changed(chromium: Browser, proxy: Proxy, tiny: LlamaServer) -> None:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with proxy.client() as client:
        client.post("/admin/servers", headers=headers, json={"name": "b", "url": tiny.url, "models": ["other"]})
        client.post("/admin/aliases", headers=headers, json={"alias_name": "a/b *", "real_model_name": "tiny"})
    with visit(chromium, proxy, ADMIN_KEY) as visitor:
        page = enter(visitor)
        dialog = page.get_by_role("dialog")
        go_to(page, "Aliases")
        expect(row_of(page, "fast").get_by_role("button")).to_have_count(0)
        row_of(page, "a/b *").get_by_role("button", name="Edit").click()
        expect(dialog.get_by_label("Model that answers")).to_have_value("tiny")
        expect(dialog.get_by_label("Model that answers")).to_be_focused()
        dialog.get_by_label("Model that answers").fill("other")
        page.keyboard.press("Enter")
        expect(row_of(page, "a/b *")).to_contain_text("other")
        row_of(page, "a/b *").get_by_role("button", name="Edit").click()
        dialog.get_by_label("Model that answers").fill("nothing")
        dialog.get_by_role("button", name="Save").click()
        expect(page.locator("#news")).to_contain_text("It is kept, but not in use")
        page.get_by_role("button", name="New alias").click()
        expect(dialog.get_by_label("Name that clients use")).to_have_value("")
        expect(dialog.get_by_label("Name that clients use")).to_be_focused()


@SIZES
def test_keys_of_other_sources(chromium: Browser, proxy: Proxy, size: tuple[int, int]) -> None:
    proxy.create_key("alice")
    for name, key in (("ci", CI), ("bob", proxy.create_key("bob").key)):
        with proxy.client(Key(0, name, key)) as client:
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    with visit(chromium, proxy, ADMIN_KEY, size=size) as visitor:
        page = enter(visitor)
        expect(page.locator("#tiles")).to_contain_text("Requests today21 of 2 keys used today, 1 of other sources")
        go_to(page, "Keys")
        row = page.locator("#other-table tbody tr")
        expect(row).to_have_count(1)
        expect(row).to_contain_text(re.compile("ci.*source static, in the config file · team research.*1 requests"))
        expect(row).to_contain_text("Requests per minute: 1 of 5")
        expect(row.get_by_role("button")).to_have_count(0)
        expect(page.locator("#others")).to_contain_text("They are made, changed and limited where they stand")
        visitor.is_tidy()
        page.get_by_label("Find keys").fill("ali")
        expect(page.locator("#others")).to_be_hidden()
        go_to(page, "Teams")
        expect(row_of(page, "research")).to_contain_text("static/ci")


def test_a_warning_is_shown_with_the_key(chromium: Browser, proxy: Proxy) -> None:
    with visit(chromium, proxy, ADMIN_KEY) as visitor:
        page = enter(visitor)
        dialog = page.get_by_role("dialog")
        go_to(page, "Keys")
        page.get_by_role("button", name="New key").click()
        dialog.get_by_label("Name", exact=True).fill("bob")
        page.get_by_role("button", name="Add a budget").click()
        dialog.get_by_label("Unit").select_option("money")
        dialog.get_by_label("Amount").fill("2.5")
        dialog.get_by_role("button", name="Create key").click()
        expect(dialog).to_contain_text("But a budget of money stops nobody: the config has no prices")


def test_a_limit_is_taken_away(chromium: Browser, proxy: Proxy) -> None:
    proxy.create_key("alice", "--rpm", "60", "--tpm", "500")
    with visit(chromium, proxy, ADMIN_KEY) as visitor:
        page = enter(visitor)
        go_to(page, "Keys")
        row_of(page, "alice").get_by_role("button", name="Edit").click()
        page.get_by_role("dialog").get_by_label("Requests per minute").fill("")
        page.get_by_role("dialog").get_by_role("button", name="Save").click()
        expect(page.locator("#news")).to_have_text("The key alice is changed.")
        expect(row_of(page, "alice")).not_to_contain_text("Requests per minute")
    assert of_admin(proxy, "/admin/keys")[0]["limits"] == {"tpm": 500}
