"""What does not fit into a server's slots waits in the gateway, not for ever, and not in the way of those who left."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dialects import CHAT
from h2client import Http2
from pairs import CALM, SCRIPTED, SSE, Actor, good_body, good_reply, health, let_play, row_of
from proxy import Key, Proxy
from rawhttp import Answer, Connection, post, request
from upstream import CLOSE, STALL, Upstream, chunk, reply
from waiting import eventually

BODY = b'{"model":"tiny"}'
HELD = (STALL, good_reply("only"))


@dataclass
class Bench:
    """One server with one slot; two more for a test that needs them."""

    proxy: Proxy
    key: Key
    upstream: Upstream
    server: Actor
    two: list[Upstream]  # the servers of the model `two`, one slot each
    pool: ThreadPoolExecutor

    def submit(self, body: bytes = BODY) -> Future[Answer]:
        return self.pool.submit(post, self.proxy.port, CHAT, self.key, body)

    def hold(self) -> Future[Answer]:
        """A request that takes the slot until `release`."""
        before = len(self.server.times)
        self.server.plan(HELD)
        asked = self.submit()
        eventually(lambda: len(self.server.times) > before, "the request at the server")
        self.upstream.wait_stalled()
        return asked

    def release(self) -> None:
        self.upstream.release()

    def wait_waiting(self, count: int) -> None:
        eventually(lambda: health(self.proxy)["waiting"] == count, f"{count} that wait")


@contextmanager
def bench(folder: Path, confdir: Path, **queue: Any) -> Iterator[Bench]:
    with Upstream() as upstream, Upstream() as one, Upstream() as other:
        server = Actor("only", upstream)
        let_play(upstream, {"tiny": server})
        servers = [
            {"name": name, "url": of.url, "models": [model], **SCRIPTED, "slots": 1}
            for name, of, model in (("only", upstream, "tiny"), ("one", one, "two"), ("other", other, "two"))
        ]
        with (
            Proxy(folder, servers, confdir=confdir, **{**CALM, "queue": queue}) as proxy,
            ThreadPoolExecutor(24) as pool,
        ):
            yield Bench(proxy, proxy.create_key("alice"), upstream, server, [one, other], pool)
            print(f"--- log of {folder.name}\n{proxy.log()[-6000:]}")
        assert "Traceback" not in proxy.log()


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("patient"), confdir) as made:
        yield made


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("strict"), confdir, max_length=1, max_wait_s=0.5) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test loses a slot, or leaves somebody in the queue."""
    names = {"patient", "strict"} & set(request.fixturenames)
    used: list[Bench] = [request.getfixturevalue(name) for name in names]
    for one in used:
        one.server.reset()
    yield
    for one in used:
        one.release()
        eventually(lambda one=one: health(one.proxy)["running"] == 0, "the end of all claims")  # type: ignore[misc]
        assert health(one.proxy)["waiting"] == 0
        one.server.reset()
        assert one.submit().result(timeout=5).body == good_body("only")
        metrics = one.proxy.client().get("/metrics").text
        assert 'llmproxy_running{server="only"} 0' in metrics


def is_refused(answer: Answer) -> None:
    assert (answer.status, answer.code) == (503, "no_server_available")
    assert int(answer.value("retry-after") or 0) >= 1


# -- waiting -----------------------------------------------------------------------------------------------------------


def test_a_second_request_waits(patient: Bench) -> None:
    one = patient.hold()
    other = patient.submit()
    patient.wait_waiting(1)
    assert len(patient.server.times) == 1
    assert health(patient.proxy)["running"] == 1
    patient.release()
    answers = [one.result(timeout=5), other.result(timeout=5)]
    assert [answer.body for answer in answers] == [good_body("only")] * 2
    first, second = (row_of(patient.proxy, answer) for answer in answers)
    assert (first["outcome"], first["attempts"], second["outcome"], second["attempts"]) == ("ok", 1, "ok", 1)
    assert 0 <= first["queue_ms"] < second["queue_ms"] <= second["duration_ms"]


def test_one_at_a_time(patient: Bench) -> None:
    """Nobody is forgotten, and the server never has more than it has slots for."""
    most = 0

    def answer(_: object) -> bytes:
        nonlocal most
        most = max(most, health(patient.proxy)["running"])
        return reply({"choices": []})

    patient.server.always = answer
    asked = [patient.submit() for _ in range(20)]
    assert {one.result(timeout=10).status for one in asked} == {200}
    assert most == 1


