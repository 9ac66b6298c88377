"""scripts/bench: the parts that are functions, and one short run of the whole. No test judges a time."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmark import accounting, shapes
from benchmark.answer import Answer
from benchmark.dechunk import Dechunk
from benchmark.gateways import by_url
from benchmark.measures import MEASURES, PHASES
from benchmark.report import table
from benchmark.runner import Findings
from benchmark.work import Result

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "tests" / "recorded"
STREAM = shapes.STREAM_HEAD + b"".join(shapes.frames(5))


def keys(value: object) -> object:
    """The shape of a JSON value: its keys in their order, without the values."""
    if isinstance(value, dict):
        return {name: keys(inner) for name, inner in value.items()}
    return [keys(inner) for inner in value] if isinstance(value, list) else None


def events(body: bytes) -> list[object]:
    lines = (line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line)
    return [line if line == b"[DONE]" else json.loads(line) for line in lines]


def head_of(answer: bytes) -> list[bytes]:
    head = answer.partition(b"\r\n\r\n")[0]
    return [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]


def test_the_completion_has_the_shape_of_a_recorded_one() -> None:
    recorded = (RECORDED / "chat.res").read_bytes()
    ours = shapes.completion(6)
    assert head_of(ours) == head_of(recorded)
    bodies = [json.loads(answer.partition(b"\r\n\r\n")[2]) for answer in (ours, recorded)]
    assert list(bodies[0]) == list(bodies[1])
    assert keys(bodies[0]) == keys(bodies[1])


@pytest.mark.parametrize(("name", "include_usage"), [("chat_stream", False), ("chat_stream_usage", True)])
def test_the_stream_has_the_shape_of_a_recorded_one(name: str, include_usage: bool) -> None:
    head, _, body = (RECORDED / f"{name}.res").read_bytes().partition(b"\r\n\r\n")
    recorded = Dechunk().feed(body)
    ours = shapes.payloads(6, include_usage)
    assert head_of(shapes.STREAM_HEAD) == head.split(b"\r\n")
    assert [keys(events(payload)) for payload in ours] == [keys(events(payload)) for payload in recorded]


@pytest.mark.parametrize("step", [1, 2, 7, 100, len(STREAM)])
def test_an_answer_is_the_same_however_it_is_cut(step: int) -> None:
    answer = Answer(streamed=True)
    for at in range(0, len(STREAM), step):
        assert not answer.ended
        answer.feed(STREAM[at : at + step], now=float(at))
    assert answer.ended
    assert not answer.closes
    assert answer.events == 1 + 5 + 2
    assert answer.what_is_wrong(shapes.stream_fingerprint(5)) == ""


@pytest.mark.parametrize(
    ("received", "streamed", "wrong"),
    [
        pytest.param(b"", True, "closed before the answer", id="nothing"),
        pytest.param(STREAM[:-5], True, "cut in the answer", id="no terminator"),
        pytest.param(STREAM.replace(b"good", b"goof"), True, "other bytes than the upstream's", id="another word"),
        pytest.param(STREAM.replace(b"[DONE]", b"[GONE]"), True, "no [DONE]", id="no DONE"),
        pytest.param(STREAM.replace(b"\r\n1e", b"\r\nxx"), True, "broken chunk framing", id="no chunk length"),
        pytest.param(shapes.not_found(), False, "status 404", id="404"),
        pytest.param(shapes.completion(5)[:-9], False, "cut in the answer", id="shorter than Content-Length"),
        pytest.param(shapes.completion(6), False, "other bytes than the upstream's", id="another completion"),
    ],
)
def test_a_wrong_answer_is_an_error(received: bytes, streamed: bool, wrong: str) -> None:
    answer = Answer(streamed=streamed)
    answer.feed(received, now=0.0)
    answer.end_of_file()
    assert answer.what_is_wrong((shapes.stream_fingerprint if streamed else shapes.completion_fingerprint)(5)) == wrong


def test_every_measure_reads_a_phase() -> None:
    assert {measure.phase for measure in MEASURES} == set(PHASES)


def test_the_table_states_medians_ratios_and_errors() -> None:
    def result(p50_ms: float, cpu_s: float | None) -> Result:
        return Result(elapsed_s=1.0, answers=1000, latency_ms=[p50_ms, 9.0], cpu_s=cpu_s)

    findings = Findings(
        sections=frozenset({"cpu", "latency"}),
        results={
            "requests 16": {
                "direct": [result(1.0, None), result(2.0, None), result(3.0, None)],
                "bare": [result(21.0, 1.5), result(22.0, 2.0), result(23.0, 1.9)],
                "ours": [result(6.0, 0.4), result(8.0, 0.5), result(7.0, 0.475)],
            }
        },
        errors={"direct": Counter(), "bare": Counter({"requests 16: status 502": 3}), "ours": Counter()},
    )
    lines = table(findings, ["direct", "bare", "ours"]).splitlines()
    assert "| CPU per request | – | 1,900 µs (1.00×) | 475 µs (0.25×) | ±13% |" in lines
    assert "| latency, 16 in flight, p50 | 2.00 ms | +20.00 ms (1.00×) | +5.00 ms (0.25×) | ±50% |" in lines
    assert lines[-1] == "| wrong or missing answers | 0 | 3 | 0 | |"


def test_another_gateway_by_url() -> None:
    gateway = by_url("other=http://127.0.0.1:4000/proxy/v1,sk-1", {"other": 7})
    seen = (gateway.host, gateway.port, gateway.path, gateway.key, gateway.pid, gateway.exact)
    assert seen == ("127.0.0.1", 4000, "/proxy", "sk-1", 7, False)
    with pytest.raises(ValueError, match="expected NAME="):
        by_url("other=https://example.org", {})


def test_a_short_run_prints_the_table_and_leaves_no_process() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "--quick", "--only", "cpu", "--rows", "bare"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    started: set[int] = set()
    said = ""
    for line in process.stderr:
        said += line
        started |= set(accounting.tree(process.pid)) - {process.pid}
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "| | direct | bare | spread |" in out
    assert "| CPU per streamed chunk | – | " in out
    assert "| wrong or missing answers | 0 | 0 | |" in out
    assert len(started) >= 3  # the upstream, the load, the gateway
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
