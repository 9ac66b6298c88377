"""A script as a source: processes that run it, one for each question that is asked at the same time.

A changed file is run at the next question. An answer counts when it gives the question's random id back, and a process
that says anything else is ended: what belongs to one key must never answer for another.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gateway.sources import answers, script_child
from gateway.sources.pool import Pool
from gateway.sources.settings import Lua, Python
from gateway.sources.source import Answer, Asked, ScriptOver, SourceFailed
from gateway.yaml_text import ConfigError

# Python itself, and what a script imports.
START_S = 15.0
MAX_REPLY_BYTES = 100_000
ADDON = Path(script_child.__file__).parents[2]
CHILD = f"""
import json, sys
addon, arguments = json.loads(sys.argv[1])
sys.path.append(addon)
from {script_child.__name__} import main
main(*arguments)
"""


class Script:
    """Raises ConfigError when the script can't be used. `options`: for `script_child`. `env` None: the gateway's."""

    def __init__(
        self,
        language: str,
        settings: Python | Lua,
        options: dict[str, Any],
        env: dict[str, str] | None = None,
    ) -> None:
        path = settings.path
        self._path = path
        self._answers = answers.Reader(settings)
        self._timeout_s: float = options["timeout_s"]
        arguments = [language, str(path), settings.function, options]
        self._command = [sys.executable, "-I", "-X", "utf8", "-c", CHILD, json.dumps([str(ADDON), arguments])]
        self._env = env
        self._pool = Pool(self._start, lambda child: child.close())
        try:
            self._seen = self._version()
            with self._pool.one():
                pass
        except SourceFailed as error:
            raise ConfigError(f"path: {path} {error}") from None

    def close(self) -> None:
        self._pool.close()

    def find(self, asked: Asked) -> Answer:
        """Raises SourceFailed."""
        try:
            asked.key.encode()
        except UnicodeEncodeError:
            return None
        version = self._version()
        if version != self._seen:
            self._pool.clear()
            self._seen = version
        question = {"key": asked.key, "sha256": asked.sha256, "address": asked.address}
        with self._pool.one() as child:
            reply = child.ask(question, self._timeout_s)
            if reply.get("is_over"):
                raise ScriptOver(reply["problem"])
        if "problem" in reply:
            raise SourceFailed(reply["problem"])
        return self._answers.read(reply.get("answer"))

    def _start(self) -> "_Child":
        child = _Child(self._command, self._env)
        try:
            reply = child.read(None, START_S)
            if "problem" in reply:
                raise SourceFailed(reply["problem"])
        except SourceFailed:
            child.close()
            raise
        return child

    def _version(self) -> tuple[int, int, int]:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise SourceFailed(f"can't be read: {error.strerror}") from None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


class PythonScript(Script):
    """It may import what the gateway's environment has."""

    def __init__(self, settings: Python) -> None:
        super().__init__("python", settings, {"timeout_s": settings.timeout_s})


class LuaScript(Script):
    """It has nothing but its argument: see lua_sandbox."""

    def __init__(self, settings: Lua) -> None:
        if importlib.util.find_spec("lupa") is None:
            raise ConfigError("type lua needs lupa, which is not installed: run scripts/extras")
        options = {
            "timeout_s": settings.timeout_s,
            "max_instructions": settings.max_instructions,
            "max_memory_bytes": int(settings.max_memory_mb * 1_000_000),
        }
        super().__init__("lua", settings, options, env={})


class _Child:
    """One process. It ends with its last reader."""

    def __init__(self, command: list[str], env: dict[str, str] | None) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            bufsize=0,
            start_new_session=True,  # what a terminal sends to the gateway is not for it
        )
        self._poll = select.poll()
        self._poll.register(self._process.stdout, select.POLLIN)  # type: ignore[arg-type]

    def ask(self, question: dict[str, str], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin
        if self._poll.poll(0):
            raise SourceFailed("has ended, or has said something without being asked")
        question_id = secrets.token_hex()
        try:
            self._process.stdin.write(json.dumps({**question, "id": question_id}).encode() + b"\n")
        except OSError:
            raise SourceFailed("has ended") from None
        return self.read(question_id, timeout_s)

    def read(self, question_id: str | None, timeout_s: float) -> dict[str, Any]:
        """`question_id` None: what it says when it has started. Raises SourceFailed."""
        pipe, reply = self._process.stdout, b""
        assert pipe
        deadline = time.monotonic() + timeout_s
        while not reply.endswith(b"\n"):
            if not self._poll.poll(max(0, deadline - time.monotonic()) * 1000):
                raise SourceFailed(f"does not answer within {timeout_s:g} s")
            piece = pipe.read(MAX_REPLY_BYTES)
            if not piece:
                raise SourceFailed("ended without an answer: its time was over, or it crashed")
            reply += piece
            if len(reply) > MAX_REPLY_BYTES:
                raise SourceFailed(f"answers with more than {MAX_REPLY_BYTES:,} bytes")
        try:
            found = json.loads(reply)
        except (ValueError, RecursionError):
            raise SourceFailed("says more than its answer") from None
        if not isinstance(found, dict) or "id" not in found or found["id"] != question_id:
            raise SourceFailed("answers another question")
        return found

    def close(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with the processes that the script has started
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        self._process.wait()
