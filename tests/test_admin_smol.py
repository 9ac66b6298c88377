"""smol-llm-proxy's documented admin session, and its test client's calls, against this gateway: nothing is changed.

The commands are those of its README (version 0.4.3), run by bash and curl as they stand there; only the address is this
proxy's. https://github.com/robolamp/smol-llm-proxy
"""

import json
import os
import shutil
import subprocess
import time
from typing import Any

import httpx
import pytest

from conftest import StartProxy
from llama import LlamaServer
from proxy import Proxy

ADMIN_KEY = "test-admin-key"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}

CREATE_KEY = """\
curl -X POST http://localhost:8000/admin/keys \\
  -H "Authorization: Bearer $ADMIN_KEY" \\
  -d '{"name": "my-user"}'
"""
CHAT = """\
curl http://localhost:8000/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -H "Authorization: Bearer sk-<full-key-from-step-1>" \\
  -d '{
    "model": "Qwen3.5-2B",
    "messages": [{"role": "user", "content": "Hello!"}],
    "stream": true
  }'
"""
LIMITS = """\
curl -X PUT http://localhost:8000/admin/keys/1/limits \\
  -H "Authorization: Bearer $ADMIN_KEY" \\
  -d '{"rpm_limit": 200, "tpm_limit": 100000}'
"""
ASSIGN = """\
curl -X POST http://localhost:8000/admin/servers/2/models \\
  -H "Authorization: Bearer $ADMIN_KEY" \\
  -d '{"model_name": "qwen3-30b-a3b-instruct.gguf"}'
"""
REASSIGN = """\
curl -X POST "http://localhost:8000/admin/servers/2/models?reassign=true" \\
  -H "Authorization: Bearer $ADMIN_KEY" \\
  -d '{"model_name": "qwen3-30b-a3b-instruct.gguf"}'
"""
RETARGET = """\
curl -X PATCH http://localhost:8000/admin/aliases/fast \\
  -H "Authorization: Bearer $ADMIN_KEY" \\
  -H "Content-Type: application/json" \\
  -d '{"real_model_name": "new-model.gguf"}'
"""
USAGE = """\
curl "http://localhost:8000/admin/usage?key_id=1&start_date=2024-01-01T00:00:00&end_date=2024-01-31T23:59:59" \\
  -H "Authorization: Bearer $ADMIN_KEY"
"""
USAGE_BY_MODEL = """\
curl "http://localhost:8000/admin/usage/summary/real?key_id=1&start_date=2024-01-01T00:00:00\
&end_date=2024-01-31T23:59:59" \\
  -H "Authorization: Bearer $ADMIN_KEY"
"""


@pytest.fixture
def proxy(start_proxy: StartProxy) -> Proxy:
    """As its README begins: no servers yet."""
    return start_proxy([], admin_key=ADMIN_KEY)


@pytest.fixture
def client(proxy: Proxy) -> httpx.Client:
    return httpx.Client(base_url=proxy.url, timeout=30, trust_env=False)


def run(proxy: Proxy, command: str) -> str:
    """What a command of the README prints."""
    if not shutil.which("curl"):
        message = "no curl: install it (apt install curl) to run smol-llm-proxy's documented commands"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    here = command.replace("http://localhost:8000", proxy.url).replace("curl ", "curl -sS --noproxy '*' ", 1)
    env = {**os.environ, "ADMIN_KEY": ADMIN_KEY}
    done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, env=env, timeout=60, check=True)
    return done.stdout


