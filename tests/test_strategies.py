"""Whom each strategy chooses. Requests come one after the other, or stay for as long as a test wants."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest

from gateway import settings
from gateway.prompts import Prompt, read_prompt
from gateway.servers import Claim, Server
from gateway.settings import Routing
from gateway.strategies import STRATEGIES, Choice, Report, Strategy, Wanted

SHORT = Wanted("m", None, 100)
CHAT = "/v1/chat/completions"


def server(name: str, weight: float = 1, slots: int | None = None) -> Server:
    return Server(settings.Server(name, f"http://{name}:1", weight=weight, slots=slots))


def servers(*weights: float, slots: int | None = None) -> list[Server]:
    """Named a, b, …"""
    return [server(chr(ord("a") + index), weight, slots) for index, weight in enumerate(weights)]


def chat(*messages: str) -> Wanted:
    """A conversation that the user begins."""
    roles = ("user", "assistant")
    said = [{"role": roles[index % 2], "content": message} for index, message in enumerate(messages)]
    body = json.dumps({"model": "m", "messages": said}).encode()
    return Wanted("m", read_prompt("m", CHAT, body), len(body))


def conversations(count: int, words: int = 500) -> list[Wanted]:
    return [chat(f"{number} " + "word " * words) for number in range(count)]


class Player:
    """A strategy and its servers, and who got what."""

    def __init__(self, name: str, servers: Sequence[Server], routing: Routing | None = None) -> None:
        self.strategy: Strategy = STRATEGIES[name](routing or Routing())
        self.servers = servers
        self.routes: Counter[str] = Counter()

    def begin(self, wanted: Wanted = SHORT) -> tuple[Claim, Choice]:
        choice = self.strategy.choose(self.servers, wanted)
        claim = Claim(choice.server, 0)
        self.strategy.sent(self.servers, wanted, choice)
        self.routes[choice.route] += 1
        return claim, choice

    def ask(self, wanted: Wanted = SHORT, report: Report | None = None) -> str:
        """One request from its beginning to its end."""
        claim, choice = self.begin(wanted)
        claim.release()
        if report:
            self.strategy.answered(wanted, choice, report)
        return choice.server.name

    def share(self, requests: Iterable[Wanted]) -> dict[str, int]:
        return dict(Counter(self.ask(wanted) for wanted in requests))


def test_every_name_of_the_config_is_there() -> None:
    assert tuple(STRATEGIES) == settings.STRATEGIES


EXACT = ("prefix", "least-busy", "round-robin", "latency")


@pytest.mark.parametrize("name", EXACT)
def test_weights(name: str) -> None:
    assert Player(name, servers(1, 3)).share([SHORT] * 400) == {"a": 100, "b": 300}


@pytest.mark.parametrize("name", EXACT)
def test_weights_with_one_server_gone(name: str) -> None:
    player = Player(name, servers(1, 3, 2))
    assert player.share([SHORT] * 600) == {"a": 100, "b": 300, "c": 200}
    everyone, player.servers = player.servers, player.servers[:2]
    assert player.share([SHORT] * 400) == {"a": 100, "b": 300}
    player.servers = everyone  # who was away has saved up nothing
    assert player.share([SHORT] * 600) == {"a": 100, "b": 300, "c": 200}


STICKINESS = {"usual": 1.0, "none": 0.0, "much": 1000.0}


@pytest.mark.parametrize("stickiness", STICKINESS.values(), ids=STICKINESS)
@pytest.mark.parametrize("weights", [(1, 3), (1, 1, 1), (0.5, 0.25, 0.25), (1e-3, 1)], ids=str)
def test_new_conversations_go_by_weight(weights: tuple[float, ...], stickiness: float) -> None:
    routing = Routing(prefix=settings.Prefix(stickiness=stickiness))
    player = Player("prefix", servers(*weights), routing)
    share = player.share(conversations(400))
    for each in player.servers:
        fair = 400 * each.config.weight / sum(weights)
        assert share.get(each.name, 0) == pytest.approx(fair, rel=0.1, abs=4)


@pytest.mark.parametrize("name", EXACT)
def test_models_take_turns_by_themselves(name: str) -> None:
    player = Player(name, servers(1, 1))
    share = Counter((model, player.ask(Wanted(model, None))) for _ in range(50) for model in ("m", "n", "m", None))
    assert {model: (share[model, "a"], share[model, "b"]) for model in ("m", "n", None)} == {
        "m": (50, 50),
        "n": (25, 25),
        None: (25, 25),
    }


SMOOTH = {"nginx's own example": ((5, 1, 1), "aabacaa"), "1:3": ((1, 3), "babb"), "equal": ((1, 1, 1), "abc")}


@pytest.mark.parametrize(("weights", "order"), SMOOTH.values(), ids=SMOOTH)
def test_round_robin_is_smooth(weights: tuple[float, ...], order: str) -> None:
    player = Player("round-robin", servers(*weights))
    assert "".join(player.ask() for _ in range(3 * len(order))) == order * 3


@pytest.mark.parametrize("name", ["prefix", "least-busy", "latency"])
def test_a_server_with_a_running_stream_gets_nothing_while_another_idles(name: str) -> None:
    player = Player(name, servers(1, 1))
    stream, choice = player.begin()
    others = player.share([SHORT] * 100)
    assert choice.server.name not in others
    stream.release()
    assert len(player.share([SHORT] * 200)) == 2


@pytest.mark.parametrize("name", EXACT)
def test_a_full_server_gets_nothing_while_another_has_a_slot(name: str) -> None:
    """Nor does it get all that follows, once it has a slot again."""
    player = Player(name, servers(1, 1, slots=1))
    stream, choice = player.begin()
    assert choice.server.name not in player.share([SHORT] * 1000)
    stream.release()
    assert "a" in player.share([SHORT] * 10)
    if name == "round-robin":
        assert player.share([SHORT] * 200) == {"a": 100, "b": 100}


@pytest.mark.parametrize("name", EXACT)
def test_with_all_full_one_of_them_is_to_be_waited_for(name: str) -> None:
    player = Player(name, servers(1, 1, slots=1))
    claims = [player.begin()[0] for _ in range(2)]
    assert player.strategy.choose(player.servers, SHORT).server.is_full
    for claim in claims:
        claim.release()


@pytest.mark.parametrize("name", EXACT)
def test_requests_at_the_same_time_spread(name: str) -> None:
    """Long ones, of conversations that nobody knows."""
    player = Player(name, servers(1, 1, 2, slots=4))
    for wanted in conversations(8):
        player.begin(wanted)
    running = [each.running for each in player.servers]
    assert sum(running) == 8
    assert all(1 <= count <= 4 for count in running)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("weights", [(5e-324, 1), (5e-324, 5e-324), (1e-300, 1e300), (1e300, 1e300)], ids=str)
def test_odd_weights(name: str, weights: tuple[float, ...]) -> None:
    player = Player(name, servers(*weights, slots=2))
    claims = []
    for wanted in [SHORT, *conversations(3)] * 5:
        claims.append(player.begin(wanted)[0])
        player.ask(wanted, Report(0.0, 0, 0, 0.0))
    for claim in claims:
        claim.release()
    assert [each.running for each in player.servers] == [0, 0]


@pytest.mark.parametrize("name", EXACT)
def test_slots_that_change_while_requests_run(name: str) -> None:
    player = Player(name, servers(1, 1, slots=4))
    claims = [player.begin(wanted)[0] for wanted in conversations(6)]
    for slots in (1, 0, None, 1_000_000):
        for each in player.servers:
            each.slots = slots
        player.ask()
        player.ask(chat("new " * 500))
    for claim in claims:
        claim.release()


# --- latency


def test_latency_asks_the_fast_one_and_the_slow_one_now_and_then() -> None:
    player = Player("latency", servers(1, 1))
    seconds = {"a": 1.0, "b": 0.1}
    for _ in range(2):  # both are measured first
        name = player.strategy.choose(player.servers, SHORT).server.name
        player.ask(report=Report(ttft_s=seconds[name]))
    asked = []
    for _ in range(300):
        name = player.strategy.choose(player.servers, SHORT).server.name
        asked.append(player.ask(report=Report(ttft_s=seconds[name])))
    assert asked[:50] == ["b"] * 50
    assert 1 <= asked.count("a") <= 6
    seconds["a"] = 0.01  # it has become fast: that is found out
    for _ in range(400):
        name = player.strategy.choose(player.servers, SHORT).server.name
        asked.append(player.ask(report=Report(ttft_s=seconds[name])))
    assert asked[-50:].count("a") > 45


def test_latency_is_of_a_prompts_size() -> None:
    """Ten times the time for ten times the prompt is no slower."""
    player = Player("latency", servers(1, 1))
    small, large = Wanted("m", None, 0), Wanted("m", None, 18_000)
    assert player.ask(small, Report(ttft_s=0.2)) == "a"
    assert player.ask(large, Report(ttft_s=1.9)) == "b"
    assert player.ask(small) == "b"


def test_latency_does_not_heap_requests_upon_a_server_that_was_never_measured() -> None:
    player = Player("latency", servers(1, 1))
    assert player.ask(report=Report(ttft_s=0.1)) == "a"
    claims = [player.begin()[0] for _ in range(10)]
    assert [each.running for each in player.servers] == [5, 5]
    for claim in claims:
        claim.release()


def test_latency_learns_nothing_of_an_answer_without_an_event() -> None:
    player = Player("latency", servers(1, 1))
    assert player.ask(report=Report(ttft_s=None)) == "a"
    assert player.ask(report=Report(ttft_s=0.1)) == "b"
    assert player.ask() == "a"


# --- prefix


def prompt_of(wanted: Wanted) -> Prompt:
    assert wanted.prompt
    return wanted.prompt


TURNS = [("first " + "word " * 500,), ("answer",), ("second",), ("answer",), ("third " + "word " * 900,)]


def turns(name: str) -> list[Wanted]:
    """A conversation's requests, each with all that was said before."""
    said: list[str] = []
    requests = []
    for index, (message,) in enumerate(TURNS):
        said.append(f"{name} {message}")
        if index % 2 == 0:
            requests.append(chat(*said))
    return requests


