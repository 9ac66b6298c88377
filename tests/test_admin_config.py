"""GET /admin/config hides what must be hidden, wherever in the config it stands; a locked keys.db is a clear answer."""

import sqlite3
from contextlib import closing
from pathlib import Path

import httpx
import msgspec
import pytest

from conftest import StartProxy
from gateway.admin.config import masked
from gateway.config import parse
from gateway.secret import Secret

SECRET = "hush-0123456789-hush-abcdefghij"
FULL = f"""
admin_key: admin-{SECRET}
servers:
  - {{name: a, url: "http://h", api_key: server-{SECRET}}}
limits: {{storage: "redis://user:{SECRET}@redis:6379/0", key: {{rpm: 5}}}}
teams: {{lab: {{budgets: [{{per: day, money: 2.5}}]}}}}
auth:
  sources:
    - type: static
      keys: [{{name: ci, key: ci-{SECRET}}}, {{name: other, sha256: {"0123456789abcdef" * 4}}}]
    - {{type: sql, url: "postgresql://me:{SECRET}@db/keys?password={SECRET}", query: "select 1 where :sha256 = 'x'"}}
    - {{type: redis, url: "rediss://:{SECRET}@redis"}}
    - {{type: mongodb, url: "mongodb://me:{SECRET}@mongo"}}
    - {{type: webhook, url: "https://who/?token={SECRET}", api_key: hook-{SECRET}, headers: {{x-token: {SECRET}}}}}
"""


def test_no_secret_of_the_config_is_told(tmp_path: Path) -> None:
    told = msgspec.json.encode(masked(parse(FULL, tmp_path, {}))).decode()
    assert SECRET[5:] not in told
    assert "0123456789abcdef" not in told
    for shown in ("admin-h…ghij", "server-…ghij", '"rpm":5', '"type":"mongodb"', '"money":2.5', "rediss://…@redis"):
        assert shown in told


URLS = {
    "redis://redis:6379/0": "redis://redis:6379/0",
    "redis://:pass@redis:6379/0": "redis://…@redis:6379/0",
    "postgresql://u:p@ss/w?rd#x@db/keys": "postgresql://…@db/keys",
    "postgresql://db/keys?user=u&password=p": "postgresql://db/keys?…",
    "postgresql://u:p@db/keys?password=p": "postgresql://…@db/keys?…",
    "sqlite:///keys.db": "sqlite:///keys.db",
    "local": "local",
    "short": "…",
    "": "",
    "a-secret-of-more-than-twenty": "a-secre…enty",
}


@pytest.mark.parametrize("secret", URLS, ids=[url or "empty" for url in URLS])
def test_urls_keep_what_is_no_secret(secret: str) -> None:
    assert masked(Secret(secret)) == URLS[secret]


def test_a_locked_database_is_a_clear_answer(start_proxy: StartProxy) -> None:
    proxy = start_proxy([{"name": "a", "url": "http://127.0.0.1:9", "models": ["m"]}], admin_key="k" * 20)
    with (
        httpx.Client(
            base_url=f"{proxy.url}/admin", headers={"Authorization": "Bearer " + "k" * 20}, timeout=30
        ) as admin,
        closing(sqlite3.connect(proxy.folder / "data" / "keys.db", isolation_level=None)) as locked,
    ):
        assert admin.get("/servers").status_code == 200
        locked.execute("begin immediate")
        refused = admin.post("/keys", json={"name": "late"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert refused.json()["detail"] == "keys.db can't be used at the moment."
        assert admin.get("/keys").json() == []
        locked.execute("rollback")
        assert admin.post("/keys", json={"name": "late"}).status_code == 200
