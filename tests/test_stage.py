"""What the pictures of the pages are taken of: a running gateway with a past."""

from pathlib import Path
from typing import Any

import httpx

from stage import RESEARCHERS, TEAM, USERS, stage
from waiting import eventually


def test_a_gateway_with_a_past_and_something_to_do(tmp_path: Path) -> None:
    with stage(tmp_path, 2000) as on:

        def ask(path: str, key: str) -> Any:
            return httpx.get(on.url + path, headers={"Authorization": f"Bearer {key}"}, trust_env=False).json()

        usage = ask("/v1/usage", on.key)
        assert usage["key"] == {"name": USERS[0], "team": TEAM}
        assert len({day["day"] for day in usage["days"]}) > 20
        assert [budget["used"] > 0 for budget in usage["budgets"] if budget["per"] == "month"] == [True, True]

        def busy() -> dict[str, Any]:
            found: dict[str, Any] = ask("/admin/overview", on.admin_key)
            return found if found["running"] else {}

        overview = eventually(busy)
        assert {server["state"] for server in overview["servers"]} == {"up", "down"}
        assert [key["name"] for key in overview["keys"]] == USERS[::-1]
        assert [team["keys"] for team in overview["teams"]] == [RESEARCHERS]
        assert {request["key_name"] for request in overview["running"]} <= set(USERS)