def test_the_documented_session(proxy: Proxy, client: httpx.Client, tiny: LlamaServer) -> None:
    made = [
        client.post("/admin/servers", headers=ADMIN, json=body).json()
        for body in (
            {"name": "server-a", "url": tiny.url},
            {"name": "server-b", "url": "http://127.0.0.1:9"},
        )
    ]
    assert made == [{"ok": True, "id": 1}, {"ok": True, "id": 2}]
    for model in ("tiny", "qwen3-30b-a3b-instruct.gguf"):
        assert client.post("/admin/servers/1/models", headers=ADMIN, json={"model_name": model}).json() == {"ok": True}
    alias = {"alias_name": "Qwen3.5-2B", "real_model_name": "tiny"}
    assert client.post("/admin/aliases", headers=ADMIN, json=alias).json() == {"ok": True}
    alias = {"alias_name": "fast", "real_model_name": "tiny"}
    assert client.post("/admin/aliases", headers=ADMIN, json=alias).json() == {"ok": True}

    key = json.loads(run(proxy, CREATE_KEY))
    assert key.keys() == {"ok", "id", "key", "name"}
    assert (key["ok"], key["id"], key["name"], key["key"][:3]) == (True, 1, "my-user", "sk-")
    stream = run(proxy, CHAT.replace("sk-<full-key-from-step-1>", key["key"]))
    assert stream.startswith("data: {") and stream.endswith("data: [DONE]\n\n")
    limits = json.loads(run(proxy, LIMITS))
    expected = {"id": 1, "name": "my-user", "active": 1, "rpm_limit": 200, "tpm_limit": 100000}
    assert expected.items() <= limits.items()
    assert json.loads(run(proxy, ASSIGN))["detail"] == (
        "Model 'qwen3-30b-a3b-instruct.gguf' already assigned to server 'server-a' (id=1). Use ?reassign=true to move."
    )
    assert json.loads(run(proxy, REASSIGN)) == {"ok": True}
    assert json.loads(run(proxy, RETARGET))["ok"] is True
    assert json.loads(run(proxy, USAGE)) == {"logs": [], "summary": [], "total": 0}
    assert json.loads(run(proxy, USAGE_BY_MODEL)) == []

    (row,) = proxy.wait_rows(1)
    usage = json.loads(run(proxy, USAGE.replace("end_date=2024", "end_date=2999")))
    (log,) = usage["logs"]
    expected = {
        "id": row["id"],
        "key_id": 1,
        "server_id": 1,
        "model_name": "Qwen3.5-2B",
        "real_model_name": "tiny",
        "prompt_tokens": row["prompt_tokens"],
        "completion_tokens": row["completion_tokens"],
        "total_tokens": row["prompt_tokens"] + row["completion_tokens"],
        "prompt_ms": row["prompt_ms"],
        "predicted_ms": row["predicted_ms"],
        "created_at": row["started_at"],
        "user_name": "my-user",
        "server_name": "server-a",
    }
    assert expected.items() <= log.items()
    assert usage["total"] == 1
    (group,) = usage["summary"]
    expected = {
        "key_name": "my-user",
        "model_name": "Qwen3.5-2B",
        "real_model_name": "tiny",
        "request_count": 1,
        "total_prompt_tokens": row["prompt_tokens"],
        "total_completion_tokens": row["completion_tokens"],
        "total_all_tokens": log["total_tokens"],
    }
    assert expected.items() <= group.items()


SMOL_KEY = {"id", "name", "active", "rpm_limit", "tpm_limit", "created_at"}
SMOL_SERVER = {"id", "name", "url", "api_key", "active"}
SMOL_ALIAS = {"id", "alias_name", "real_model_name"}


def call(client: httpx.Client, method: str, path: str, body: Any = None, **more: Any) -> httpx.Response:
    return client.request(method, path, headers=ADMIN, **({} if body is None else {"json": body}), **more)


def test_servers(client: httpx.Client) -> None:
    """Its TestAdminServers, TestAdminModels."""
    made = call(client, "POST", "/admin/servers", {"name": "srv", "url": "http://127.0.0.1:8080"})
    assert made.status_code == 200
    sid = made.json()["id"]
    assert call(client, "POST", "/admin/servers", {"name": "srv", "url": "http://127.0.0.1:9090"}).status_code == 409
    assert call(client, "PATCH", f"/admin/servers/{sid}", {"url": "http://127.0.0.1:9090"}).json() == {"ok": True}
    assert call(client, "PATCH", f"/admin/servers/{sid}", {"active": False}).json() == {"ok": True}
    (shown,) = call(client, "GET", "/admin/servers").json()
    assert shown.keys() >= SMOL_SERVER
    assert (shown["url"], shown["active"]) == ("http://127.0.0.1:9090", 0)
    model = f"model-{sid}.gguf"
    assert call(client, "POST", f"/admin/servers/{sid}/models", {"model_name": model}).status_code == 200
    assert call(client, "DELETE", f"/admin/servers/{sid}/models/{model}").status_code == 200
    assert call(client, "DELETE", f"/admin/servers/{sid}").json() == {"ok": True}
    assert call(client, "DELETE", "/admin/servers/99999").status_code == 404
    missing = call(client, "PATCH", "/admin/servers/99999", {"url": "http://127.0.0.1:9090"})
    assert (missing.status_code, missing.json()["detail"]) == (404, "Server not found")


