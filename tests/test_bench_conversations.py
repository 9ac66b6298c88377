"""scripts/bench conversations: what users say, how it is sent and read, what is made of it. No test judges a time."""

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmark import players, shapes
from benchmark.chat import Endpoint, Reply
from benchmark.players import AtRandom, InTurn, LeastBusy, Outcome, Picker, Pinned, Play, Turn
from benchmark.talk import ANSWER_TOKENS, WORKLOADS, Conversation, Workload, conversations
from benchmark.talk_report import busiest, cached_share, notes, table

ROOT = Path(__file__).resolve().parent.parent
STREAM = (ROOT / "tests" / "recorded" / "chat_stream_usage.res").read_bytes()
LAST_CHUNK = b"0\r\n\r\n"
SERVERS = [Endpoint(f"server-{number}", number) for number in (1, 2, 3)]
SMALL = Workload(system_words=5, first_words=9, later_words=(2, 4), in_flight=2)
ERROR = b'data: {"error":{"code":500,"message":"Context size has been exceeded."}}\n\n'
ERROR_CHUNK = b"%x\r\n%s\r\n" % (len(ERROR), ERROR)


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("name", WORKLOADS)
def test_conversations_have_the_lengths_of_their_workload(name: str) -> None:
    workload = WORKLOADS[name]
    made = conversations(workload, 5, 6, seed=3)
    assert [len(one.says) for one in made] == [6] * 5
    assert {words(one.messages[0]["content"]) for one in made} == {workload.system_words}
    assert {words(one.says[0]) for one in made} == {workload.first_words}
    low, high = workload.later_words
    assert all(low <= words(text) <= high for one in made for text in one.says[1:])


def test_conversations_share_the_system_prompt_and_nothing_else() -> None:
    made = conversations(SMALL, 4, 3, seed=3)
    assert len({one.messages[0]["content"] for one in made}) == 1
    assert len({text for one in made for text in one.says}) == 4 * 3


def test_a_seed_tells_all() -> None:
    assert conversations(SMALL, 4, 3, seed=3) == conversations(SMALL, 4, 3, seed=3)
    assert conversations(SMALL, 4, 3, seed=3) != conversations(SMALL, 4, 3, seed=4)


def test_a_turn_sends_all_that_was_said_before() -> None:
    (one,) = conversations(SMALL, 1, 2, seed=3)
    first = one.body()
    one.answered("so it is")
    second = one.body()
    assert first["messages"] == [one.messages[0], {"role": "user", "content": one.says[0]}]
    said = [{"role": "assistant", "content": "so it is"}, {"role": "user", "content": one.says[1]}]
    assert second["messages"] == [*first["messages"], *said]
    assert second["seed"] != first["seed"]
    assert not one.is_over
    one.answered("and so")
    assert one.is_over


@pytest.mark.parametrize("step", [1, 7, 100, len(STREAM)])
def test_a_reply_is_the_same_however_it_is_cut(step: int) -> None:
    reply = Reply()
    for at in range(0, len(STREAM), step):
        assert not reply.ended
        reply.feed(STREAM[at : at + step], now=float(at))
    assert reply.ended
    assert reply.problem == ""
    assert reply.headers["server"] == "llama.cpp"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.cached_tokens, reply.usage.completion_tokens) == (48, 47, 6)
    assert words(reply.text) == 6
    assert reply.head_at is not None
    assert reply.first_at is not None
    assert reply.ended_at is not None
    assert reply.head_at <= reply.first_at <= reply.ended_at


@pytest.mark.parametrize(
    ("received", "problem"),
    [
        pytest.param(b"", "cut before the first token", id="nothing"),
        pytest.param(STREAM[: STREAM.index(b"\r\n\r\n") + 4], "cut before the first token", id="only a head"),
        pytest.param(STREAM[: -len(LAST_CHUNK)], "cut before the end", id="no last chunk"),
        pytest.param(STREAM.replace(b"[DONE]", b"{    }"), "ended without text, usage or [DONE]", id="no DONE"),
        pytest.param(
            STREAM[: -len(LAST_CHUNK)] + ERROR_CHUNK + LAST_CHUNK, "error in the stream: 500", id="error in the stream"
        ),
        pytest.param(shapes.not_found(), "status 404 404", id="404"),
        pytest.param(STREAM.replace(b"200 OK", b"503 No"), "status 503", id="503 without JSON"),
    ],
)
def test_a_wrong_reply_is_a_problem(received: bytes, problem: str) -> None:
    reply = Reply()
    reply.feed(received, now=0.0)
    reply.end_of_file(now=1.0)
    assert reply.problem == problem
    assert players.problem_of(reply) == problem


@pytest.mark.parametrize(
    ("picker", "expected"),
    [
        pytest.param(Pinned(SERVERS), "1 1 2 3 1", id="pinned: by conversation"),
        pytest.param(InTurn(SERVERS), "1 2 3 1 2", id="in turn: by request"),
        pytest.param(LeastBusy(SERVERS), "1 2 3 1 2", id="least busy: none of them ends"),
        pytest.param(AtRandom(SERVERS[1:2], seed=1), "2 2 2 2 2", id="at random"),
    ],
)
def test_pickers(picker: Picker, expected: str) -> None:
    picked = [picker.pick(conversation) for conversation in (0, 0, 1, 2, 3)]
    assert " ".join(str(endpoint.port) for endpoint in picked) == expected


def test_the_least_busy_is_the_one_that_has_ended() -> None:
    picker = LeastBusy(SERVERS)
    picked = [picker.pick(0) for _ in SERVERS]
    picker.done(picked[1])
    assert picker.pick(0) == picked[1]


