"""SIGTERM: running streams end well, what takes too long is cut, all is booked; a second one ends at once."""

import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse

import pytest

from conftest import StartLlama, StartProxy
from llama import Model
from proxy import Key, Proxy
from upstream import STALL, Step, Upstream, chunk, head, reply
from waiting import eventually

STREAMS = 50
TOKENS = 150
TIMEOUT_S = 60
EVENT = 'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
STUCK: list[Step] = [head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked"), chunk(EVENT), STALL]


def post(connection: HTTPConnection, key: Key, name: str, model: str = "tiny", **more: object) -> None:
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "go"}], **more}
    headers = {**key.headers, "x-request-id": name, "content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)


@contextmanager
def connected(proxy: Proxy) -> Iterator[HTTPConnection]:
    """A connection that is open, and known to be: it has had an answer."""
    with closing(HTTPConnection("127.0.0.1", proxy.port, timeout=TIMEOUT_S)) as connection:
        assert status(connection) == 200
        yield connection


def status(connection: HTTPConnection, path: str = "/health") -> int:
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    return response.status


def refuses(proxy: Proxy) -> bool:
    with closing(HTTPConnection("127.0.0.1", proxy.port, timeout=TIMEOUT_S)) as connection:
        try:
            connection.connect()
        except ConnectionRefusedError:
            return True
    return False


def test_50_running_streams_end_well(start_proxy: StartProxy, start_llama: StartLlama) -> None:
    flags = ("--alias", "endless", "--parallel", str(STREAMS), "--ctx", "512", "--http-threads", str(STREAMS + 8))
    proxy = start_proxy([{"name": "a", "url": start_llama(Model(mean_len=0), *flags).url}], drain_s=60)
    key = proxy.create_key("alice")
    began = [threading.Event() for _ in range(STREAMS)]
    data = [b""] * STREAMS

    def run(number: int) -> None:
        with closing(HTTPConnection("127.0.0.1", proxy.port, timeout=TIMEOUT_S)) as connection:
            post(connection, key, f"stream-{number}", "endless", max_tokens=TOKENS)
            response = connection.getresponse()
            while piece := response.read1(1 << 16):
                data[number] += piece
                began[number].set()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(STREAMS)]
    for thread in threads:
        thread.start()
    with connected(proxy) as for_health, connected(proxy) as for_request:
        for event in began:
            assert event.wait(TIMEOUT_S)
        running = sum(b"[DONE]" not in part for part in data)
        assert proxy.process
        proxy.process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses(proxy), "the port's end")
        # Those who are still connected hear why.
        assert status(for_health) == 503
        post(for_request, key, "late", "endless", max_tokens=1)
        late = for_request.getresponse()
        assert (late.status, json.loads(late.read())["error"]["code"]) == (503, "shutting_down")
    for thread in threads:
        thread.join()
    assert proxy.wait(TIMEOUT_S) == 0
    assert running > STREAMS / 2, "too few streams ran when SIGTERM came: this test has shown nothing"
    assert [part.endswith(b"data: [DONE]\n\n") for part in data] == [True] * STREAMS
    rows = {row["client_request_id"]: (row["outcome"], row["completion_tokens"]) for row in proxy.rows()}
    assert rows == {f"stream-{number}": ("ok", TOKENS) for number in range(STREAMS)}


class Waiting:
    """Clients of answers that never end, and one that waits for its first byte."""

    def __init__(self, proxy: Proxy, upstream: Upstream, stack: ExitStack) -> None:
        self.key = proxy.create_key("alice")
        self.connections = [
            stack.enter_context(closing(HTTPConnection("127.0.0.1", proxy.port, timeout=TIMEOUT_S))) for _ in range(4)
        ]
        self.responses: list[HTTPResponse] = []
        upstream.always("/v1/chat/completions", STUCK)
        for number, connection in enumerate(self.connections[:3]):
            post(connection, self.key, str(number))
            self.responses.append(connection.getresponse())
            assert self.responses[-1].read1(100)
        upstream.always("/v1/chat/completions", STALL)
        post(self.connections[3], self.key, "3")
        upstream.wait_stalled(4)

    def are_cut(self) -> None:
        for response in self.responses:
            with pytest.raises((OSError, HTTPException)):
                _whole(response)
        with pytest.raises((OSError, HTTPException)):
            self.connections[3].getresponse()


def _whole(response: HTTPResponse) -> None:
    while response.read1(1 << 16):
        pass
    if not response.isclosed():
        raise ConnectionError
    # http.client takes a chunked answer without its last chunk for complete when read in pieces
    raise ConnectionError if response.chunk_left is not None else AssertionError("the answer ended well")


INTERRUPTED = {str(number): ("interrupted", "shutdown") for number in range(4)}


def test_what_takes_longer_than_drain_s_is_cut(start_proxy: StartProxy, upstream: Upstream) -> None:
    proxy = start_proxy([{"name": "a", "url": upstream.url, "models": ["tiny"]}], drain_s=1)
    with ExitStack() as stack:
        waiting = Waiting(proxy, upstream, stack)
        assert proxy.stop() == 0
        waiting.are_cut()
    assert {row["client_request_id"]: (row["outcome"], row["error_code"]) for row in proxy.rows()} == INTERRUPTED


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_at_once(start_proxy: StartProxy, upstream: Upstream, second: signal.Signals) -> None:
    proxy = start_proxy([{"name": "a", "url": upstream.url, "models": ["tiny"]}], drain_s=600)
    with ExitStack() as stack:
        waiting = Waiting(proxy, upstream, stack)
        assert proxy.process
        proxy.process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses(proxy), "the drain's begin")
        proxy.process.send_signal(second)
        assert proxy.wait() == 0
        waiting.are_cut()
    assert {row["client_request_id"]: (row["outcome"], row["error_code"]) for row in proxy.rows()} == INTERRUPTED


def test_a_client_that_leaves_ends_the_drain(start_proxy: StartProxy, upstream: Upstream) -> None:
    proxy = start_proxy([{"name": "a", "url": upstream.url, "models": ["tiny"]}], drain_s=600)
    with ExitStack() as stack:
        Waiting(proxy, upstream, stack)
        assert proxy.process
        proxy.process.send_signal(signal.SIGTERM)
        eventually(lambda: refuses(proxy), "the drain's begin")
    assert proxy.wait() == 0
    assert Counter(row["outcome"] for row in proxy.rows()) == {"client_closed": 4}


def test_with_nothing_running_it_just_ends(start_proxy: StartProxy, upstream: Upstream) -> None:
    upstream.plan(reply({}), path="/v1/chat/completions")
    proxy = start_proxy([{"name": "a", "url": upstream.url, "models": ["tiny"]}], drain_s=600)
    key = proxy.create_key("alice")
    with connected(proxy) as idle:
        post(idle, key, "0")
        assert idle.getresponse().read() == b"{}"
        assert proxy.stop() == 0
    assert [row["outcome"] for row in proxy.rows()] == ["ok"]
    proxy.start()
    assert len(proxy.rows()) == 1
