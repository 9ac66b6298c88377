"""Several sources as one: the first that knows a key, or all of them; and nothing that one restricts is lost."""

import asyncio
import logging
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import certifi
import msgspec
import pytest

from gateway.auth import Authenticator, Caller
from gateway.keys import Key, Team, hash_key
from gateway.limits import Budget, Limits
from gateway.replies import Refusal
from gateway.secret import Secret
from gateway.settings import Auth, Config
from gateway.sources import listed as listed_keys
from gateway.sources.chain import Chain, Grant, Link
from gateway.sources.combined import narrowest
from gateway.sources.listed import FileKeys
from gateway.sources.remote import Remote
from gateway.sources.settings import Common, File, Local, Source, Sql, Static, StaticKey, Webhook
from gateway.sources.source import Answer, Asked, Refused, SourceFailed
from gateway.yaml_text import ConfigError
from waiting import eventually

NOW = "2026-11-21T09:30:00.000Z"
ASKED = Asked(Secret("sk-secret"), "0" * 64, "10.0.0.1")


def key(name: str = "a", **fields: Any) -> Key:
    plain = Key(id=0, name=name, hint="", created_at="", disabled=False, expires_at=None, models=())
    return msgspec.structs.replace(plain, **fields)


@dataclass
class Says:
    answer: Answer | SourceFailed
    asked: int = 0
    closed: int = 0

    async def find(self, asked: Asked) -> Answer:
        self.asked += 1
        if isinstance(self.answer, SourceFailed):
            raise self.answer
        return self.answer

    def start(self) -> None: ...

    def close(self) -> None:
        self.closed += 1


YES, OTHER, NO, DOWN = key("a"), key("b"), Refused("key_disabled"), SourceFailed("is down")
FIRST: dict[str, tuple[list[tuple[Answer | SourceFailed, str]], object, list[int]]] = {
    "the first": ([(YES, "refuse"), (OTHER, "refuse")], ["a"], [1, 0]),
    "the second": ([(None, "refuse"), (OTHER, "refuse")], ["b"], [1, 1]),
    "none": ([(None, "refuse"), (None, "refuse")], [], [1, 1]),
    "refused by the first": ([(NO, "refuse"), (OTHER, "refuse")], NO, [1, 0]),
    "refused by the second": ([(None, "refuse"), (NO, "refuse")], NO, [1, 1]),
    "the first is down": ([(DOWN, "refuse"), (OTHER, "refuse")], "is down", [1, 0]),
    "the second decides instead": ([(DOWN, "next"), (OTHER, "refuse")], ["b"], [1, 1]),
    "nobody is left": ([(DOWN, "next"), (DOWN, "next")], "is down", [1, 1]),
    "one is left, and does not know it": ([(DOWN, "next"), (None, "next")], [], [1, 1]),
    "the second is down, too": ([(DOWN, "next"), (DOWN, "refuse")], "is down", [1, 1]),
    "who knows it needs no one else": ([(YES, "refuse"), (DOWN, "refuse")], ["a"], [1, 0]),
}
ALL: dict[str, tuple[list[tuple[Answer | SourceFailed, str]], object, list[int]]] = {
    "both": ([(YES, "refuse"), (OTHER, "refuse")], ["a", "b"], [1, 1]),
    "not the first": ([(None, "refuse"), (OTHER, "refuse")], [], [1, 0]),
    "not the second": ([(YES, "refuse"), (None, "refuse")], [], [1, 1]),
    "refused by the second": ([(YES, "refuse"), (NO, "refuse")], NO, [1, 1]),
    "the second is down": ([(YES, "refuse"), (DOWN, "refuse")], "is down", [1, 1]),
}
CASES = [(mode, *case) for mode, table in (("first_match", FIRST), ("all", ALL)) for case in table.values()]