def test_a_conversation_stays_where_it_is() -> None:
    player = Player("prefix", servers(1, 1, 1))
    where: dict[str, set[str]] = {}
    for turn in range(3):
        for number in range(30):
            where.setdefault(str(number), set()).add(player.ask(turns(str(number))[turn]))
    assert all(len(names) == 1 for names in where.values())
    assert sorted(Counter(name for names in where.values() for name in names).values()) == pytest.approx(
        [10] * 3, abs=3
    )
    assert player.routes == {"rendezvous": 30, "prefix": 60}


def test_a_conversation_leaves_a_server_that_is_busy_for_long() -> None:
    player = Player("prefix", servers(1, 1, slots=1))
    first, second, third = turns("x")
    home = player.ask(first)
    at_home = next(each for each in player.servers if each.name == home)
    stream = Claim(at_home, 0)
    at_home.measured_service_s = 0.001
    assert player.strategy.choose(player.servers, second).server is at_home  # that slot is worth the wait
    at_home.measured_service_s = 60
    choice = player.strategy.choose(player.servers, second)
    assert (choice.server is at_home, choice.route) == (False, "least-busy")
    elsewhere = player.ask(second)
    stream.release()
    assert player.ask(third) == elsewhere


def test_a_first_message_that_all_share_pulls_nobody_to_one_server() -> None:
    """A template of 10 KB with a short question at its end."""
    player, share = Player("prefix", servers(1, 1, 1)), Counter[str]()
    for number in range(120):
        share[player.ask(chat("template " * 1200 + f"question {number}"))] += 1
        assert max(share.values()) <= 1.1 * share.total() / 3 + 3


