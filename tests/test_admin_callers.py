"""The admin API and keys that are not of keys.db: they count, and are shown as far as they are known."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from conftest import StartProxy
from llama import LlamaServer
from proxy import Proxy

ADMIN_KEY = "admin-0123456789-abcdef"
CI, FILED = "a-key-of-the-config-file-0123456789", "a-key-of-another-file-0123456789"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture
def proxy(start_proxy: StartProxy, tiny: LlamaServer, tmp_path_factory: pytest.TempPathFactory) -> Proxy:
    others = tmp_path_factory.mktemp("keys") / "keys.json"
    others.write_text(f'[{{"name": "filed", "key": "{FILED}", "limits": {{"rpm": 7}}}}]')
    listed = [
        {"name": "ci", "key": CI, "team": "research", "limits": {"rpm": 5, "budgets": [{"per": "day", "tokens": 900}]}},
        {"name": "idle", "key": f"{CI}-2"},
    ]
    return start_proxy(
        [{"name": "gpu", "url": tiny.url, "models": ["tiny"]}],
        admin_key=ADMIN_KEY,
        auth={
            "sources": [
                {"type": "local"},
                {"type": "static", "name": "config", "keys": listed},
                {"type": "file", "path": str(others)},
            ]
        },
        teams={"research": {"tpm": 100_000}},
        prices={"models": {"priced-*": {"prompt": 1}}},
    )


@pytest.fixture
def admin(proxy: Proxy) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with httpx.Client(base_url=f"{proxy.url}/admin", headers=headers, timeout=60, trust_env=False) as client:
        yield client


def chat(proxy: Proxy, key: str) -> None:
    with proxy.client() as client:
        headers = {"Authorization": f"Bearer {key}"}
        client.post("/v1/chat/completions", json=BODY, headers=headers).raise_for_status()


def caller(source: str, name: str, **known: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(("team", "limits", "running", "requests", "tokens"))
    return {"source": source, "name": name, "declared": False, **unknown, **known}


def test_keys_of_other_sources_count(admin: httpx.Client, proxy: Proxy) -> None:
    local = proxy.create_key("alice")
    for key in (CI, CI, FILED, local.key):
        chat(proxy, key)
    rows = proxy.rows()
    tokens = {row["key_name"]: row["prompt_tokens"] + row["completion_tokens"] for row in rows}
    seen = admin.get("/overview").json()
    today = [(each["key_id"], each["key_name"], each["requests"], each["cost"]) for each in seen["today"]]
    assert sorted(today, key=str) == [
        (local.id, "alice", 1, None),
        (None, "ci", 2, None),
        (None, "filed", 1, None),
    ]
    total = sum(each["prompt_tokens"] + each["completion_tokens"] for each in seen["today"])
    assert total == sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)

    budget = {"per": "day", "tokens": 900, "money": None}
    expected = [
        caller(
            "config",
            "ci",
            declared=True,
            team="research",
            limits={"rpm": 5, "budgets": [budget]},
            running=0,
            requests=2,
            tokens=2 * tokens["ci"],
        ),
        caller("config", "idle", declared=True, limits={}),
        caller("file", "filed", running=0, requests=1, tokens=tokens["filed"]),
    ]
    assert seen["callers"] == admin.get("/limits").json()["callers"] == expected
    limits = [each for each in admin.get("/limits").json()["limits"] if each["scope"] == "key"]
    assert [(each["name"], each["limit"], each["allowed"], each["used"]) for each in limits] == [
        ("config/ci", "rpm", 5, 2)
    ]
    budgets = [each for each in admin.get("/budgets").json()["budgets"] if each["scope"] == "key"]
    assert [(each["name"], each["allowed"], each["used"]) for each in budgets] == [("config/ci", 900, 2 * tokens["ci"])]
    assert admin.get("/teams/research").json()["keys"] == ["config/ci"]


def test_a_key_that_is_renamed_is_one(admin: httpx.Client, proxy: Proxy) -> None:
    key = proxy.create_key("before")
    chat(proxy, key.key)
    admin.patch(f"/keys/{key.id}", json={"name": "z-after"}).raise_for_status()
    chat(proxy, key.key)
    today = admin.get("/overview").json()["today"]
    assert [(each["key_id"], each["key_name"], each["requests"]) for each in today] == [(key.id, "z-after", 2)]
