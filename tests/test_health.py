"""A server's health: what probes and requests make of it, and whether it may be sent to. Times are made up."""

from collections.abc import Callable

import pytest

from gateway.health import Health
from gateway.settings import Health as HealthConfig

CONFIG = HealthConfig(up_after=2, down_after=3, eject_after=3, eject_s=2, max_eject_s=10)


class Watched:
    """A server's health, and what was told of it."""

    def __init__(self, config: HealthConfig = CONFIG) -> None:
        self.told: list[tuple[str, str, str | None]] = []
        self.health = Health(config, lambda before, now, why: self.told.append((before, now, why)))

    @property
    def states(self) -> list[str]:
        return [now for _, now, _ in self.told]


def up() -> Watched:
    watched = Watched()
    watched.health.probe_ok(0)
    return watched


def ejected(at: float = 10) -> Watched:
    """Ejected until `at` + 2."""
    watched = up()
    for _ in range(3):
        watched.health.failed(at, "was reset")
    return watched


type Step = Callable[[Health], None]


def ok(health: Health) -> None:
    health.probe_ok(0)


def late(health: Health) -> None:
    health.probe_failed(0, "late")


def loading(health: Health) -> None:
    health.probe_loading(0, "loads its model")


def refused(health: Health) -> None:
    health.refused(0, "refuses connections")


PROBES: dict[str, tuple[list[Step], list[str], bool]] = {
    "nothing known": ([], [], True),
    "the first probe": ([ok], ["up"], True),
    "the first probe fails": ([late], ["down"], False),
    "two failures are not enough": ([ok, late, late], ["up"], True),
    "three are": ([ok, late, late, late], ["up", "down"], False),
    "three in a row": ([ok, late, late, ok, late, late], ["up"], True),
    "more change nothing": ([ok, late, late, late, late], ["up", "down"], False),
    "one good probe does not bring it back": ([late, ok], ["down"], False),
    "two do": ([late, ok, ok], ["down", "up"], True),
    "two in a row": ([late, ok, late, ok], ["down"], False),
    "it loads": ([loading], ["loading"], False),
    "it loads, and is ready with one good probe": ([loading, ok], ["loading", "up"], True),
    "it loads, and dies": ([loading, late], ["loading", "down"], False),
    "it is back, and loads": ([late, loading, ok], ["down", "loading", "up"], True),
    "a refusal needs no threshold": ([ok, refused], ["up", "down"], False),
    "a refusal undoes good probes": ([late, ok, refused, ok], ["down"], False),
}


@pytest.mark.parametrize(("steps", "states", "may_take"), PROBES.values(), ids=PROBES)
def test_probes(steps: list[Step], states: list[str], may_take: bool) -> None:
    watched = Watched()
    for step in steps:
        step(watched.health)
    assert (watched.states, watched.health.may_take(0)) == (states, may_take)
    assert watched.health.state == (states[-1] if states else "unknown")


REFUSES: dict[str, tuple[list[Step], bool]] = {
    "never refused": ([ok], False),
    "refused": ([ok, refused], True),
    "late since": ([refused, late], False),
    "loads since": ([refused, loading], False),
    "back since": ([refused, ok, ok], False),
    "a probe was refused": ([lambda health: health.probe_failed(0, "refuses connections", refuses=True)], True),
}


@pytest.mark.parametrize(("steps", "refuses"), REFUSES.values(), ids=REFUSES)
def test_refuses(steps: list[Step], refuses: bool) -> None:
    watched = Watched()
    for step in steps:
        step(watched.health)
    assert watched.health.refuses is refuses


def test_changes_are_told_with_their_reasons() -> None:
    watched = Watched(HealthConfig())
    for step in (ok, refused, ok):
        step(watched.health)
    assert watched.told == [
        ("unknown", "up", None),
        ("up", "down", "refuses connections"),
        ("down", "up", "answers its probe again"),
    ]


def test_failures_in_a_row_eject() -> None:
    watched = up()
    for at in (1, 2):
        watched.health.failed(at, "was reset")
        assert watched.health.may_take(at)
    watched.health.succeeded(2)
    for at in (3, 4, 5):
        assert watched.health.state == "up"
        watched.health.failed(at, "was reset")
    assert watched.told[-1] == ("up", "ejected", "was reset; left alone for 2 s")
    assert [watched.health.may_take(at) for at in (5, 6.9, 7)] == [False, False, True]