@pytest.mark.parametrize(("mode", "says", "expected", "asked"), CASES, ids=[*FIRST, *(f"all: {name}" for name in ALL)])
async def test_who_decides(
    mode: str,
    says: list[tuple[Answer | SourceFailed, str]],
    expected: object,
    asked: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sources = [Says(answer) for answer, _ in says]
    links = [
        Link(f"s{index}", Common(on_error=on_error), source)
        for index, ((_, on_error), source) in enumerate(zip(says, sources, strict=True))
    ]
    chain = Chain(tuple(links), mode)
    found: object
    with caplog.at_level(logging.ERROR):
        try:
            answer = await chain.find(ASKED)
            found = answer if isinstance(answer, Refused) else [grant.key.name for grant in answer]
        except SourceFailed as error:
            found = str(error)
    assert found == expected
    assert [source.asked for source in sources] == asked
    down = [f"key source s{index} is down" for index, (answer, _) in enumerate(says) if answer is DOWN and asked[index]]
    assert caplog.messages == down


async def test_a_lasting_problem_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    clock, source = [1000.0], Says(DOWN)
    chain = Chain((Link("s", Common(on_error="next"), source),), "first_match", lambda: clock[0])
    says = [(0, DOWN), (9.9, DOWN), (10, DOWN), (10.1, SourceFailed("is mad")), (10.2, DOWN), (10.3, DOWN)]
    for after, source.answer in says:
        clock[0] = 1000 + after
        with pytest.raises(SourceFailed):
            await chain.find(ASKED)
    assert caplog.messages == [f"key source s {problem}" for problem in ("is down", "is down", "is mad", "is down")]


@dataclass
class Keys:
    keys: dict[str, Key] = field(default_factory=dict)
    teams: dict[str, Team] = field(default_factory=dict)

    def find(self, key: str) -> Key | None:
        return self.keys.get(key)

    def team(self, name: str) -> Team | None:
        return self.teams.get(name)


async def ask_both(local: dict[str, Any], static: dict[str, Any], address: str = "10.0.0.1") -> Caller | str:
    """Mode "all", and one key that keys.db and a list in the config both have."""
    listed = StaticKey(name="static-name", key=Secret("sk-1"), **static)
    config = Config(
        servers=(),
        auth=Auth("all", (Local(), Static(keys=(listed,)))),
        teams={"t": Limits(rpm=9), "u": Limits()},
        limits=Config(servers=()).limits,
    )
    by = Authenticator(config, Keys({"sk-1": key("local-name", id=3, **local)}), lambda: NOW)
    try:
        return await by.authenticate({"x-api-key": ["sk-1"]}, address)
    except Refusal as refusal:
        return f"{refusal.status} {refusal.code}"


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the first has expired": ({"expires_at": NOW}, {}, "403 key_expired"),
    "the second has expired": ({}, {"expires": "2026-11-21T09:00Z"}, "403 key_expired"),
    "the second is disabled": ({}, {"disabled": True}, "403 key_disabled"),
    "the second has not begun": ({}, {"not_before": "2026-11-22"}, "403 key_not_yet_valid"),
    "the first is for elsewhere": ({"networks": ("192.0.2.0/24",)}, {}, "403 network_not_allowed"),
    "the second is for elsewhere": (
        {"networks": ("10.0.0.0/8",)},
        {"networks": ("192.0.2.0/24",)},
        "403 network_not_allowed",
    ),
    "different teams": ({"team": "t"}, {"team": "u"}, "503 keys_unavailable"),
}


@pytest.mark.parametrize(("local", "static", "expected"), REFUSALS.values(), ids=REFUSALS)
async def test_all_must_let_it_in(local: dict[str, Any], static: dict[str, Any], expected: str) -> None:
    assert await ask_both(local, static) == expected