def test_keys(client: httpx.Client) -> None:
    """Its TestAdminKeys, TestAuth, test_rate_limit_admin_update."""
    made = call(client, "POST", "/admin/keys", {"name": "test-user"})
    assert made.status_code == 200
    keys = call(client, "GET", "/admin/keys").json()
    assert keys[0].keys() >= SMOL_KEY
    key_id = next(key for key in keys if key["name"] == "test-user")["id"]
    off = call(client, "PATCH", f"/admin/keys/{key_id}/toggle", {"active": False}).json()
    assert (off.keys(), off["active"]) == ({"id", "name", "active", "created_at"}, 0)
    user = {"Authorization": f"Bearer {made.json()['key']}"}
    assert client.get("/v1/models", headers=user).status_code == 403
    assert call(client, "PATCH", f"/admin/keys/{key_id}/toggle", {"active": True}).json()["active"] == 1
    assert client.get("/v1/models", headers=user).status_code == 200
    limits = call(client, "PUT", f"/admin/keys/{key_id}/limits", {"rpm_limit": 200, "tpm_limit": 100000})
    assert (limits.status_code, limits.json()["rpm_limit"], limits.json()["tpm_limit"]) == (200, 200, 100000)
    for wrong in ({"rpm_limit": -1}, {"rpm_limit": "many"}, {"tpm_limit": True}, {"tpm_limit": 1.5}):
        assert call(client, "PUT", f"/admin/keys/{key_id}/limits", wrong).status_code == 400
    assert call(client, "PUT", "/admin/keys/99999/limits", {"rpm_limit": 1}).status_code == 404
    assert call(client, "PATCH", "/admin/keys/99999/toggle", {"active": True}).status_code == 404
    assert call(client, "DELETE", f"/admin/keys/{key_id}").json() == {"ok": True}
    assert call(client, "DELETE", f"/admin/keys/{key_id}").json()["detail"] == "Key not found"
    assert client.get("/v1/models", headers=user).status_code == 401


def test_the_admin_key(client: httpx.Client) -> None:
    """Its TestAdminAuth."""
    assert client.get("/admin/keys").status_code == 401
    assert client.get("/admin/keys", headers={"Authorization": "Bearer wrong-key"}).status_code == 403


def test_aliases(client: httpx.Client) -> None:
    """Its TestAdminAliases, and the calls of test_e2e_alias."""
    alias = {"alias_name": "my-alias", "real_model_name": "some-model.gguf"}
    assert call(client, "POST", "/admin/aliases", alias).status_code == 200
    assert call(client, "POST", "/admin/aliases", {**alias, "real_model_name": "other.gguf"}).status_code == 409
    assert call(client, "POST", "/admin/aliases", {"alias_name": "partial"}).status_code == 400
    (shown,) = call(client, "GET", "/admin/aliases").json()
    assert shown.keys() >= SMOL_ALIAS
    assert (shown["alias_name"], shown["real_model_name"]) == ("my-alias", "some-model.gguf")
    assert call(client, "PATCH", "/admin/aliases/my-alias", {"real_model_name": "other.gguf"}).status_code == 200
    assert call(client, "PATCH", "/admin/aliases/nobody", {"real_model_name": "other.gguf"}).status_code == 404
    assert call(client, "PATCH", "/admin/aliases/my-alias", {}).status_code == 400
    assert call(client, "DELETE", "/admin/aliases/my-alias").json() == {"ok": True}
    assert call(client, "DELETE", "/admin/aliases/my-alias").json() == {"ok": True}