class Asked:
    """Stands for the servers: answers at once, or with the problems it was given first."""

    def __init__(self, *problems: str) -> None:
        self.order: list[str] = []  # each request's last words
        self.running = 0
        self.most = 0
        self._problems = list(problems)

    async def __call__(self, endpoint: Endpoint, body: dict[str, object]) -> Reply:
        messages = body["messages"]
        assert isinstance(messages, list)
        self.order.append(messages[-1]["content"])
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        reply = Reply()
        payloads = shapes.frames(ANSWER_TOKENS, include_usage=True)
        head = shapes.STREAM_HEAD.replace(
            b"\r\n\r\n", b"\r\nx-llmproxy-server: gpu-7\r\nx-llmproxy-route: prefix\r\n\r\n"
        )
        reply.feed(head + b"".join(payloads), now=0.5)
        if self._problems:
            reply.problem = self._problems.pop()
        return reply


def play(talks: Sequence[Conversation], asked: Asked, **more: object) -> Play:
    return Play(talks, Pinned(SERVERS), ask=asked, **more)  # type: ignore[arg-type]


def by_turn(talks: Sequence[Conversation]) -> list[str]:
    return [text for texts in zip(*(one.says for one in talks), strict=True) for text in texts]


def by_conversation(talks: Sequence[Conversation]) -> list[str]:
    return [text for one in talks for text in one.says]


@pytest.mark.parametrize(("mixed", "order"), [(True, by_turn), (False, by_conversation)])
async def test_the_order_of_turns(mixed: bool, order: Callable[[Sequence[Conversation]], list[str]]) -> None:
    talks = conversations(SMALL, 3, 4, seed=1)
    asked = Asked()
    outcome = await play(talks, asked, mixed=mixed).run(in_flight=1)
    assert asked.order == order(talks)
    assert all(one.is_over for one in talks)
    assert len(outcome.turns) == 12
    assert outcome.routes == {"prefix": 12}
    assert {turn.server for turn in outcome.turns} == {"gpu-7"}


async def test_as_many_at_a_time_as_wanted() -> None:
    asked = Asked()
    await play(conversations(SMALL, 5, 4, seed=1), asked).run(in_flight=3)
    assert asked.most == 3


async def test_a_failed_turn_is_counted_and_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(players, "_PAUSE_S", 0)
    asked = Asked("status 502", "status 502")
    outcome = await play(conversations(SMALL, 2, 2, seed=1), asked).run(in_flight=1)
    assert outcome.errors == {"status 502": 2}
    assert len(asked.order) == 4 + 2
    assert [turn.number for turn in outcome.turns] == [0, 1, 0, 1]


async def test_a_conversation_that_always_fails_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(players, "_PAUSE_S", 0)
    monkeypatch.setattr(players, "_TRIES", 3)
    outcome = await play(conversations(SMALL, 2, 2, seed=1), Asked(*["status 500"] * 3)).run(in_flight=1)
    assert outcome.errors == {"status 500": 3, "given up: turn 1 of a conversation": 1}
    assert [turn.conversation for turn in outcome.turns] == [1, 1]


async def test_the_incident_comes_once_in_the_middle() -> None:
    seen: list[int] = []

    async def incident() -> None:
        seen.append(len(run.outcome.turns))

    run = play(conversations(SMALL, 2, 4, seed=1), Asked(), incident=incident)
    await run.run(in_flight=1)
    assert len(seen) == 1
    assert seen[0] in (4, 5)  # it runs beside the turns


def turn(number: int, server: str, cached_tokens: int, ttft_s: float) -> Turn:
    return Turn(0, number, server, prompt_tokens=100, cached_tokens=cached_tokens, ttft_s=ttft_s)


GOOD = Outcome([turn(0, "a", 0, 0.5), turn(1, "b", 90, 0.1), turn(2, "b", 90, 0.2)], Counter(), Counter(), 3, 2.0, 0.25)
BAD = Outcome([turn(0, "a", 0, 0.5), turn(1, "b", 30, 0.4)], Counter({"status 502": 1}), Counter({"only": 2}), 2, 4.0)


def test_the_table_of_conversations() -> None:
    lines = table({"one server": [GOOD], "round-robin": [BAD]}, restarted=False).splitlines()
    assert lines[0].startswith("| | cached share | of one server's |")
    assert lines[2] == (
        "| one server | 0.600 | 1.000× | 500 ms | 500 ms | 200 ms | 200 ms | 0.50× | 2.00 | 0 | 2.0 s | 25% |"
    )
    assert lines[3] == (
        "| round-robin | 0.150 | 0.250× | 500 ms | 500 ms | 400 ms | 400 ms | 1.00× | 1.00 | 1 | 4.0 s | 0% |"
    )
    assert "| of oracle's |" in table({"oracle": [GOOD]}, restarted=True)
    said = notes({"one server": [GOOD], "round-robin": [BAD]})
    assert "- round-robin: routes only 2" in said
    assert "- round-robin: 1 × status 502" in said


def test_rounds_are_pooled_but_not_the_busiest_server() -> None:
    assert cached_share([GOOD, BAD]) == 210 / 500
    assert busiest(GOOD) == 2.0
    assert busiest(Outcome()) == 0.0


def test_a_short_run_prints_the_table() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "conversations", "--quick", "--turns", "2"]
    arrangements = "one server,direct round-robin"
    done = subprocess.run(
        [*command, "--conversations", "2", "--strategies", arrangements, "--restart"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")][1:] == [
        "| one server",
        "| direct round-robin",
    ]
