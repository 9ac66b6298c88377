"""The admin API on the real proxy: who may, what is declared, what is told of secrets, and what is made is in use."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from conftest import StartProxy
from llama import LlamaServer
from proxy import Proxy
from upstream import STALL, Request, Steps, Upstream, reply, stream
from waiting import eventually

ADMIN_KEY = "admin-0123456789-abcdef"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
SERVER_KEY = "sk-declared-0123456789-upstream"
MADE_KEY = "sk-made-0123456789-of-a-server"
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture
def proxy(start_proxy: StartProxy, tiny: LlamaServer) -> Proxy:
    servers = [{"name": "declared", "url": tiny.url, "models": ["tiny"], "api_key": SERVER_KEY}]
    return start_proxy(
        servers,
        aliases={"fast": "tiny"},
        admin_key=ADMIN_KEY,
        teams={"declared": {"rpm": 100}},
        limits={"key": {"rpm": 60}},
    )


@pytest.fixture
def admin(proxy: Proxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{proxy.url}/admin", headers=ADMIN, timeout=60, trust_env=False) as client:
        yield client


def chat(proxy: Proxy, key: str, model: str = "tiny") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{proxy.url}/v1/chat/completions", headers=headers, json={"model": model, **ASK}, timeout=60)


WHO = {
    "nobody": ([], 401),
    "wrong": ([("Authorization", "Bearer admin-0123456789-abcdeg")], 403),
    "longer": ([("Authorization", f"Bearer {ADMIN_KEY}x")], 403),
    "shorter": ([("Authorization", f"Bearer {ADMIN_KEY[:-1]}")], 403),
    "empty": ([("Authorization", "Bearer")], 401),
    "basic": ([("Authorization", f"Basic {ADMIN_KEY}")], 401),
    "x-api-key": ([("x-api-key", ADMIN_KEY)], 401),
    "twice": ([("Authorization", f"Bearer {ADMIN_KEY}"), ("Authorization", "Bearer x")], 401),
    "right": ([("Authorization", f"Bearer {ADMIN_KEY}")], 200),
    "any-case": ([("authorization", f"bEARER  {ADMIN_KEY}")], 200),
}


def test_who_may(proxy: Proxy) -> None:
    user = proxy.create_key("user")
    found = {
        name: httpx.get(f"{proxy.url}/admin/keys", headers=headers).status_code for name, (headers, _) in WHO.items()
    }
    assert found == {name: status for name, (_, status) in WHO.items()}
    assert httpx.get(f"{proxy.url}/admin/keys", headers=user.headers).status_code == 403
    for path in ("/ADMIN/keys", "/admin;x/keys", "/%61dmin/keys", "//admin/keys", "/admin/nothing"):
        assert httpx.get(f"{proxy.url}{path}", headers=user.headers).status_code in (403, 404)
    assert proxy.rows() == []


def test_without_an_admin_key_there_is_none(start_proxy: StartProxy, tiny: LlamaServer) -> None:
    proxy = start_proxy([{"name": "a", "url": tiny.url}], env={"ADMIN_KEY": ""})
    for headers in ({}, ADMIN, {"Authorization": "Bearer"}):
        for method, path in (("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", "/admin/openapi.json")):
            assert httpx.request(method, f"{proxy.url}{path}", headers=headers).status_code == 404


def test_the_key_may_come_from_the_environment_and_all_servers_from_the_api(start_proxy: StartProxy) -> None:
    proxy = start_proxy([], env={"ADMIN_KEY": ADMIN_KEY})
    assert httpx.get(f"{proxy.url}/admin/servers", headers=ADMIN).json() == []
    assert httpx.get(f"{proxy.url}/health").json()["servers"]["total"] == 0
    key = httpx.post(f"{proxy.url}/admin/keys", headers=ADMIN).json()["key"]
    assert chat(proxy, key).status_code == 503
    assert "not all servers have been asked" not in proxy.log()


DECLARED: list[tuple[str, str, Any, str]] = [
    ("PATCH", "/servers/1", {"url": "http://h"}, "servers"),
    ("DELETE", "/servers/1", None, "servers"),
    ("POST", "/servers/1/models", {"model_name": "m"}, "servers"),
    ("DELETE", "/servers/1/models/tiny", None, "servers"),
    ("PATCH", "/aliases/fast", {"real_model_name": "m"}, "aliases"),
    ("DELETE", "/aliases/fast", None, "aliases"),
    ("PATCH", "/teams/declared", {"limits": {}}, "teams"),
    ("PUT", "/teams/declared/limits", {"rpm": 1}, "teams"),
    ("DELETE", "/teams/declared", None, "teams"),
]


def test_what_the_file_declares_is_marked_and_stays(admin: httpx.Client) -> None:
    shown = {path: admin.get(path).json() for path in ("/servers", "/aliases", "/teams")}
    assert all(len(each) == 1 and each[0]["declared"] is True for each in shown.values())
    for method, path, body, section in DECLARED:
        refused = admin.request(method, path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "declared"), path
        assert f"declared in the config file ({section})" in refused.json()["detail"]
    for path, body in (
        ("/servers", {"name": "declared", "url": "http://h"}),
        ("/aliases", {"alias_name": "fast", "real_model_name": "m"}),
        ("/teams", {"name": "declared"}),
    ):
        assert admin.post(path, json=body).status_code == 409
    assert {path: admin.get(path).json() for path in shown} == shown


def test_secrets_are_never_told(admin: httpx.Client, proxy: Proxy) -> None:
    made = admin.post("/servers", json={"name": "made", "url": "http://127.0.0.1:9", "api_key": MADE_KEY}).json()
    admin.patch(f"/servers/{made['id']}", json={"api_key": MADE_KEY + "2"})
    key = admin.post("/keys", json={"name": "alice"}).json()["key"]
    rotated = admin.post("/keys/1/rotate", json={"overlap_s": 60}).json()["key"]
    assert admin.post("/config/reload").status_code == 200
    paths = [path for path, each in admin.get("/openapi.json").json()["paths"].items() if "get" in each]
    texts = {
        path: admin.get(path.removeprefix("/admin").replace("{key_id}", "1").replace("{name}", "declared")).text
        for path in paths
    }
    texts["the log"] = proxy.log()
    secrets = {ADMIN_KEY, SERVER_KEY, MADE_KEY, MADE_KEY + "2", key, rotated}
    assert [(path, secret) for path, text in texts.items() for secret in secrets if secret[12:] in text] == []
    assert {each["name"]: each["api_key"] for each in admin.get("/servers").json()} == {
        "declared": "sk-decl…ream",
        "made": "sk-made…ver2",
    }
    assert "sk-decl…ream" in texts["/admin/config"]


FULL = {
    "name": "full",
    "models": ["tiny", "q*"],
    "endpoints": ["/v1/chat/completions"],
    "networks": ["127.0.0.0/8"],
    "expires_at": "2999-01-31T18:00:00Z",
    "not_before": "2020-01-01",
    "weight": 2.5,
    "priority": "high",
    "team": "declared",
    "limits": {"rpm": 5, "tpm": 1000, "budgets": [{"per": "day", "tokens": None, "money": 2.5}]},
}


def test_a_key_with_everything(admin: httpx.Client, proxy: Proxy) -> None:
    key = admin.post("/keys", json=FULL).json()["key"]
    shown = admin.get("/keys/1").json()
    assert shown == {
        **FULL,
        "id": 1,
        "active": 1,
        "rpm_limit": 5,
        "tpm_limit": 1000,
        "created_at": shown["created_at"],
        "hint": f"{key[:7]}…{key[-4:]}",
        "state": "active",
        "disabled": False,
        "expires_at": "2999-01-31T18:00:00.000Z",
        "not_before": "2020-01-01T00:00:00.000Z",
        "old_until": None,
    }
    assert chat(proxy, key).headers["x-ratelimit-limit-requests"] == "5"
    changed = admin.patch("/keys/1", json={"name": "renamed", "models": ["other"], "team": None, "expires_at": None})
    expected = {"name": "renamed", "models": ["other"], "team": None, "expires_at": None, "weight": 2.5}
    assert expected.items() <= changed.json().items()
    assert chat(proxy, key).status_code == 403


def test_limits_left_out_stay_and_null_takes_them_away(admin: httpx.Client) -> None:
    admin.post("/keys", json={"name": "a", "limits": {"rpm": 5, "budgets": [{"per": "day", "tokens": 9}]}})
    assert admin.put("/keys/1/limits", json={"rpm_limit": 7, "tpm_limit": 0}).json()["limits"] == {
        "rpm": 7,
        "tpm": 0,
        "budgets": [{"per": "day", "tokens": 9, "money": None}],
    }
    assert admin.put("/keys/1/limits", json={"rpm": None, "budgets": None}).json()["limits"] == {"tpm": 0}


def test_a_patch_of_limits_goes_field_by_field_too(admin: httpx.Client) -> None:
    budgets = [{"per": "day", "tokens": 9, "money": None}]
    for path, body in (("/keys", {"name": "a"}), ("/teams", {"name": "lab"})):
        one = {"/keys": "/keys/1", "/teams": "/teams/lab"}[path]
        admin.post(path, json={**body, "limits": {"rpm": 5, "tpm": 6, "budgets": budgets}}).raise_for_status()
        for change, left in (
            ({"rpm": 7}, {"rpm": 7, "tpm": 6, "budgets": budgets}),
            ({"tpm": None, "concurrency": 2}, {"rpm": 7, "concurrency": 2, "budgets": budgets}),
            ({"rpm_limit": 8}, {"rpm": 8, "concurrency": 2, "budgets": budgets}),
            ({}, {"rpm": 8, "concurrency": 2, "budgets": budgets}),
            ({"budgets": []}, {"rpm": 8, "concurrency": 2}),
            (None, {}),
        ):
            answer = admin.patch(one, json={"limits": change})
            assert answer.json()["limits"] == admin.get(one).json()["limits"] == left, (one, change)
    admin.patch("/keys/1", json={"limits": {"rpm": 1}})
    assert admin.patch("/keys/1", json={"weight": 2}).json()["limits"] == {"rpm": 1}


def test_the_document_tells_how_limits_change(admin: httpx.Client) -> None:
    document = admin.get("/openapi.json").json()
    schemas, paths = document["components"]["schemas"], document["paths"]
    for name in ("KeyChanges", "TeamChanges", "LimitChanges"):
        assert "left out" in schemas[name]["description"], name
    for path in ("/admin/keys/{key_id}", "/admin/teams/{name}"):
        assert "field by field" in paths[path]["patch"]["summary"]
        assert "field by field" in paths[f"{path}/limits"]["put"]["summary"]


def test_a_new_key_s_limits_under_either_name(admin: httpx.Client) -> None:
    def made(**given: Any) -> httpx.Response:
        return admin.post("/keys", json=given)

    made(name="a", rpm_limit=5, limits={"tpm": 7})
    assert admin.get("/keys/1").json()["limits"] == {"rpm": 5, "tpm": 7}
    made(name="b", tpm_limit=None, rpm_limit=0)
    assert admin.get("/keys/2").json()["limits"] == {"rpm": 0}
    refused = made(name="c", rpm_limit=5, limits={"rpm": 6})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "rpm")


MONEY = {"budgets": [{"per": "day", "money": 2.5}]}


def test_what_will_not_do_what_one_expects_is_told(admin: httpx.Client, start_proxy: StartProxy) -> None:
    def warned(method: str, path: str, **body: Any) -> str | None:
        answer = admin.request(method, path, json=body)
        assert answer.status_code == 200, answer.text
        warning: str | None = answer.json().get("warning")
        return warning

    assert warned("POST", "/keys", name="a", team="declared") is None
    assert warned("POST", "/teams", name="made") is None
    assert warned("POST", "/keys", name="b", team="made") is None
    nobody = "the team 'nobody' is neither in the config nor in keys.db: nothing limits it until it is made"
    assert warned("POST", "/keys", name="c", team="nobody") == nobody
    assert warned("PATCH", "/keys/1", team="nobody") == nobody
    free = "a budget of money stops nobody: the config has no prices, so nothing costs anything"
    assert warned("POST", "/keys", name="d", limits=MONEY) == free
    assert warned("PUT", "/keys/1/limits", **MONEY) == free
    assert warned("PATCH", "/teams/made", limits=MONEY) == free
    assert warned("POST", "/teams", name="rich", limits=MONEY) == free
    assert warned("PUT", "/teams/rich/limits", budgets=[{"per": "day", "tokens": 5}]) is None
    assert "warning" not in admin.get("/teams/made").json()


def test_a_key_that_no_source_looks_for(start_proxy: StartProxy, tiny: LlamaServer) -> None:
    source = {"type": "static", "keys": [{"name": "ci", "key": "a-key-of-the-config-file-0123456789"}]}
    prices = {"models": {"tiny": {"prompt": 1}}}
    servers = [{"name": "gpu", "url": tiny.url, "models": ["tiny"]}]
    proxy = start_proxy(servers, admin_key=ADMIN_KEY, auth={"sources": [source]}, prices=prices)
    made = httpx.post(f"{proxy.url}/admin/keys", headers=ADMIN, json={"limits": MONEY}).json()
    assert made["warning"] == "no key of keys.db holds: auth.sources in the config has no source of type local"
    assert chat(proxy, made["key"]).status_code == 401


def test_a_server_that_tells_no_models_has_a_problem(admin: httpx.Client, upstream: Upstream) -> None:
    upstream.always("/v1/models", lambda request: reply({"error": "what models?"}, status=404))
    made = admin.post("/servers", json={"name": "mute", "url": upstream.url}).json()["id"]

    def seen() -> tuple[str, str | None]:
        server = admin.get(f"/servers/{made}").json()
        return server["state"], server["problem"]

    told = "tells no models at /v1/models: list them in its `models`, or nothing is sent to it"
    eventually(lambda: seen() == ("up", told), "the server, up and with its problem")
    admin.patch(f"/servers/{made}", json={"models": ["m"]})
    eventually(lambda: seen() == ("up", None), "the server, up and well")


UNKNOWN = {
    "a-field": ("POST", "/keys", {"nmae": "a"}, "nmae: unknown field; did you mean 'name'? There are: name, models"),
    "below": ("PATCH", "/keys/1", {"limits": {"rpmm": 1}}, "limits.rpmm: unknown field; did you mean 'rpm'?"),
    "far": ("POST", "/teams", {"name": "a", "colour": 1}, "colour: unknown field; There are: name, limits"),
    "a-parameter": ("GET", "/usage?key=1", None, "key: unknown parameter; did you mean 'key_id'? There are: end_date"),
    "a-type": ("POST", "/keys", {"weight": "a"}, "weight: expected a number, got text"),
}


@pytest.mark.parametrize(("method", "path", "body", "said"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_wrong_is_told_in_words(admin: httpx.Client, method: str, path: str, body: Any, said: str) -> None:
    answer = admin.request(method, path, json=body)
    assert (answer.status_code, answer.json()["detail"][: len(said)]) == (400, said)


def test_a_rotated_key_holds_for_its_overlap(admin: httpx.Client, proxy: Proxy) -> None:
    old = admin.post("/keys", json={"name": "a"}).json()["key"]
    new = admin.post("/keys/1/rotate", json={"overlap_s": 600}).json()
    assert (new["old_until"] > admin.get("/keys/1").json()["created_at"], chat(proxy, old).status_code) == (True, 200)
    newest = admin.post("/keys/1/rotate").json()
    assert newest["old_until"] is None
    assert [chat(proxy, key).status_code for key in (old, new["key"], newest["key"])] == [401, 401, 200]


def test_names_are_not_given_twice(admin: httpx.Client) -> None:
    for path, body in (("/keys", {"name": "a"}), ("/teams", {"name": "a"})):
        assert [admin.post(path, json=body).status_code for _ in range(2)] == [200, 409]
    names = [admin.post("/keys").json()["name"] for _ in range(3)]
    assert names == ["unnamed", "unnamed-2", "unnamed-3"]


def test_a_team_s_limits_are_shared(admin: httpx.Client, proxy: Proxy) -> None:
    admin.post("/teams", json={"name": "lab", "limits": {"rpm": 2}})
    keys = [admin.post("/keys", json={"name": name, "team": "lab"}).json()["key"] for name in "ab"]
    assert [chat(proxy, key).status_code for key in (*keys, keys[0])] == [200, 200, 429]
    assert admin.delete("/teams/lab").status_code == 409  # it has keys
    (use,) = [
        each for each in admin.get("/limits").json()["limits"] if each["scope"] == "team" and each["name"] == "lab"
    ]
    assert (use["limit"], use["allowed"], use["used"], use["left"]) == ("rpm", 2, 2, 0)
    assert admin.put("/teams/lab/limits", json={"rpm": None}).json()["keys"] == ["a", "b"]
    assert chat(proxy, keys[0]).status_code == 200


def test_a_made_server_is_in_use_at_once(admin: httpx.Client, proxy: Proxy, think: LlamaServer) -> None:
    key = admin.post("/keys", json={"name": "a"}).json()["key"]
    assert chat(proxy, key, "think").status_code == 404
    made = admin.post("/servers", json={"name": "made", "url": think.url}).json()["id"]
    eventually(lambda: chat(proxy, key, "think").status_code == 200, "the model, asked from the server")
    admin.patch(f"/servers/{made}", json={"active": False})
    assert chat(proxy, key, "think").status_code == 404
    admin.patch(f"/servers/{made}", json={"active": True, "models": ["think"]})
    admin.post("/aliases", json={"alias_name": "th*", "real_model_name": "think"})
    assert chat(proxy, key, "thought").status_code == 200
    proxy.restart()
    assert chat(proxy, key, "thought").headers["x-llmproxy-server"] == "made"
    admin.delete(f"/servers/{made}")
    assert chat(proxy, key, "think").status_code == 404
    (alias,) = [each for each in admin.get("/aliases").json() if not each["declared"]]
    assert alias["problem"] == "'think' is no server's model"


def test_a_bad_file_is_reported_and_stops_no_change(admin: httpx.Client, proxy: Proxy) -> None:
    good = admin.post("/config/reload")
    assert (good.status_code, good.json()["ok"], good.json()["problem"]) == (200, True, None)
    proxy.write_config(weihgt=1)
    bad = admin.post("/config/reload")
    assert (bad.status_code, bad.json()["ok"], bad.json()["changed"]) == (400, False, [])
    assert "weihgt: unknown key" in bad.json()["problem"]
    made = admin.post("/servers", json={"name": "made", "url": "http://127.0.0.1:9", "models": ["m"]}).json()
    assert made == {"ok": True, "id": 2}
    assert [each["state"] is not None for each in admin.get("/servers").json()] == [True, True]
    assert admin.get("/overview").json()["config"]["problem"] == bad.json()["problem"]


def test_the_audit(admin: httpx.Client, proxy: Proxy) -> None:
    proxy.create_key("by-command")
    admin.post("/servers", json={"name": "made", "url": "http://127.0.0.1:9"})
    admin.patch("/keys/1/toggle", json={"active": False})
    page = admin.get("/audit", params={"limit": 2}).json()
    assert page["total"] == 3
    assert [(each["actor"], each["action"], each["kind"], each["name"]) for each in page["entries"]] == [
        ("admin API from 127.0.0.1", "disable", "key", "by-command"),
        ("admin API from 127.0.0.1", "create", "server", "made"),
    ]
    assert page["entries"][0]["detail"] == {"disabled": {"old": False, "new": True}}
    (first,) = admin.get("/audit", params={"offset": 2}).json()["entries"]
    assert (first["actor"].startswith("scripts/keys"), first["action"]) == (True, "create")


def test_the_live_check(admin: httpx.Client, proxy: Proxy, embeddings: LlamaServer) -> None:
    for name, url in (("embedder", embeddings.url), ("dead", "http://127.0.0.1:9")):
        admin.post("/servers", json={"name": name, "url": url})
    found = {each["name"]: admin.post(f"/servers/{each['id']}/check").json() for each in admin.get("/servers").json()}
    (model,) = found["declared"]["models"]
    told = {"model": "tiny", "endpoint": "/v1/chat/completions", "ok": True, "status": 200, "problem": None}
    assert told.items() <= model.items()
    assert {"ok": True, "type": "llama.cpp", "lists": ["tiny"], "problem": None}.items() <= found["declared"].items()
    assert [each["ok"] for each in found["embedder"]["models"]] == [True]
    assert {"ok": False, "problem": "refuses connections", "models": []}.items() <= found["dead"].items()
    assert min(each["latency_ms"] for each in (*found.values(), model)) > 0
    assert proxy.rows() == []


def scripted(request: Request) -> Steps:
    """Lists two models: `chats` is for chat only, `embeds` for embeddings only, `broken` for nothing."""
    if request.path == "/v1/models":
        return reply({"data": [{"id": "chats"}, {"id": "embeds"}, {"id": "broken"}]})
    wanted = {"/v1/chat/completions": "chats", "/v1/embeddings": "embeds"}.get(request.path)
    if wanted and request.json()["model"] == wanted:
        return reply({"choices": []})
    return reply({"error": "not me"}, status=501)


def test_a_live_check_asks_each_model_what_it_is_for(admin: httpx.Client, proxy: Proxy, upstream: Upstream) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/v1/embeddings"):
        upstream.always(path, scripted)
    server_id = admin.post("/servers", json={"name": "scripted", "url": upstream.url}).json()["id"]
    found = admin.post(f"/servers/{server_id}/check").json()
    assert [(each["model"], each["endpoint"], each["ok"], each["status"]) for each in found["models"]] == [
        ("chats", "/v1/chat/completions", True, 200),
        ("embeds", "/v1/embeddings", True, 200),
        ("broken", "/v1/chat/completions", False, 501),
    ]
    assert found["models"][2]["problem"] == 'answers /v1/chat/completions with HTTP 501: {"error": "not me"}'
    assert found["ok"] is False


def test_the_overview(admin: httpx.Client, proxy: Proxy, upstream: Upstream) -> None:
    begin = 'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
    upstream.plan((*stream(begin)[:-1], STALL))
    admin.post("/servers", json={"name": "long", "url": upstream.url, "models": ["long"], "slots": 3})
    key = admin.post("/keys", json={"name": "a", "limits": {"concurrency": 3}}).json()["key"]
    body = {**ASK, "model": "long", "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{proxy.url}/v1/chat/completions", headers=headers, json=body) as answer:
        lines = answer.iter_lines()  # which would close the stream, were it forgotten
        next(lines)
        eventually(lambda: admin.get("/overview").json()["running"], "the row of what runs")
        seen = admin.get("/overview").json()
    (running,) = seen["running"]
    assert (running["key_name"], running["served_model"], running["server"]) == ("a", "long", "long")
    servers = {each["name"]: each for each in seen["servers"]}
    assert {name: (each["running"], each["state"], each["declared"]) for name, each in servers.items()} == {
        "declared": (0, "up", True),
        "long": (1, "up", False),
    }
    assert (servers["long"]["slots"], servers["long"]["models"]) == (3, ["long"])
    of_key = {each["limit"]: (each["used"], each["held"]) for each in seen["limits"] if each["scope"] == "key"}
    assert of_key == {"concurrency": (0, 1), "rpm": (1, 0)}
    assert [each["name"] for each in seen["keys"]] == ["a"]
    assert [each["name"] for each in seen["teams"]] == ["declared"]
    assert [each["alias_name"] for each in seen["aliases"]] == ["fast"]
    assert seen["config"]["ok"] is True


def test_many_changes_at_once_are_all_kept(admin: httpx.Client, proxy: Proxy) -> None:
    made = admin.post("/servers", json={"name": "made", "url": "http://127.0.0.1:9"}).json()["id"]
    changes: list[tuple[str, str, dict[str, Any]]] = []
    for number in range(12):
        changes.append(("POST", f"/servers/{made}/models", {"model_name": f"m{number:02}"}))
        changes.append(("PATCH", f"/servers/{made}", {"weight": number + 1}))
        changes.append(("POST", "/keys", {"name": f"k{number:02}"}))
    with ThreadPoolExecutor(len(changes)) as pool:
        answers = list(pool.map(lambda change: admin.request(change[0], change[1], json=change[2]), changes))
    assert {answer.status_code for answer in answers} == {200}
    (server,) = [each for each in admin.get("/servers").json() if each["id"] == made]
    assert server["models"] == server["offered_models"] == [f"m{number:02}" for number in range(12)]
    assert sorted(each["name"] for each in admin.get("/keys").json()) == [f"k{number:02}" for number in range(12)]
    assert admin.get("/audit").json()["total"] == 1 + len(changes)


def test_what_is_declared_later_wins_and_goes_again(admin: httpx.Client, proxy: Proxy, tiny: LlamaServer) -> None:
    made = admin.post("/servers", json={"name": "both", "url": "http://127.0.0.1:9", "models": ["m"]}).json()["id"]
    before: list[dict[str, Any]] = proxy.config["servers"]
    proxy.write_config(servers=[*before, {"name": "both", "url": tiny.url, "models": ["tiny"]}])
    assert admin.post("/config/reload").json()["ok"] is True
    assert shown(admin, made) == (tiny.url, True)
    assert admin.delete(f"/servers/{made}").status_code == 409
    proxy.write_config(servers=before)
    assert admin.post("/config/reload").json()["ok"] is True
    assert shown(admin, made) == ("http://127.0.0.1:9", False)
    assert admin.delete(f"/servers/{made}").json() == {"ok": True}


def shown(admin: httpx.Client, server_id: int) -> tuple[str, bool]:
    (found,) = [each for each in admin.get("/servers").json() if each["id"] == server_id]
    return found["url"], found["declared"]