def test_reassignment(client: httpx.Client) -> None:
    """Its TestAdminReassignSemantics, and test_routing."""
    servers = [
        call(client, "POST", "/admin/servers", {"name": f"srv-{name}", "url": f"http://127.0.0.1:{port}"}).json()["id"]
        for name, port in (("a", 8080), ("b", 8081))
    ]
    a, b = (f"/admin/servers/{each}/models" for each in servers)
    model = {"model_name": "shared.gguf"}
    assert call(client, "POST", a, model).json() == {"ok": True}
    for query in ("", "?reassign=false", "?reassign="):
        refused = call(client, "POST", b + query, model)
        assert refused.status_code == 409
        assert "already assigned" in refused.json()["detail"].lower()
    assert call(client, "POST", a, model).json() == {"ok": True}
    assert call(client, "POST", f"{a}?reassign=true", model).json() == {"ok": True}
    assert call(client, "POST", f"{b}?reassign=true", model).json() == {"ok": True}
    shown = {each["name"]: each["models"] for each in call(client, "GET", "/admin/servers").json()}
    assert shown == {"srv-a": [], "srv-b": ["shared.gguf"]}


def test_usage(client: httpx.Client, proxy: Proxy, tiny: LlamaServer) -> None:
    """Its TestAdminUsageSummary, TestAdminUsageLogsLeftJoin and test_billing_attribution, with real requests."""
    sid = call(client, "POST", "/admin/servers", {"name": "gpu", "url": tiny.url}).json()["id"]
    call(client, "POST", f"/admin/servers/{sid}/models", {"model_name": "tiny"})
    call(client, "POST", "/admin/aliases", {"alias_name": "my-alias", "real_model_name": "tiny"})
    key = call(client, "POST", "/admin/keys", {"name": "billing-victim"}).json()
    ask = {"model": "my-alias", "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}
    user = {"Authorization": f"Bearer {key['key']}"}
    assert client.post("/v1/chat/completions", headers=user, json=ask).status_code == 200
    proxy.wait_rows(1)
    day = 86400
    past, future = (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + span)) for span in (-2 * day, day))
    dates = {"start_date": past, "end_date": future}
    assert [each["model_name"] for each in call(client, "GET", "/admin/usage", params=dates).json()["summary"]] == [
        "my-alias"
    ]
    assert call(client, "GET", "/admin/usage", params={"start_date": future}).json()["summary"] == []
    (real,) = call(client, "GET", "/admin/usage/summary/real").json()
    assert (real["real_model_name"], real["server_id"], real["request_count"]) == ("tiny", sid, 1)
    assert call(client, "DELETE", f"/admin/keys/{key['id']}").status_code == 200
    assert call(client, "DELETE", f"/admin/servers/{sid}").status_code == 200
    (log,) = call(client, "GET", "/admin/usage").json()["logs"]
    assert (log["user_name"], log["server_name"], log["server_id"]) == ("billing-victim", "gpu", None)


def test_restarts(client: httpx.Client, proxy: Proxy) -> None:
    """Its test_persistence, and test_config_sync: what the file no longer has, it no longer declares."""
    made = call(client, "POST", "/admin/servers", {"name": "kept", "url": "http://127.0.0.1:9"}).json()["id"]
    call(client, "POST", f"/admin/servers/{made}/models", {"model_name": "m1"})
    call(client, "POST", "/admin/aliases", {"alias_name": "a1", "real_model_name": "m1"})
    proxy.stop()
    proxy.write_config(servers=[{"name": "srv-a", "url": "http://127.0.0.1:8", "models": ["m2"]}])
    proxy.start()
    shown = {each["name"]: (each["declared"], each["models"]) for each in call(client, "GET", "/admin/servers").json()}
    assert shown == {"kept": (False, ["m1"]), "srv-a": (True, ["m2"])}
    assert [each["alias_name"] for each in call(client, "GET", "/admin/aliases").json()] == ["a1"]