def test_a_system_prompt_that_all_share_pulls_nobody_to_one_server() -> None:
    player = Player("prefix", servers(1, 1, 1))

    def with_system(question: str) -> Wanted:
        said = [{"role": "system", "content": "rule " * 2000}, {"role": "user", "content": question}]
        body = json.dumps({"messages": said}).encode()
        return Wanted("m", read_prompt("m", CHAT, body), len(body))

    share = player.share(with_system(f"question {number}") for number in range(120))
    assert sorted(share.values()) == pytest.approx([40] * 3, abs=6)


def test_gateways_that_do_not_talk_agree() -> None:
    """Both know the same servers, in another order. The other's conversations are found where they are."""
    mine, other = Player("prefix", servers(1, 1, 1)), Player("prefix", servers(1, 1, 1)[::-1])
    same = 0
    for number in range(60):
        first, second, third = turns(str(number))
        where = mine.ask(first)
        other.ask(second)
        same += mine.ask(third) == where
    assert same == 60
    found = sum(mine.ask(turns(f"new {n}")[0]) == other.ask(turns(f"new {n}")[1]) for n in range(60))
    assert found > 45


def test_a_restart_is_learned_from_one_report() -> None:
    player = Player("prefix", servers(1, 1))
    before = Report(ttft_s=0.1, prompt_tokens=100, cached_tokens=0)
    where = {number: player.ask(turns(str(number))[0], before) for number in range(20)}
    on_a = [number for number, name in where.items() if name == "a"]
    on_b = [number for number, name in where.items() if name == "b"]
    player.ask(turns(str(on_a[-1]))[1], Report(prompt_tokens=100, cached_tokens=0))  # it had lost the last one: all
    for numbers, known in ((on_a[:-1], False), (on_b, True), (on_a[-1:], True)):
        for number in numbers:
            assert player.strategy.choose(player.servers, turns(str(number))[1]).is_known is known


