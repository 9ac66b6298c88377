"""Every operation of /admin/openapi.json, fuzzed by schemathesis from the document itself: no answer is a fault, and
none is of a kind that the document does not tell. Then nasty requests that no generator thinks of.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from conftest import StartProxy
from gateway.admin.api import ROUTES
from llama import LlamaServer
from proxy import Proxy

ADMIN_KEY = "admin-0123456789"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
EXAMPLES = 10
QUIET = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# Names and ids of what is there: made first, deleted last.
THERE = {"key_id": 1, "server_id": 2, "alias_name": "made", "name": "made", "model_name": "m"}


@pytest.fixture
def proxy(start_proxy: StartProxy, tiny: LlamaServer) -> Proxy:
    proxy = start_proxy([{"name": "declared", "url": tiny.url}], admin_key=ADMIN_KEY)
    with httpx.Client(base_url=proxy.url, headers=ADMIN) as client:
        for path, body in {
            "keys": {"name": "made", "limits": {"rpm": 5, "budgets": [{"per": "day", "money": 2.5}]}},
            "servers": {"name": "made", "url": "http://127.0.0.1:9", "models": ["m"]},
            "aliases": {"alias_name": "made", "real_model_name": "m"},
            "teams": {"name": "made"},
        }.items():
            assert client.post(f"/admin/{path}", json=body).status_code == 200
    return proxy


def operations(proxy: Proxy) -> Iterator[Any]:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{proxy.url}/admin/openapi.json", headers=ADMIN).json())
    found: list[Any] = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    yield from sorted(found, key=lambda operation: (operation.method.upper() == "DELETE", operation.path))


def fuzz(
    operation: Any, proxy: Proxy, session: requests.Session, mode: GenerationMode, there: dict[str, Any]
) -> set[int]:
    """The statuses that came."""
    seen: set[int] = set()

    @QUIET
    @given(case=operation.as_strategy(generation_mode=mode, path_parameters=there))
    def send(case: Any) -> None:
        answer = case.call_and_validate(base_url=proxy.url, session=session, headers=ADMIN, checks=CHECKS, timeout=60)
        seen.add(answer.status_code)

    send()
    return seen


def test_every_operation(proxy: Proxy) -> None:
    warnings.simplefilter("ignore")
    seen: dict[str, set[int]] = {}
    with requests.Session() as session:
        session.trust_env = False
        for operation in operations(proxy):
            name = f"{operation.method.upper()} {operation.path}"
            there = {key: value for key, value in THERE.items() if f"{{{key}}}" in operation.path}
            modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if _takes_any(operation) else [])]
            runs = [fuzz(operation, proxy, session, mode, given) for mode in modes for given in ({}, there)]
            seen[name] = set().union(*runs)
    assert seen.keys() == {f"{route.method} {route.path}" for route in ROUTES}
    assert sum(200 in statuses for statuses in seen.values()) > len(seen) / 2  # it is not all refused at the door
    assert httpx.get(f"{proxy.url}/health").json()["status"] == "ok"


def _takes_any(operation: Any) -> bool:
    return bool(operation.body or operation.query or operation.path_parameters)


def nasty(name: str, method: str, path: str, body: bytes | None, status: int, param: str | None = None) -> Any:
    return pytest.param(method, path, body, status, param, id=name)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        nasty("nul-in-a-name", "POST", "/admin/keys", b'{"name": "a\\u0000b"}', 400, "name"),
        nasty("newline-in-a-name", "POST", "/admin/teams", b'{"name": "a\\nb"}', 400, "name"),
        nasty("lone-surrogate", "POST", "/admin/keys", b'{"name": "\\ud800"}', 400, "body"),
        nasty("not-utf-8", "POST", "/admin/keys", b'{"name": "\xff"}', 400, "body"),
        nasty("no-json", "POST", "/admin/keys", b"name=alice", 400, "body"),
        nasty("cut", "POST", "/admin/keys", b'{"name": "a', 400, "body"),
        nasty("an-array", "POST", "/admin/keys", b"[]", 400, "body"),
        nasty("nan", "POST", "/admin/keys", b'{"weight": NaN}', 400, "body"),
        nasty("infinity", "POST", "/admin/keys", b'{"weight": 1e999}', 400, "weight"),
        nasty("huge-int", "PUT", "/admin/keys/1/limits", b'{"rpm": 1' + b"0" * 40 + b"}", 400, "rpm"),
        nasty("huge-float", "PUT", "/admin/keys/1/limits", b'{"rps": 1e300}', 400, "rps"),
        nasty("deep", "POST", "/admin/keys", b'{"limits": ' + b"[" * 100_000, 400, "limits"),
        nasty("deep-where-nobody-looks", "POST", "/admin/keys", b'{"x": ' + b"[" * 100_000, 400, "x"),
        nasty("unknown-field", "POST", "/admin/keys", b'{"nam": "a"}', 400, "nam"),
        nasty(
            "inner-field",
            "POST",
            "/admin/keys",
            b'{"limits": {"budgets": [{"per": "age", "tokens": 1}]}}',
            400,
            "limits.budgets[0].per",
        ),
        nasty(
            "inner-type", "POST", "/admin/keys", b'{"limits": {"budgets": [{"per": 1}]}}', 400, "limits.budgets[0].per"
        ),
        nasty("bad-date", "POST", "/admin/keys", b'{"expires_at": "tomorrow"}', 400, "expires_at"),
        nasty("bad-network", "POST", "/admin/keys", b'{"networks": ["10.0.0.0/8", "x"]}', 400, "networks[1]"),
        nasty("both-names-differ", "PUT", "/admin/keys/1/limits", b'{"rpm": 1, "rpm_limit": 2}', 400, "rpm"),
        nasty("burst-alone", "PUT", "/admin/keys/1/limits", b'{"burst": 1}', 400, "limits.burst"),
        nasty("nothing-to-change", "PATCH", "/admin/servers/2", b"{}", 400, "body"),
        nasty("url-with-password", "PATCH", "/admin/servers/2", b'{"url": "http://a:b@h"}', 400, "url"),
        nasty("overlap", "POST", "/admin/keys/1/rotate", b'{"overlap_s": -1}', 400, "overlap_s"),
        nasty("id-of-letters", "GET", "/admin/keys/abc", None, 400, "key_id"),
        nasty("id-of-other-digits", "GET", "/admin/keys/%D9%A1", None, 400, "key_id"),
        nasty("id-too-large", "GET", "/admin/keys/99999999999999999999999", None, 400, "key_id"),
        nasty("id-0", "DELETE", "/admin/keys/0", None, 400, "key_id"),
        nasty("id-null", "GET", "/admin/usage?key_id=null", None, 400, "key_id"),
        nasty("id-empty", "GET", "/admin/usage?server_id=", None, 400, "server_id"),
        nasty("id-twice", "GET", "/admin/usage?key_id=1&key_id=2", None, 400, "key_id"),
        nasty("limit-0", "GET", "/admin/usage?limit=0", None, 400, "limit"),
        nasty("limit-1001", "GET", "/admin/audit?limit=1001", None, 400, "limit"),
        nasty("offset", "GET", "/admin/usage?offset=-1", None, 400, "offset"),
        nasty("date", "GET", "/admin/usage?start_date=2024-13-01", None, 400, "start_date"),
        nasty("far-date", "GET", "/admin/usage?end_date=9999-12-31", None, 200),
        nasty("date-out-of-range", "GET", "/admin/usage?end_date=9999-12-31T23:59:59-10:00", None, 400, "end_date"),
        nasty("unknown-parameter", "GET", "/admin/usage?key=1", None, 400, "key"),
        nasty("a-quote", "GET", "/admin/usage?start_date=2024-01-01'--", None, 400, "start_date"),
        nasty("not-utf-8-in-a-path", "DELETE", "/admin/aliases/%FF", None, 400, "alias_name"),
        nasty("nul-in-a-path", "DELETE", "/admin/aliases/%00", None, 200),
        nasty("slash-in-a-name", "DELETE", "/admin/servers/2/models/org%2Fmodel", None, 200),
        nasty("path-within-a-name", "GET", "/admin/teams/..%2Fkeys", None, 404),
        nasty("trailing-slash", "GET", "/admin/keys/", None, 200),
        nasty("two-slashes", "GET", "/admin//keys", None, 404),
        nasty("in-capitals", "GET", "/ADMIN/keys", None, 404),
        nasty("encoded", "GET", "/%61dmin/keys", None, 404),
        nasty("nothing-there", "GET", "/admin/nothing", None, 404),
        nasty("wrong-method", "PUT", "/admin/keys", b"{}", 405),
        nasty("options", "OPTIONS", "/admin/keys", None, 405),
        nasty("head", "HEAD", "/admin/keys", None, 200),
        nasty("too-large", "POST", "/admin/keys", b'{"name": "' + b"a" * 1_000_000 + b'"}', 413, "body"),
    ],
)
def test_nasty_requests(
    room: httpx.Client, method: str, path: str, body: bytes | None, status: int, param: str | None
) -> None:
    with httpx.Client(base_url=room.base_url, headers=ADMIN, trust_env=False) as client:
        request = client.build_request(method, "/", content=body)
        request.url = request.url.copy_with(raw_path=path.encode())
        answer = client.send(request)
    assert answer.status_code == status, answer.text
    if method != "HEAD" and status >= 400:
        told = answer.json()
        assert told["error"]["param"] == param
        assert told.get("detail", told["error"]["message"]) == told["error"]["message"]


def test_a_body_without_an_end(room: httpx.Client) -> None:
    """In chunks, so that nobody knows its length before."""
    answer = room.post("/admin/keys", content=(b" " * 100_000 for _ in range(20)))
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "body")
    assert len(room.get("/admin/keys").json()) == 1


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[httpx.Client]:
    """One proxy for all of them, with a key 1 and a made server 2. None of them may hurt it."""
    servers = [{"name": "declared", "url": "http://127.0.0.1:9", "models": ["m1"]}]
    folder = tmp_path_factory.mktemp("nasty")
    with Proxy(folder, servers, confdir=confdir, admin_key=ADMIN_KEY) as proxy:
        with httpx.Client(base_url=proxy.url, headers=ADMIN, trust_env=False) as client:
            assert client.get("/admin/servers").json()[0]["id"] == 1
            assert client.post("/admin/keys", json={"name": "first"}).json()["id"] == 1
            assert client.post("/admin/servers", json={"name": "made", "url": "http://127.0.0.1:9"}).json()["id"] == 2
            yield client
            assert client.get("/admin/keys").status_code == 200
        assert "Traceback" not in proxy.log()
