"""/admin/*: who may, which route, and one border where every fault ends as an answer.

The admin key is compared by digests, in constant time. Without one in the config there is no admin API.
"""

import hashlib
import hmac
import logging
from typing import Any

import msgspec

from gateway import headers
from gateway.admin import aliases, audit, checks, config, keys, limits, openapi, overview, servers, teams, usage
from gateway.admin.desk import Desk, Room, not_found
from gateway.admin.routes import Nothing, Other, Route, Routes, match, read_body, read_params
from gateway.endpoints import canonical
from gateway.replies import Refusal, Reply, refuse
from gateway.settings import Config
from gateway.threads import in_thread

log = logging.getLogger(__name__)

# A list of a thousand models is a tenth of it.
MAX_BODY_BYTES = 1_000_000
# Making the document takes a blink that running streams would feel.
DOCUMENT_S = 10.0
HEADERS = {"content-type": "application/json", "cache-control": "no-store", "x-content-type-options": "nosniff"}


async def _document(desk: Desk, params: Nothing, body: Nothing) -> msgspec.Raw:
    return msgspec.Raw(await in_thread(lambda: openapi.document(ROUTES), "admin", DOCUMENT_S))


ROUTES: Routes = (
    *servers.ROUTES,
    *checks.ROUTES,
    *aliases.ROUTES,
    *keys.ROUTES,
    *teams.ROUTES,
    *usage.ROUTES,
    *limits.ROUTES,
    *overview.ROUTES,
    *audit.ROUTES,
    *config.ROUTES,
    Route("GET", "/admin/openapi.json", "This document", _document, Nothing, Nothing, dict[str, Any]),
)


def is_admin(path: str) -> bool:
    """Whether a path (without query) belongs to the admin API, however it is written."""
    plain = canonical(path)
    return plain == "/admin" or plain.startswith("/admin/")


class Admin:
    """Answers administrators."""

    def __init__(self, room: Room) -> None:
        self.room = room

    def reconfigure(self, declared: Config) -> None:
        """`declared`: what the config file says now."""
        self.room.declared = declared

    def authorize(self, fields: tuple[headers.Field, ...]) -> None:
        """`fields`: a request's headers. Raises Refusal."""
        admin_key = self.room.declared.admin_key
        if not admin_key:
            raise not_found("There is no admin API: the config names no admin_key.")
        given = headers.keys_in(fields).get("authorization", [])
        scheme, _, key = given[0].strip().partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not key.strip():
            challenge = {"www-authenticate": "Bearer"}
            raise Refusal(401, "invalid_admin_key", "Missing admin Authorization", headers=challenge)
        if not hmac.compare_digest(_digest(key.strip()), _digest(admin_key)):
            raise Refusal(403, "invalid_admin_key", "Invalid admin key")

    async def answer(self, method: str, target: str, body: bytes, address: str) -> Reply:
        """`target`: path and query, as they came. `address`: the client's, for the audit. Never raises."""
        try:
            return await self._answer(method, target, body, Desk(self.room, f"admin API from {address}"))
        except Refusal as refusal:
            return _refused(refusal)
        except Exception as error:
            log.error("a fault in the admin API, at %s", method, exc_info=error)
            return _refused(Refusal(500, "internal_error", "The gateway failed."))

    async def _answer(self, method: str, target: str, body: bytes, desk: Desk) -> Reply:
        if len(body) > MAX_BODY_BYTES:
            raise too_large()
        path, _, query = target.partition("?")
        route, in_path = _find("GET" if method == "HEAD" else method, path.removesuffix("/"))
        params = read_params(route.params, in_path, query)
        given = read_body(route.body, body) if route.has_body else Nothing()
        result = await route.handler(desk, params, given)
        status, said = (result.status, result.body) if isinstance(result, Other) else (200, result)
        return Reply(status, msgspec.json.encode(said), HEADERS)


def _refused(refusal: Refusal) -> Reply:
    reply = refuse(refusal, "/admin")
    return reply._replace(headers={**HEADERS, **reply.headers})


def too_large() -> Refusal:
    return Refusal(413, "request_too_large", f"The body is over {MAX_BODY_BYTES:,} bytes.", param="body")


def _find(method: str, path: str) -> tuple[Route[Any, Any], dict[str, str]]:
    allowed = []
    for route in ROUTES:
        found = match(route.path, path)
        if found is not None:
            if route.method == method:
                return route, found
            allowed.append(route.method)
    if not allowed:
        raise not_found(f"There is nothing at {path[:200]}.")
    raise Refusal(
        405, "method_not_allowed", f"{path[:200]} takes {', '.join(allowed)}.", headers={"allow": ", ".join(allowed)}
    )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
