"""The servers that other tests stand on: generated models on a real llama-server do what their fixtures promise."""

import json
from pathlib import Path

import httpx
import pytest

from llama import LlamaServer, Model, ServerFailedError, model_file, start_server
from llama.make_gguf import write_model

ASK = {"messages": [{"role": "user", "content": "tell me about the world"}], "seed": 7, "max_tokens": 12}


def events(text: str) -> list[str]:
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event]


def test_chat(tiny: LlamaServer) -> None:
    answer = httpx.post(f"{tiny.url}/v1/chat/completions", json=ASK | {"ignore_eos": True}).json()
    assert answer["model"] == "tiny"
    assert answer["usage"]["completion_tokens"] == 12
    assert len(answer["choices"][0]["message"]["content"].split()) > 6


def test_chat_streamed(tiny: LlamaServer) -> None:
    whole = httpx.post(f"{tiny.url}/v1/chat/completions", json=ASK).json()
    with httpx.stream("POST", f"{tiny.url}/v1/chat/completions", json=ASK | {"stream": True}) as response:
        assert response.headers["content-type"] == "text/event-stream"
        *parts, done = events(response.read().decode())
    assert done == "[DONE]"
    text = "".join(json.loads(part)["choices"][0]["delta"].get("content") or "" for part in parts)
    assert text == whole["choices"][0]["message"]["content"]


def test_think(think: LlamaServer) -> None:
    message = httpx.post(f"{think.url}/v1/chat/completions", json=ASK | {"max_tokens": 200}).json()["choices"][0][
        "message"
    ]
    assert message["reasoning_content"]
    assert message["content"]


def test_tools(tools: LlamaServer) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    body = ASK | {"tools": [tool], "tool_choice": "required", "max_tokens": 60}
    message = httpx.post(f"{tools.url}/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "look"


def test_embeddings(embeddings: LlamaServer) -> None:
    answer = httpx.post(f"{embeddings.url}/v1/embeddings", json={"input": ["the world", "a house"]}).json()
    assert [len(item["embedding"]) for item in answer["data"]] == [64, 64]
    assert answer["usage"]["prompt_tokens"] > 0


def test_rerank(rerank: LlamaServer) -> None:
    body = {"query": "world", "documents": ["the world", "a house"]}
    answer = httpx.post(f"{rerank.url}/v1/rerank", json=body).json()
    assert {result["index"] for result in answer["results"]} == {0, 1}


def test_endless(endless: LlamaServer) -> None:
    answer = httpx.post(f"{endless.url}/v1/messages", json=ASK | {"max_tokens": 500}).json()
    assert answer["usage"]["output_tokens"] == 500


def test_flags(model_cache: Path) -> None:
    draft = model_file(model_cache, Model())
    flags = (
        "--api-key",
        "sk-1",
        "--parallel",
        "2",
        "--ctx",
        "512",
        "--cache-ram",
        "0",
        "--ping",
        "1",
        "--draft",
        str(draft),
    )
    with start_server(model_cache, Model(), *flags) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer sk-1"}) as client:
            slots = client.get("/slots").json()
            assert [slot["n_ctx"] for slot in slots] == [512, 512]
            answer = client.post("/v1/chat/completions", json=ASK | {"max_tokens": 40, "ignore_eos": True}).json()
            assert answer["timings"]["draft_n"] > 0


def test_a_unified_pool_runs_out(model_cache: Path) -> None:
    with start_server(model_cache, Model(mean_len=0), "--unified", "--ctx", "512", "--parallel", "2") as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=ASK | {"max_tokens": 2000, "n": 2}, timeout=60)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "Context size has been exceeded."


@pytest.mark.parametrize(("end", "status"), [(LlamaServer.stop, -15), (LlamaServer.kill, -9)])
def test_end_and_start_on_the_same_port(model_cache: Path, end: object, status: int) -> None:
    assert callable(end)
    server = start_server(model_cache)
    end(server)
    assert server.process.returncode == status
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    with start_server(model_cache, port=server.port) as again:
        assert again.url == server.url
        with pytest.raises(ServerFailedError, match="Failed to init server"):
            start_server(model_cache, port=server.port)


def test_the_same_model_is_the_same_file(model_cache: Path, tmp_path: Path) -> None:
    path = model_file(model_cache, Model())
    assert path == model_file(model_cache, Model()) != model_file(model_cache, Model(seed=2))
    write_model(Model(), tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    assert path.stat().st_size < 500_000
