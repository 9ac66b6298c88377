"""Teams of keys.db: their life, and that none is deleted under its keys."""

from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from gateway.keystore import Changes, InUse, KeyNotFound, KeyProblem, KeyStore, NameTaken, Team
from gateway.limits import Budget, Limits
from gateway.teams import Teams

NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
LIMITS = Limits(tpm=100_000, budgets=(Budget("month", tokens=5_000_000), Budget("day", money=2.5)))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    with closing(KeyStore(tmp_path / "keys.db", lambda: NOW)) as store:
        yield store


@pytest.fixture
def teams(store: KeyStore) -> Teams:
    return store.teams


def test_a_teams_life(teams: Teams) -> None:
    made = teams.create("research", LIMITS, actor="x")
    assert made == Team(1, "research", LIMITS, "2026-11-21T09:30:00.000Z")
    assert teams.create("lab", actor="x").limits == Limits()
    assert [team.name for team in teams.list()] == ["lab", "research"]
    changed = teams.change("research", Limits(rpm=5), actor="x")
    assert changed == Team(1, "research", Limits(rpm=5), made.created_at) == teams.get("research")
    merged = teams.change("research", lambda limits: msgspec.structs.replace(limits, tpm=7), actor="x")
    assert merged.limits == Limits(rpm=5, tpm=7) == teams.get("research").limits
    assert teams.delete("research", actor="x") == merged
    assert [team.name for team in teams.list()] == ["lab"]


PROBLEMS: dict[str, tuple[Callable[[Teams], object], type[KeyProblem], str]] = {
    "create, no name": (lambda teams: teams.create(" ", actor="x"), KeyProblem, "name"),
    "create, a space before it": (lambda teams: teams.create(" b", actor="x"), KeyProblem, "name"),
    "create, what means no team": (lambda teams: teams.create("none", actor="x"), KeyProblem, "name"),
    "create, taken": (lambda teams: teams.create("lab", actor="x"), NameTaken, "name"),
    "create, a limit": (lambda teams: teams.create("b", Limits(rps=-1), actor="x"), KeyProblem, "limits.rps"),
    "change, a limit": (lambda teams: teams.change("lab", Limits(tpm=-1), actor="x"), KeyProblem, "limits.tpm"),
    "change, of what is there": (
        lambda teams: teams.change("lab", lambda limits: msgspec.structs.replace(limits, burst=1), actor="x"),
        KeyProblem,
        "limits.burst",
    ),
    "change, none": (lambda teams: teams.change("b", Limits(), actor="x"), KeyNotFound, "name"),
    "get, none": (lambda teams: teams.get("b"), KeyNotFound, "name"),
    "get, no Unicode": (lambda teams: teams.get("\ud800"), KeyNotFound, "name"),
    "delete, none": (lambda teams: teams.delete("b", actor="x"), KeyNotFound, "name"),
}


@pytest.mark.parametrize(("call", "kind", "field"), PROBLEMS.values(), ids=PROBLEMS)
def test_problems_change_nothing(
    call: Callable[[Teams], object], kind: type[KeyProblem], field: str, store: KeyStore
) -> None:
    store.teams.create("lab", LIMITS, actor="x")
    before = (store.teams.list(), store.audit(10))
    with pytest.raises(KeyProblem) as caught:
        call(store.teams)
    assert (type(caught.value), caught.value.field) == (kind, field)
    assert (store.teams.list(), store.audit(10)) == before


@pytest.mark.parametrize(
    ("count", "named"), [(2, "key-0, key-1; move"), (12, "key-8, key-9 and 2 more; move")], ids=["two", "many"]
)
def test_a_team_with_keys_stays(count: int, named: str, store: KeyStore) -> None:
    store.teams.create("lab", actor="x")
    for number in range(count):
        store.create(f"key-{number}", team="lab")
    with pytest.raises(InUse, match=named):
        store.teams.delete("lab", actor="x")
    for number in range(count):
        store.change(f"key-{number}", Changes(team=None))
    store.teams.delete("lab", actor="x")
    assert store.teams.list() == []