def test_one_trial_at_a_time() -> None:
    health = ejected().health
    assert health.begin_trial(11.9) is None
    trial = health.begin_trial(12)
    assert trial
    assert (health.may_take(12), health.begin_trial(12)) == (False, None)
    health.end_trial(trial)  # undecided: its client left
    assert health.may_take(12)
    assert health.state == "ejected"
    assert health.begin_trial(12)


def test_a_trial_that_succeeds_readmits() -> None:
    watched = ejected()
    trial = watched.health.begin_trial(12)
    assert trial
    watched.health.succeeded(12)
    assert watched.told[-1] == ("ejected", "up", "answers requests again")
    assert watched.health.may_take(12)
    assert watched.health.begin_trial(12) is None
    watched.health.end_trial(trial)
    watched.health.failed(13, "was reset")
    watched.health.failed(13, "was reset")
    assert watched.health.state == "up"  # it starts anew


def test_pauses_grow_to_their_bound() -> None:
    health, now, pauses = ejected().health, 10.0, []
    for _ in range(5):
        pauses.append(health.reopens_at - now)
        now = health.reopens_at
        trial = health.begin_trial(now)
        assert trial
        health.failed(now, "was reset")
        health.end_trial(trial)
        assert not health.may_take(now)
    assert pauses == [2, 4, 8, 10, 10]


def test_endless_failures_stay_within_numbers() -> None:
    health = Health(HealthConfig(eject_after=1, eject_s=1e300, max_eject_s=1.5e300))
    for _ in range(2000):
        health.failed(health.reopens_at, "was reset")
        health.begin_trial(health.reopens_at)
    assert health.reopens_at < float("inf")


def test_what_was_on_its_way_when_it_was_ejected_changes_nothing() -> None:
    watched = ejected()
    reopens_at = watched.health.reopens_at
    for _ in range(10):
        watched.health.failed(11, "was reset")
    assert watched.health.reopens_at == reopens_at
    watched.health.succeeded(9.9)
    assert watched.health.state == "ejected"
    watched.health.succeeded(10.5)  # sent since: there was no other server left
    assert watched.health.state == "up"


def test_an_old_trials_end_is_not_the_new_ones() -> None:
    """A first trial runs on while another request's failure ejects the server again, and a second one begins."""
    health = ejected().health
    first = health.begin_trial(12)
    assert first
    health.failed(13, "was reset")
    assert health.begin_trial(16) is None
    assert health.begin_trial(17)
    health.end_trial(first)
    assert not health.may_take(17)


def test_it_asks_for_a_pause() -> None:
    watched = up()
    watched.health.asked_to_wait(10, 7)
    assert watched.told[-1] == ("up", "paused", "asked for a pause of 7 s")
    assert [watched.health.may_take(at) for at in (10, 16.9, 17)] == [False, False, True]
    trial = watched.health.begin_trial(17)
    assert trial
    watched.health.asked_to_wait(18, 5)
    watched.health.end_trial(trial)
    assert [watched.health.may_take(at) for at in (18, 22.9, 23)] == [False, False, True]


def test_the_longer_pause_counts() -> None:
    health = up().health
    health.asked_to_wait(10, 7)
    health.asked_to_wait(11, 1)
    assert health.reopens_at == 17
    health.asked_to_wait(11, 60)
    assert health.reopens_at == 71


def test_a_pause_is_no_failure() -> None:
    health = up().health
    for at in range(10):
        health.asked_to_wait(at * 10, 1)
    health.succeeded(100)
    health.failed(101, "was reset")
    assert health.state == "up"


DIED: dict[str, list[Step]] = {
    "at once": [refused, ok, ok],
    "by and by": [late, late, late, ok, ok],
    "and loads its model": [refused, loading, ok],
}


@pytest.mark.parametrize("steps", DIED.values(), ids=DIED)
def test_a_new_process_is_not_blamed_for_the_old_one(steps: list[Step]) -> None:
    watched = ejected()
    for step in steps:
        step(watched.health)
    assert watched.health.state == "up"
    assert watched.health.may_take(10)


def test_a_pause_outlives_the_process() -> None:
    """Who asks for a pause may be a proxy before the server, or one with a quota."""
    watched = up()
    watched.health.asked_to_wait(10, 7)
    for step in (refused, ok, ok):
        step(watched.health)
    assert watched.states == ["up", "paused", "down", "paused"]
    assert [watched.health.may_take(at) for at in (16, 17)] == [False, True]


def test_down_hides_ejected() -> None:
    watched = ejected()
    refused(watched.health)
    assert (watched.health.state, watched.health.is_ejected) == ("down", False)
    assert not watched.health.may_take(1000)