async def test_all_narrow_what_it_may() -> None:
    month = Budget(per="month", tokens=10)
    caller = await ask_both(
        {"models": ("a*",), "endpoints": ("/v1/*",), "limits": Limits(rpm=5, tpm=7), "weight": 2.0},
        {
            "models": ("*b", "fast"),
            "endpoints": ("/v1/chat/completions",),
            "limits": Limits(rpm=9, concurrency=1, budgets=(month,)),
            "team": "t",
            "weight": 7.0,
        },
    )
    assert isinstance(caller, Caller)
    assert (caller.key_id, caller.key_name, caller.source, caller.scope) == (3, "local-name", "local", "key:3")
    assert (caller.weight, caller.team, caller.team_limits) == (2.0, "t", Limits(rpm=9))
    assert caller.limits == Limits(rpm=5, tpm=7, concurrency=1, budgets=(month,))
    used = {
        names: caller.may_use(*names) for names in (("a",), ("b",), ("ab",), ("a", "b"), ("fast", "a"), ("fast", "m"))
    }
    # ("fast", "a"): one may use it as it is called, the other as it is served.
    assert used == {
        ("a",): False,
        ("b",): False,
        ("ab",): True,
        ("a", "b"): True,
        ("fast", "a"): True,
        ("fast", "m"): False,
    }
    assert [caller.may_call(path) for path in ("/v1/chat/completions", "/v1/embeddings", "/x")] == [True, False, False]
    assert not caller.may_use_all


async def test_who_is_not_narrowed_by_the_first_is_by_the_second() -> None:
    caller = await ask_both({}, {"models": ("m",)})
    assert isinstance(caller, Caller)
    assert (caller.may_use("m"), caller.may_use("n"), caller.may_use(), caller.may_use_all) == (
        True,
        False,
        False,
        False,
    )


NARROWEST: dict[str, tuple[list[Limits], Limits]] = {
    "one": ([Limits(rpm=5)], Limits(rpm=5)),
    "nothing": ([Limits(), Limits()], Limits()),
    "only one of them": ([Limits(), Limits(rpm=5, rps=1)], Limits(rpm=5, rps=1, burst=1)),
    "the smaller": ([Limits(rpm=5, tpm=1), Limits(rpm=4, tpm=2)], Limits(rpm=4, tpm=1)),
    "0 is smaller": ([Limits(rpm=5), Limits(rpm=0)], Limits(rpm=0)),
    "rate and burst of different ones": (
        [Limits(rps=5, burst=50), Limits(rps=9.5)],
        Limits(rps=5, burst=10),
    ),
    "budgets": (
        [
            Limits(budgets=(Budget(per="day", tokens=5), Budget(per="month", money=2))),
            Limits(budgets=(Budget(per="day", tokens=4), Budget(per="day", money=1))),
        ],
        Limits(budgets=(Budget(per="day", tokens=4), Budget(per="month", money=2), Budget(per="day", money=1))),
    ),
}


@pytest.mark.parametrize(("limits", "expected"), NARROWEST.values(), ids=NARROWEST)
def test_the_narrowest_limits(limits: list[Limits], expected: Limits) -> None:
    assert narrowest([Grant("s", key(limits=each)) for each in limits]) == expected


def listed(name: str, secret: str) -> Static:
    return Static(keys=(StaticKey(name=name, key=Secret(secret)),))


async def test_another_config_keeps_the_sources_that_did_not_change() -> None:
    config = Config(servers=(), auth=Auth(sources=(Local(), listed("a", "sk-a"), listed("b", "sk-b"))))
    by = Authenticator(config, Keys(), lambda: NOW)
    before = by._chain
    assert [link.name for link in before.links] == ["local", "static", "static-2"]
    auth = Auth(sources=(Local(), listed("a", "sk-a"), listed("c", "sk-c")))
    by.reconfigure(msgspec.structs.replace(config, auth=auth, teams={"t": Limits(rpm=1)}))
    assert [now.source is old.source for now, old in zip(by._chain.links, before.links, strict=True)] == [
        True,
        True,
        False,
    ]
    for text, expected in (("sk-a", "a"), ("sk-c", "c")):
        assert (await by.authenticate({"x-api-key": [text]}, "")).key_name == expected
    with pytest.raises(Refusal):
        await by.authenticate({"x-api-key": ["sk-b"]}, "")


