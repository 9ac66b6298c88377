"""Every kind of key source against its real server: who is let in, and what happens when it is stopped, hangs, or talks
nonsense. MongoDB's server is a scripted one; its driver is real.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benches import BENCHES, Bench, GetDatabase
from gateway.auth import Authenticator, Caller
from gateway.keys import Key, Team
from gateway.limits import Limits
from gateway.patterns import Pattern
from gateway.records import utc_now
from gateway.replies import Refusal
from gateway.settings import Auth, Config
from gateway.sources.settings import Local, Source

# Long enough for a process to start on a busy machine; what hangs is tested with less.
PATIENT_S = 20.0
HASTY_S = 0.5
STOPPED_S = 4.0  # MongoDB's driver looks for a server for so long
ALICE = {"name": "alice", "team": "research", "models": ["m", "n*"], "rpm": 5, "disabled": False}
PAST, FUTURE = "2020-01-01T00:00:00+00:00", "2100-01-01T00:00:00+00:00"


class NoKeys:
    def find(self, key: str) -> Key | None:
        return None

    def team(self, name: str) -> Team | None:
        return None


def authenticator(*sources: Source, mode: str = "first_match") -> Authenticator:
    config = Config(servers=(), auth=Auth(mode, sources), teams={"research": Limits(tpm=100)})
    return Authenticator(config, NoKeys(), utc_now)


async def ask(by: Authenticator, key: str, address: str = "10.0.0.1") -> Caller | str:
    """Who it is, or the refusal's status and code."""
    try:
        return await by.authenticate({"x-api-key": [key]}, address)
    except Refusal as refusal:
        return f"{refusal.status} {refusal.code}"


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path: Path, database: GetDatabase) -> Iterator[Bench]:
    bench = BENCHES[request.param](tmp_path, database)
    yield bench
    bench.close()


async def test_who_is_let_in(bench: Bench) -> None:
    bench.put("sk-good", **ALICE, expires=FUTURE)
    bench.put("sk-plain", name="bob")
    bench.put("sk-off", **{**ALICE, "disabled": True})
    bench.put("sk-old", name="carol", expires=PAST)
    source = bench.source(timeout_s=PATIENT_S)
    by = authenticator(source)
    kind = str(source.__struct_config__.tag)
    alice = Caller(
        None,
        "alice",
        (Pattern("m"), Pattern("n*")),
        source=kind,
        limits=Limits(rpm=5),
        team="research",
        team_limits=Limits(tpm=100),
    )
    asked = ["sk-good", "sk-plain", "sk-off", "sk-old", "sk-unknown", "sk-'; drop table people; --%s:key", "\udcff"]
    assert list(map(repr, [await ask(by, key) for key in asked])) == list(
        map(
            repr,
            [
                alice,
                Caller(None, "bob", (), source=kind),
                "403 key_disabled",
                "403 key_expired",
                "401 invalid_api_key",
                "401 invalid_api_key",
                "401 invalid_api_key",
            ],
        )
    )
    by.close()


async def test_a_key_that_is_disabled_at_the_source_is_refused_once_its_answer_is_no_longer_kept(bench: Bench) -> None:
    bench.put("sk-good", **ALICE)
    by = authenticator(bench.source(timeout_s=PATIENT_S, cache_s=0.3))
    assert isinstance(await ask(by, "sk-good"), Caller)
    bench.put("sk-good", **{**ALICE, "disabled": True})
    disabled_at = time.monotonic()
    while isinstance(answer := await ask(by, "sk-good"), Caller):
        assert time.monotonic() < disabled_at + 10
        await asyncio.sleep(0.01)
    assert answer == "403 key_disabled"
    by.close()


async def test_stopped_and_started_again(bench: Bench) -> None:
    if not bench.can_stop:
        pytest.skip("there is nothing to stop")
    bench.put("sk-good", **ALICE)
    bench.put("sk-other", name="bob")
    refuses = authenticator(bench.source(timeout_s=STOPPED_S))
    passes_on = authenticator(Local(), bench.source(timeout_s=STOPPED_S, on_error="next"))
    alone = authenticator(bench.source(timeout_s=STOPPED_S, on_error="next"))
    assert isinstance(await ask(refuses, "sk-good"), Caller)
    bench.stop()
    assert isinstance(await ask(refuses, "sk-good"), Caller)  # it is remembered
    assert await ask(refuses, "sk-other") == "503 keys_unavailable"
    assert await ask(passes_on, "sk-other") == "401 invalid_api_key"
    assert await ask(alone, "sk-other") == "503 keys_unavailable"
    bench.start()
    assert isinstance(await ask(refuses, "sk-other"), Caller)
    assert isinstance(await ask(passes_on, "sk-other"), Caller)
    refuses.close()
    passes_on.close()
    alone.close()


async def test_hanging(bench: Bench) -> None:
    """Nobody waits for longer than timeout_s, other work goes on meanwhile, and it is asked again when it is back."""
    bench.put("sk-good", **ALICE)
    bench.put("sk-other", name="bob")
    by = authenticator(bench.source(timeout_s=HASTY_S, cache_s=0, negative_cache_s=0))
    bench.freeze()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.ensure_future(tick())
    began = time.monotonic()
    answers = await asyncio.gather(*(ask(by, f"sk-{number}") for number in range(30)))
    assert answers == ["503 keys_unavailable"] * 30
    assert time.monotonic() - began < 10 * HASTY_S
    assert ticks > 10
    ticking.cancel()
    bench.thaw()
    deadline = time.monotonic() + 20
    while not isinstance(await ask(by, "sk-good"), Caller):
        assert time.monotonic() < deadline
    by.close()


NONSENSE: dict[str, tuple[dict[str, Any], str]] = {
    "a word for a number": ({"name": "alice", "rpm": "many"}, "rpm"),
    "less than nothing": ({"name": "alice", "rpm": -1}, "rpm"),
    "half a request": ({"name": "alice", "rpm": 1.5}, "rpm"),
    "a wrong pattern": ({"name": "alice", "models": ["/(/"]}, "models"),
    "models that are numbers": ({"name": "alice", "models": [1, 2]}, "models"),
    "an empty name": ({"name": " "}, "name"),
}


@pytest.mark.parametrize(("fields", "field"), NONSENSE.values(), ids=NONSENSE)
async def test_nonsense(bench: Bench, fields: dict[str, Any], field: str, caplog: pytest.LogCaptureFixture) -> None:
    bench.put("sk-mad", **fields)
    bench.put("sk-good", **ALICE)
    with caplog.at_level(logging.ERROR):
        refuses = authenticator(bench.source(timeout_s=PATIENT_S, name="them"))
        assert await ask(refuses, "sk-mad") == "503 keys_unavailable"
        assert isinstance(await ask(refuses, "sk-good"), Caller)
    passes_on = authenticator(Local(), bench.source(timeout_s=PATIENT_S, on_error="next"))
    assert await ask(passes_on, "sk-mad") == "401 invalid_api_key"
    (line,) = caplog.messages[:1]
    assert line.startswith("key source them field ")
    assert field in line
    assert "sk-mad" not in caplog.text
    refuses.close()
    passes_on.close()
