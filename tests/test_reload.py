"""Another config for the router, the balancer and the prober that there are: what stays, what goes, who waits on."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from certificates import Authority
from gateway import balancer
from gateway.attempts import Attempts
from gateway.balancer import NoServer
from gateway.discovery import Prober
from gateway.prompts import read_prompt
from gateway.replies import Refusal
from gateway.servers import Server
from gateway.settings import Config, Health, Queue, Routing, Secret
from gateway.settings import Prefix as PrefixSettings
from gateway.settings import Server as ServerConfig
from gateway.strategies import STRATEGIES, Choice, Report, Wanted
from room import Room, got, rounds, search
from upstream import STALL, Upstream


@pytest.fixture(autouse=True)
def looks_up_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "TICK_S", 0.001)


def change(room: Room, *servers: str, up: bool = True, **more: Any) -> None:
    """Servers as in Room, or as they are when none is named."""
    records = room.config.servers
    if servers:
        records = Room(*servers).config.servers
    use(room, records, up=up, **more)


def use(room: Room, records: Sequence[ServerConfig], *, up: bool = True, **more: Any) -> None:
    config = msgspec.structs.replace(room.config, servers=tuple(records), **more)
    successors = room.router.successors(config)
    gone = [server for server in room.router.servers if server not in successors]
    for server in successors:
        if up and server not in room.router.servers:
            server.health.probe_ok(room.now)
    room.config = config
    room.router.reconfigure(config, successors)
    room.balancer.reconfigure(config, gone)
    room.servers = {server.name: server for server in room.router.servers}


async def ends(waits: "asyncio.Task[None]") -> None:
    await asyncio.wait_for(waits, 10)


# --- which servers stay

BEFORE = ServerConfig("a", "http://a:1", api_key=Secret("sk-1"), models=("m",), slots=1)
SAME: dict[str, dict[str, Any]] = {
    "nothing": {},
    "api_key": {"api_key": Secret("sk-2")},
    "weight": {"weight": 2},
    "slots": {"slots": 2},
    "models": {"models": ("m", "n")},
    "a slash": {"url": "http://a:1/"},
}
OTHER: dict[str, dict[str, Any]] = {
    "url": {"url": "http://b:1"},
    "scheme": {"url": "https://a:1"},
    "path": {"url": "http://a:1/api"},
    "name": {"name": "b"},
}


@pytest.mark.parametrize("changed", [*SAME.values(), *OTHER.values()], ids=[*SAME, *OTHER])
def test_a_server_is_its_name_and_its_url(changed: dict[str, Any], request: pytest.FixtureRequest) -> None:
    room = Room("a 1")
    use(room, [BEFORE])
    server, found = room["a"], search()
    assert room.take(found) == "a"
    after = msgspec.structs.replace(BEFORE, **changed)
    use(room, [after])
    (now,) = room.router.servers
    assert now.config == after
    assert (now is server) == (changed in SAME.values())
    assert [*room.router.known()] == ([server] if now is server else [now, server])
    assert now.running == (1 if now is server else 0)
    found.release()
    assert (server.running, [*room.router.known()]) == (0, [now])


def told(server: Server) -> tuple[object, ...]:
    return server.models, server.type, server.slots


def test_what_a_server_told_stays_where_the_config_leaves_it_open() -> None:
    server = Server(ServerConfig("a", "http://a:1"))
    server.models, server.type, server.slots = ("told",), "llama.cpp", 4
    server.reconfigure(ServerConfig("a", "http://a:1", weight=3))
    assert told(server) == (("told",), "llama.cpp", 4)
    server.reconfigure(ServerConfig("a", "http://a:1", models=("m",), type="openai", slots=1))
    assert told(server) == (("m",), "openai", 1)
    server.reconfigure(ServerConfig("a", "http://a:1"))
    assert told(server) == (("m",), None, None)
    server.reconfigure(ServerConfig("a", "http://a:1", models=()))
    assert told(server) == ((), None, None)


def test_health_goes_on_by_other_rules() -> None:
    room = Room("a - m", "b - m", health=Health(down_after=3))
    room["a"].health.probe_failed(room.now, "is silent")
    change(room, health=Health(down_after=2))
    room["a"].health.probe_failed(room.now, "is silent")
    assert [server.health.state for server in room.router.servers] == ["down", "up"]


def test_models_aliases_and_the_default() -> None:
    room = Room("a - m", "b - n", default_model="m", aliases={"fast": "m", "x-*": "m"})
    router = room.router
    assert [router.resolve(name) for name in (None, "fast", "x-1", "n")] == ["m", "m", "m", "n"]
    change(room, "b - n", "c - o", default_model="o", aliases={"fast": "n", "y-*": "o"})
    assert [router.resolve(name) for name in (None, "fast", "y-1", "n")] == ["o", "n", "o", "n"]
    for unknown in ("m", "x-1"):
        with pytest.raises(Refusal) as caught:
            router.resolve(unknown)
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert dict(router.visible()) == {"n": "n", "o": "o", "fast": "n"}


# --- who runs and who waits


def test_a_server_that_is_gone_gets_nothing_new() -> None:
    room = Room("a -", "b -")
    old, running = room["a"], search()
    room.take(running)
    while got(running) != "a":
        running = search()
        room.take(running)
    change(room, "b -")
    assert {room.take(search()) for _ in range(10)} == {"b"}
    assert old.running > 0
    running.release()
    running.release()
    assert old.running == 0


async def test_who_waits_gets_a_new_server() -> None:
    room = Room("a 1")
    first, second, third = search(), search(), search()
    room.take(first)
    waits = [await room.wait(second), await room.wait(third)]
    assert room.counts == (1, 2, 2)
    change(room, "a 1", "b 1")
    await ends(waits[0])
    assert got(second) == "b"
    assert room.counts == (2, 1, 1)
    first.release()
    await ends(waits[1])
    assert got(third) == "a"
    for each in (second, third):
        each.release()
    assert room.counts == (0, 0, 0)


async def test_who_waits_gets_a_slot_more() -> None:
    room = Room("a 1")
    first, second = search(), search()
    room.take(first)
    waits = await room.wait(second)
    change(room, "a 2")
    await ends(waits)
    assert (got(second), room.counts) == ("a", (2, 0, 0))


async def test_with_a_slot_less_what_runs_goes_on() -> None:
    room = Room("a 2")
    first, second, third = search(), search(), search()
    assert [room.take(first), room.take(second)] == ["a", "a"]
    change(room, "a 1")
    waits = await room.wait(third)
    first.release()
    await rounds()
    assert not waits.done()
    second.release()
    await ends(waits)
    assert (got(third), room["a"].running) == ("a", 1)


@pytest.mark.parametrize("gone", ["a", "b"])
async def test_who_waits_for_a_server_that_is_gone_waits_for_another_one(gone: str) -> None:
    room = Room("a 1", "b 1")
    held = [search(), search()]
    for each in held:
        room.take(each)
    waiting = [search() for _ in range(8)]
    waits = [await room.wait(each) for each in waiting]
    old = [room["a"], room["b"]]
    stays = "ab".replace(gone, "")
    change(room, f"{stays} 1", "c 1")
    await ends(waits[0])
    await rounds()
    assert got(waiting[0]) == "c"
    assert [server.waiting for server in old if server.name == gone] == [0]
    assert room.counts[1] == sum(each.prefers is not None for each in waiting)
    for each in held:
        each.release()
    for each, wait in zip(waiting, waits, strict=True):
        await ends(wait)
        each.release()
    assert room.counts == (0, 0, 0)
    assert [server.running for server in old] == [0, 0]


async def test_who_waits_for_a_model_that_is_gone_is_refused_at_once() -> None:
    room = Room("a 1 m", "b 1 n")
    held = [search(model=model) for model in "mn"]
    for each in held:
        room.take(each)
    leaves, stays = search(), search(model="n")
    waits = [await room.wait(leaves), await room.wait(stays)]
    change(room, "b 1 n")
    with pytest.raises(NoServer) as caught:
        await ends(waits[0])
    assert (caught.value.status, caught.value.code) == (503, "no_server_available")
    assert not waits[1].done()
    held[1].release()
    await ends(waits[1])
    assert got(stays) == "b"


async def test_another_longest_wait_holds_for_those_that_wait() -> None:
    room = Room("a 1", queue=Queue(max_wait_s=1000))
    held, waiting = search(), search()
    room.take(held)
    waits = await room.wait(waiting)
    room.now += 50
    await asyncio.sleep(0.01)
    assert not waits.done()
    change(room, queue=Queue(max_wait_s=40))
    with pytest.raises(NoServer):
        await ends(waits)


# --- what strategies remember


def conversation(number: int, *answers: str) -> Wanted:
    said = [{"role": "user", "content": f"{number} " + "word " * 500}]
    for answer in answers:
        said += [{"role": "assistant", "content": answer}, {"role": "user", "content": "go on"}]
    body = json.dumps({"model": "m", "messages": said}).encode()
    return Wanted("m", read_prompt("m", "/v1/chat/completions", body), len(body))


def ask(room: Room, wanted: Wanted, report: Report | None = None) -> tuple[str, str]:
    """Who got it, and why."""
    found = search()
    found.wanted = wanted
    name = room.take(found)
    found.release()
    room.balancer.answered(found, 1.0, report or Report(ttft_s=0.1))
    assert found.choice
    return name, found.choice.route


def test_prefix_keeps_conversations_where_they_are() -> None:
    room = Room("a -", "b -", "c -", strategy="prefix")
    homes = {number: ask(room, conversation(number))[0] for number in range(30)}
    change(room, "a -", "c -", routing=Routing(prefix=PrefixSettings(stickiness=2)))
    for number, home in homes.items():
        now, route = ask(room, conversation(number, "yes"))
        assert (now, route) == (home, "prefix") if home != "b" else now in "ac"
    change(room, "a -", "b -", "c -")
    after = {number: ask(room, conversation(number, "yes", "no")) for number in range(30)}
    assert all(route == "prefix" and name != "b" for name, route in after.values())


def test_a_new_server_knows_nothing_of_what_one_of_its_name_or_number_was_sent() -> None:
    room = Room("a -", "b -", strategy="prefix")
    there = [number for number in range(30) if ask(room, conversation(number))[0] == "b"]
    change(room, "a -", "c -")  # takes over the number of b, once it is sent something
    fresh = next(number for number in range(100, 200) if ask(room, conversation(number))[0] == "c")
    assert ask(room, conversation(fresh, "yes")) == ("c", "prefix")
    for number in there:
        assert ask(room, conversation(number, "yes"))[1] != "prefix"


def test_a_report_on_a_server_that_is_gone_is_not_believed_of_its_successor() -> None:
    room = Room("a -", strategy="latency")
    found = search()
    room.take(found)
    use(room, [ServerConfig(name, f"http://elsewhere:{port}", models=("m",)) for port, name in enumerate("ab", 1)])
    room.balancer.answered(found, 50.0, Report(ttft_s=40.0))
    assert {ask(room, conversation(number))[0] for number in range(2)} == {"a", "b"}
    assert room["a"].measured_service_s == 1.0
    found.release()


def test_thousands_of_servers_come_and_go() -> None:
    """The prefix index has numbers for a thousand."""
    room = Room("a -", "b0 -", strategy="prefix")
    homes = {number: ask(room, conversation(number))[0] for number in range(20)}
    stay = [number for number, home in homes.items() if home == "a"]
    for round_ in range(1, 2500):
        change(room, "a -", f"b{round_} -")
        ask(room, conversation(1000 + round_))
    assert [ask(room, conversation(number, "yes")) for number in stay] == [("a", "prefix")] * len(stay)
    fresh = next(number for number in range(9000, 9100) if ask(room, conversation(number))[0] == "b2499")
    assert ask(room, conversation(fresh, "yes")) == ("b2499", "prefix")


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_forget_who_is_gone(name: str) -> None:
    """The new server of an old name is as if it had never been there."""
    strategy = STRATEGIES[name](Routing())
    servers = [Server(ServerConfig(each, f"http://{each}:1")) for each in "ab"]
    for number in range(9):
        wanted = conversation(number)
        choice = strategy.choose(servers, wanted)
        strategy.sent(servers, wanted, choice)
        strategy.answered(wanted, choice, Report(ttft_s=3.0 if choice.server is servers[0] else 0.1))
    strategy.reconfigure(Routing(), {"a", "b"})
    fresh = STRATEGIES[name](Routing())
    chosen: list[list[Choice]] = [[], []]
    for number in range(9):
        for each, choices in zip((strategy, fresh), chosen, strict=True):
            wanted = conversation(number)
            choices.append(each.choose(servers, wanted))
            each.sent(servers, wanted, choices[-1])
    assert [choice.server.name for choice in chosen[0]] == [choice.server.name for choice in chosen[1]]


def test_another_strategy() -> None:
    room = Room("a -", "b -", strategy="round-robin")
    assert ask(room, conversation(1))[1] == "round-robin"
    change(room, routing=Routing(strategy="least-busy"))
    assert ask(room, conversation(1))[1] == "least-busy"


def test_another_weight() -> None:
    room = Room("a -", "b -", strategy="least-busy")
    use(room, [msgspec.structs.replace(each, weight=1 + 2 * (each.name == "a")) for each in room.config.servers])
    searches = [search() for _ in range(40)]
    taken = [room.take(each) for each in searches]
    assert (taken.count("a"), taken.count("b")) == (30, 10)


# --- asking servers


class Asked:
    """A prober of scripted servers."""

    def __init__(self, *records: ServerConfig, **health: Any) -> None:
        self.config = Config(records, health=Health(**{"interval_s": 1000, "timeout_s": 5, **health}))
        self.servers = [Server(record) for record in records]
        self.learned = 0
        self.prober = Prober(self.servers, self.config.health, self._learn, lambda: None)

    def _learn(self) -> None:
        self.learned += 1

    async def use(self, *servers: Server, introduce: bool = True, **health: Any) -> None:
        config = Config(tuple(server.config for server in servers), health=self.config.health)
        config = msgspec.structs.replace(config, health=msgspec.structs.replace(config.health, **health))
        watches = self.prober.prepare(servers, config)
        if introduce:
            await self.prober.introduce(watches)
        self.prober.reconfigure(watches, config.health)
        self.config = config


def probes(upstream: Upstream) -> int:
    return sum(request.path == "/health" for request in upstream.requests)


async def until_asked(upstream: Upstream, count: int) -> None:
    async with asyncio.timeout(10):
        while probes(upstream) < count:
            await asyncio.sleep(0.001)


async def test_a_new_server_has_told_its_models_when_it_is_taken_over(upstream: Upstream) -> None:
    asked = Asked()
    asked.prober.start()
    server = Server(ServerConfig("a", upstream.url))
    await asked.use(server)
    assert (server.models, server.health.state) == (("tiny",), "up")
    asked.prober.stop()


async def test_one_that_is_silent_is_not_waited_for(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.discovery.INTRODUCTION_S", 0.01)
    upstream.always("/health", STALL)
    asked = Asked()
    server = Server(ServerConfig("a", upstream.url))
    await asyncio.wait_for(asked.use(server), 3)
    assert server.health.state == "unknown"
    asked.prober.stop()


async def test_only_what_differs_is_asked_anew(start_upstream: Any) -> None:
    upstreams = [start_upstream() for _ in range(2)]
    asked = Asked(*(ServerConfig(name, each.url) for name, each in zip("ab", upstreams, strict=True)))
    asked.prober.start()
    await asked.prober.asked_once()
    same, changed = asked.servers
    changed_config = msgspec.structs.replace(changed.config, api_key=Secret("sk-new"))
    config = msgspec.structs.replace(asked.config, servers=(same.config, changed_config))
    watches = asked.prober.prepare([same, changed], config)
    changed.reconfigure(changed_config)
    asked.prober.reconfigure(watches, config.health)
    await until_asked(upstreams[1], 2)
    assert [probes(each) for each in upstreams] == [1, 2]
    assert upstreams[1].requests[-1].values("authorization") == ["Bearer sk-new"]
    asked.prober.stop()


def test_a_ca_file_is_read_again(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    record = ServerConfig("a", "https://127.0.0.1:1", ca_file=authority.ca_file)
    asked = Asked(record)
    first = asked.prober.prepare(asked.servers, asked.config)
    assert first != asked.prober.prepare(asked.servers, asked.config)
    authority.ca_file.write_text("no certificate")
    with pytest.raises(OSError, match=r"PEM|NO_CERTIFICATE|no certificate"):
        asked.prober.prepare(asked.servers, asked.config)


async def test_who_is_gone_is_asked_no_more(start_upstream: Any) -> None:
    upstreams = [start_upstream() for _ in range(2)]
    asked = Asked(*(ServerConfig(name, each.url) for name, each in zip("ab", upstreams, strict=True)), interval_s=0.05)
    asked.prober.start()
    await asked.prober.asked_once()
    gone, stays = asked.servers
    await asked.use(stays)
    before = probes(upstreams[0])
    asked.prober.ask_soon(gone)
    await until_asked(upstreams[1], probes(upstreams[1]) + 5)
    assert probes(upstreams[0]) <= before + 1  # one may have been on its way
    asked.prober.stop()


async def test_one_that_never_answered_holds_up_nobody_once_it_is_gone(upstream: Upstream) -> None:
    upstream.always("/health", STALL)
    asked = Asked(ServerConfig("a", upstream.url), timeout_s=1000)
    asked.prober.start()
    waits = asyncio.get_running_loop().create_task(asked.prober.asked_once())
    await until_asked(upstream, 1)
    assert not waits.done()
    await asked.use()
    await asyncio.wait_for(waits, 10)
    asked.prober.stop()


async def test_another_interval(upstream: Upstream) -> None:
    asked = Asked(ServerConfig("a", upstream.url))
    asked.prober.start()
    await asked.prober.asked_once()
    await asked.use(*asked.servers, interval_s=0.01)
    await until_asked(upstream, 4)
    asked.prober.stop()


async def test_what_was_prepared_in_vain_asks_nobody(upstream: Upstream) -> None:
    asked = Asked()
    server = Server(ServerConfig("a", upstream.url))
    watches = asked.prober.prepare([server], Config((server.config,), health=asked.config.health))
    await asked.prober.introduce(watches)
    task = watches[server]._task
    assert task
    asked.prober.drop(watches)
    await asyncio.wait({task}, timeout=10)
    assert task.cancelled()


def test_attempts_take_their_rules_from_the_new_config() -> None:
    room = Room("a -")
    attempts = Attempts(room.config, room.balancer, Prober([], Health(), lambda: None, lambda: None))
    attempts.reconfigure(msgspec.structs.replace(room.config, fallbacks={"m": ("n",)}))
    assert attempts._config.fallbacks == {"m": ("n",)}