async def test_a_config_that_leaves_a_source_out_lets_it_answer_first() -> None:
    @dataclass
    class Slow(Says):
        goes_on: asyncio.Event = field(default_factory=asyncio.Event)

        async def find(self, asked: Asked) -> Answer:
            await self.goes_on.wait()
            assert not self.closed
            return await super().find(asked)

    first, second, stays = Slow(None), Says(None), Says(YES)
    links = [Link(name, Common(), source) for name, source in (("a", first), ("b", second), ("c", stays))]
    chain = Chain(tuple(links), "first_match")
    asking = asyncio.ensure_future(chain.find(ASKED))
    await asyncio.sleep(0)
    chain.close(but=Chain((links[2],), "first_match"))
    assert (first.closed, second.closed, stays.closed) == (0, 0, 0)
    first.goes_on.set()
    assert await asking == (Grant("c", YES),)
    assert (first.closed, second.closed, stays.closed) == (1, 1, 0)


def names_a_file(name: str, folder: Path) -> tuple[Source, Path]:
    """A source, and the file without which it can't be set up."""
    if name == "sqlite":
        path = folder / "people.db"
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("create table people (name text, secret text)")
            db.execute("insert into people values ('alice', ?)", [hash_key("sk-1")])
        query = "select name from people where secret = :sha256"
        return Sql(url=Secret(f"sqlite:///{path}"), query=query), path
    path = folder / "ca.pem"
    path.write_bytes(Path(certifi.where()).read_bytes())
    return Webhook(url="https://127.0.0.1:1/", ca_file=path), path


@pytest.mark.parametrize("name", ["sqlite", "webhook"])
async def test_a_source_that_did_not_change_but_its_file_is_gone_refuses_the_config(name: str, tmp_path: Path) -> None:
    source, path = names_a_file(name, tmp_path)
    by = Authenticator(Config(servers=(), auth=Auth(sources=(source,))), Keys(), lambda: NOW)
    before = by._chain
    path.unlink()
    with pytest.raises(ConfigError, match=r"auth\.sources\[0\]"):
        by.reconfigure(by._config)
    assert by._chain is before
    by.close()


async def test_a_source_that_did_not_change_keeps_what_it_knows_and_reads_its_files_anew(tmp_path: Path) -> None:
    source, path = names_a_file("sqlite", tmp_path)
    by = Authenticator(Config(servers=(), auth=Auth(sources=(source,))), Keys(), lambda: NOW)
    before = by._chain.links[0].source
    assert (await by.authenticate({"x-api-key": ["sk-1"]}, "")).key_name == "alice"
    by.reconfigure(by._config)
    after = by._chain.links[0].source
    assert isinstance(before, Remote)
    assert isinstance(after, Remote)
    assert after._source is not before._source
    path.unlink()
    assert (await by.authenticate({"x-api-key": ["sk-1"]}, "")).key_name == "alice"
    by.close()


async def test_a_key_file_is_looked_at_from_the_start_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only once somebody has asked."""
    monkeypatch.setattr(listed_keys, "POLL_S", 0.01)
    path = tmp_path / "keys.yaml"
    path.write_text("- {name: alice, key: sk-1}")
    by = Authenticator(Config(servers=(), auth=Auth(sources=(File(path=path),))), Keys(), lambda: NOW)
    (source,) = (link.source for link in by._chain.links)
    assert isinstance(source, FileKeys)
    path.write_text("[]")
    await asyncio.to_thread(eventually, lambda: not source._keys)
    with pytest.raises(Refusal):
        await by.authenticate({"x-api-key": ["sk-1"]}, "")
    by.close()