def test_a_failing_server_gives_the_slot_back(patient: Bench) -> None:
    stream = b'{"model":"tiny","stream":true}'
    event = chunk('data: {"choices":[]}\n\n')
    for fault in (CLOSE, reply({}, 500), (SSE, CLOSE), (SSE, event, CLOSE), b"garbage\r\n\r\n"):
        patient.server.always = (fault, CLOSE) if isinstance(fault, bytes) else fault
        assert [one.result(timeout=10) for one in [patient.submit(stream) for _ in range(4)]]


# -- full, and too long ------------------------------------------------------------------------------------------------


def test_the_queue_is_full(strict: Bench) -> None:
    one = strict.hold()
    other = strict.submit()
    strict.wait_waiting(1)
    answer = strict.submit().result(timeout=5)
    is_refused(answer)
    row = row_of(strict.proxy, answer)
    assert (row["outcome"], row["status"], row["error_code"]) == ("refused", 503, "no_server_available")
    assert (row["attempts"], row["server"]) == (0, None)
    strict.release()
    assert [one.result(timeout=5).status, other.result(timeout=5).status] == [200, 200]


def test_waited_for_too_long(strict: Bench) -> None:
    one = strict.hold()
    answer = strict.submit().result(timeout=5)
    is_refused(answer)
    row = row_of(strict.proxy, answer)
    assert (row["outcome"], row["error_code"], row["attempts"]) == ("refused", "no_server_available", 0)
    assert 400 < row["queue_ms"] < 4000
    assert len(strict.server.times) == 1
    strict.release()
    assert one.result(timeout=5).status == 200


# -- leaving -----------------------------------------------------------------------------------------------------------


def test_who_hangs_up_leaves_the_queue(patient: Bench) -> None:
    one = patient.hold()
    with Connection(patient.proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, patient.key, BODY))
        patient.wait_waiting(1)
    left(patient, one)


def test_who_resets_a_stream_leaves_the_queue(patient: Bench) -> None:
    """Over HTTP/2, where the connection stays."""
    one = patient.hold()
    with Http2(patient.proxy.port) as connection:
        stream = connection.post(CHAT, patient.key, BODY)
        patient.wait_waiting(1)
        connection.reset(stream)
        left(patient, one)
        again = connection.answer(connection.post(CHAT, patient.key, BODY))
        assert (again.complete, again.body) == (True, good_body("only"))


def left(bench: Bench, running: Future[Answer]) -> None:
    """It is gone at once, was never sent, and has a row that says so."""
    bench.wait_waiting(0)
    row = eventually(
        lambda: bench.proxy.query("select * from requests where outcome = 'client_closed' order by id desc limit 1"),
        "its row",
    )[0]
    assert (row["attempts"], row["status"]) == (0, None)
    bench.release()
    assert running.result(timeout=5).status == 200
    assert len(bench.server.times) == 1


def test_who_hangs_up_makes_room(patient: Bench) -> None:
    """For the next in the queue."""
    patient.server.plan(STALL)
    with Connection(patient.proxy.port) as connection:
        connection.sock.sendall(request("POST", CHAT, patient.key, BODY))
        patient.upstream.wait_stalled()
        other = patient.submit()
        patient.wait_waiting(1)
    assert other.result(timeout=5).body == good_body("only")


def test_who_hangs_up_of_many(patient: Bench) -> None:
    """Every second one in the queue leaves; the others are served."""
    one = patient.hold()
    stay: list[Future[Answer]] = []
    with ThreadPoolExecutor(1):
        for number in range(5):
            connection = Connection(patient.proxy.port)
            connection.sock.sendall(request("POST", CHAT, patient.key, BODY))
            patient.wait_waiting(number + 1)
            stay.append(patient.submit())
            patient.wait_waiting(number + 2)
            connection.reset()
            patient.wait_waiting(number + 1)
    patient.release()
    assert [asked.result(timeout=5).status for asked in (one, *stay)] == [200] * 6
    assert len(patient.server.times) == 6


# -- two servers -------------------------------------------------------------------------------------------------------


def test_the_first_free_slot_is_taken(patient: Bench) -> None:
    one, other = patient.two
    for name, upstream in (("one", one), ("other", other)):
        upstream.always(CHAT, (STALL, good_reply(name)))
    body = b'{"model":"two"}'
    asked = [patient.submit(body) for _ in range(2)]
    for upstream in (one, other):
        upstream.wait_stalled()
    third = patient.submit(body)
    patient.wait_waiting(1)
    other.release()
    patient.wait_waiting(0)
    eventually(lambda: len(_posts(other)) == 2, "the request at the server that got free")
    other.wait_stalled()
    one.release()
    other.release()
    assert third.result(timeout=5).body == good_body("other")
    assert {done.result(timeout=5).body for done in asked} == {good_body("one"), good_body("other")}


def _posts(upstream: Upstream) -> list[Any]:
    return [one for one in upstream.requests if one.method == "POST"]
