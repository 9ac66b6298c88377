"""Who changed what, and when."""

import msgspec

from gateway.admin.desk import Desk
from gateway.admin.routes import Nothing, Route, Routes
from gateway.admin.usage import Limit, Offset
from gateway.audit import Entry


class Page(msgspec.Struct, frozen=True):
    limit: Limit = 100
    offset: Offset = 0


class AuditPage(msgspec.Struct, frozen=True):
    """The newest first. `total`: how many there are."""

    entries: list[Entry]
    total: int


async def get_audit(desk: Desk, params: Page, body: Nothing) -> AuditPage:
    entries, total = await desk.keys(lambda store: (store.audit(params.limit, params.offset), store.audit_total()))
    return AuditPage(entries, total)


ROUTES: Routes = (Route("GET", "/admin/audit", "Who changed what, and when", get_audit, Page, Nothing, AuditPage),)