def test_two_requests_of_a_conversation_at_once_do_not_pass_for_a_restart() -> None:
    """The second finds the first on its way there, and nothing of it in the cache."""
    player = Player("prefix", servers(1, 1))
    where = {number: player.ask(turns(str(number))[0], Report(0.1, 100, 0)) for number in range(20)}
    twin = turns("twin")[0]
    (first, one), (second, two) = player.begin(twin), player.begin(twin)
    assert one.server is two.server
    for claim, choice in ((first, one), (second, two)):
        claim.release()
        player.strategy.answered(twin, choice, Report(0.1, 100, 0))
    assert all(player.ask(turns(str(number))[1]) == name for number, name in where.items())


def test_reports_that_say_little_or_nonsense() -> None:
    player = Player("prefix", servers(1, 1))
    for report in (
        Report(),
        Report(0.1),
        Report(0.1, 0, 0),
        Report(0.1, 5, None),
        Report(0.1, None, 5),
        Report(0, 1, 9),
    ):
        for wanted in turns("x"):
            player.ask(wanted, report)
    assert player.strategy.choose(player.servers, turns("x")[2]).is_known


def test_why_is_told_only_to_who_listens(caplog: pytest.LogCaptureFixture) -> None:
    player = Player("prefix", servers(1, 1))
    wanted = turns("x")[0]
    assert player.strategy.choose(player.servers, wanted).why == ""
    caplog.set_level("DEBUG", "gateway.strategies")
    why = player.strategy.choose(player.servers, wanted).why
    assert f"prompt of {prompt_of(wanted).bytes} bytes" in why
    assert "a " in why
    assert "bytes cached" in why
