"""Real llama-servers within a moment, for the demo, the tests and the benches.

The server is llama.cpp's own (the xllamacpp wheel compiles it in) and its model is a generated one with random weights:
0.4 MB, ready in a tenth of a second, thousands of tokens per second on one thread. Nothing is downloaded.

    with start_server(cache, Model(think_len=12), "--think") as server:
        httpx.post(f"{server.url}/v1/chat/completions", json={"messages": [...]})
"""

import hashlib
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_HERE = Path(__file__).parent
_LOG_TAIL = 3000  # characters, enough for llama.cpp's reason of a failed start


class ServerFailedError(RuntimeError):
    """The server ended, or said nothing in time, before it was ready. Holds the end of its log."""


@dataclass(frozen=True)
class Model:
    """What the generated model is like. Lengths are means in tokens, at temperature 1; 0: that token never comes."""

    name: str = "tiny-random"
    layers: int = 2
    embd: int = 64  # a multiple of 32; 256 with 4 layers makes prompts slow enough to see a prompt cache work
    ctx: int = 131072
    seed: int = 1
    mean_len: float = 64  # of an answer; 0: it ends at max_tokens only
    think_len: float = 0  # up to </think>, for a server with --think
    tool_len: float = 0  # up to <tool_call>
    rerank: bool = False  # for a server with --rerank


def model_file(cache: Path, model: Model) -> Path:
    """The file of this model, made once: its name tells the model and the generator that wrote it."""
    generator = _HERE / "make_gguf.py"
    digest = hashlib.sha256(repr(model).encode() + generator.read_bytes()).hexdigest()[:12]
    path = cache / f"{model.name}-{digest}.gguf"
    if not path.exists():
        from llama.make_gguf import write_model  # here, since numpy takes half a second and the file is mostly there

        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            # Written beside its place and moved there, so that nobody ever loads half a file.
            part = Path(folder) / path.name
            write_model(model, part)
            part.replace(path)
    return path


class LlamaServer:
    """A running server, as a context manager. `url` has no slash at its end; `log()` is what the server wrote."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
        self.process = process
        self.url = url
        self.port = int(url.rpartition(":")[2])
        self.pid = process.pid
        self._log_path = log_path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def stop(self) -> None:
        """SIGTERM: llama.cpp ends at once and cuts what is running."""
        self.process.terminate()
        self._reap()

    def kill(self) -> None:
        self.process.kill()
        self._reap()

    def _reap(self) -> None:
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


def start_server(
    cache: Path, model: Model | None = None, *flags: str, port: int = 0, ready_within_s: float = 60
) -> LlamaServer:
    """Start one server and wait until its model is loaded.

    `flags` are those of serve_model.py. `cache` keeps the model file and the server's log. Port 0 is any free port: the
    system picks it as the server binds. The server ends with this process, however that ends: it watches a pipe from
    here. Raises ServerFailedError.
    """
    path = model_file(cache, model or Model())
    handle, log_name = tempfile.mkstemp(dir=cache, prefix="llama-server-", suffix=".log")
    command = [sys.executable, str(_HERE / "serve_model.py"), str(path), "--port", str(port), "--until-eof", *flags]
    with os.fdopen(handle, "wb") as log:
        # Ctrl-C is for whoever started it: the server would stall its streams while they still drain.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, process_group=0)
    ready = _first_line(process, ready_within_s)
    if not ready.startswith("READY "):
        process.kill()
        process.communicate()
        raise ServerFailedError(f"{' '.join(command)}\n{Path(log_name).read_text(errors='replace')[-_LOG_TAIL:]}")
    return LlamaServer(process, ready.split()[1], Path(log_name))


def _first_line(process: subprocess.Popen[bytes], within_s: float) -> str:
    """What the process says first; empty when it ends or stays silent."""
    assert process.stdout
    readable, _, _ = select.select([process.stdout], [], [], within_s)
    return process.stdout.readline().decode() if readable else ""
