"""What a request counts: its row's tokens; where a server that answered tells none, an estimate, not for the row."""

from typing import Any

import pytest

from gateway.auth import Caller
from gateway.balancer import Search
from gateway.charges import charged, tokens_of, told
from gateway.exchange import Exchange
from gateway.limits import MAX_AMOUNT
from gateway.prices import Use
from gateway.records import Row
from gateway.relay import Relay
from gateway.servers import Claim, Server
from gateway.settings import Server as ServerConfig
from gateway.strategies import Wanted
from gateway.tally import Tally
from gateway.wire import Asked

CHAT = "/v1/chat/completions"
BODY = b"x" * 400  # a hundred tokens, as far as one can tell


def exchange(endpoint: str = CHAT, *, begun: bool = True, stream: bool = False, **asked: Any) -> Exchange:
    made = Exchange("id", Caller(1, "alice", ()), endpoint, endpoint, "2026-11-21T10:00:00.000Z", 0.0, "w", 10**8)
    made.body, made.asked = BODY, Asked(**{"kind": "json", "stream": stream, **asked})
    made.search = Search(made.caller, Wanted("m", None, 0))
    made.search.claim = Claim(Server(ServerConfig("a", "http://h:1", type="llama.cpp")), 0.0)
    if begun:
        made.relay = Relay(None, Tally(), lambda: 0.0, is_stream=stream)
        made.relay.first_event_at = 0.0
    return made


def row(**more: Any) -> Row:
    known = {"id": "id", "started_at": "2026-11-21T10:00:00.000Z", "outcome": "ok", "worker": "w", "status": 200}
    return Row(**{**known, "endpoint": CHAT, "stream": 0, "response_bytes": 4000, **more})


SAID: dict[str, Any] = {"prompt_tokens": 60, "completion_tokens": 40, "tokens_source": "usage"}
CASES: dict[str, tuple[Exchange, Row, int | None]] = {
    "what was said": (exchange(), row(**SAID), 100),
    "nothing was said": (exchange(), row(), 100 + 1000),
    "nothing was said in a stream": (exchange(stream=True), row(stream=1), 100 + 20),
    "hung up in the midst": (
        exchange(stream=True),
        row(stream=1, outcome="client_closed", completion_tokens=7, tokens_source="counted"),
        107,
    ),
    "hung up before the first event": (exchange(begun=False), row(outcome="client_closed"), None),
    "broken off by the server": (exchange(), row(outcome="upstream_cut", completion_tokens=7), 7),
    "a server's error": (exchange(), row(outcome="error", status=500), None),
    "no answer is written there": (exchange("/v1/embeddings"), row(), 100),
    "only counting": (exchange("/v1/messages/count_tokens"), row(prompt_tokens=60), None),
    "however the path is written": (exchange("/v1/messages/count%5ftokens"), row(prompt_tokens=60), None),
    "an unknown path": (exchange("/v1/new"), row(), None),
    "a form": (exchange("/v1/audio/transcriptions", kind="form"), row(), None),
    "several choices, told of one": (exchange(answers=3), row(**SAID), 60 + 3 * 40),
    "several prompts, told of one": (exchange("/v1/completions", prompts=2, answers=2), row(**SAID), 2 * 60 + 2 * 40),
    "several choices in a stream tell of each": (exchange(stream=True, answers=3), row(stream=1, **SAID), 100),
    "nonsense": (exchange(), row(prompt_tokens=10**15, completion_tokens=-5), MAX_AMOUNT),
}


@pytest.mark.parametrize(("request_", "end", "tokens"), CASES.values(), ids=CASES)
def test_charged(request_: Exchange, end: Row, tokens: int | None) -> None:
    before = told(end)
    assert tokens_of(charged(request_, end)) == tokens
    assert told(end) == before


def test_other_servers_tell_of_all_choices() -> None:
    request = exchange(answers=3)
    assert request.search
    request.search.claim = Claim(Server(ServerConfig("a", "http://h:1", type="openai")), 0.0)
    assert charged(request, row(**SAID)) == Use(60, None, 40, None)
