"""A process that runs one script: a line of JSON in, a line of JSON out, which gives the question's `id` back.

It is a process of its own, so that what never ends can be ended: the kernel does, `timeout_s` after a question, even
when the gateway is gone. Texts of errors stay here: they may hold the key.
"""

import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gateway.sources.source import ScriptOver, SourceFailed

type Function = Callable[[dict[str, str]], object]


class Request(NamedTuple):
    """What a function of Python is given. `sha256`: of the key. `address`: the client's."""

    key: str
    sha256: str
    address: str


def python(path: str, function: str, options: dict[str, Any]) -> Function:
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("key_source", path)
    if spec is None or spec.loader is None:
        raise SourceFailed("expected the name of a .py file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise SourceFailed(f"has no function {function!r}")

    def call(question: dict[str, str]) -> object:
        try:
            return found(Request(**question))
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            raise SourceFailed(f"throws {type(error).__name__} at line {lines[-1] if lines else '?'}") from None

    return call


def lua(path: str, function: str, options: dict[str, Any]) -> Function:
    from gateway.sources import lua_sandbox

    return lua_sandbox.load(Path(path), function, options)


LANGUAGES = {"python": python, "lua": lua}


def _default(value: object) -> str:
    """Times; what else JSON has no words for is shown as nonsense."""
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise SourceFailed(f"returns a {type(value).__name__}")


def main(language: str, path: str, function: str, options: dict[str, Any]) -> None:
    """`options`: timeout_s, and what the language needs."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a script prints goes to the log
    pid = os.getpid()
    asked = None

    def reply(**fields: object) -> None:
        if os.getpid() != pid:
            os._exit(0)  # a copy that the script has made of its process (fork) has nothing to say
        replies.write(json.dumps({"id": asked, **fields}, default=_default) + "\n")
        replies.flush()

    try:
        call = LANGUAGES[language](path, function, options)
    except SourceFailed as problem:
        return reply(problem=str(problem))
    except Exception as error:
        return reply(problem=f"{type(error).__name__}: {error}")
    reply(ready=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, options["timeout_s"])
        question = json.loads(line)
        asked = question.pop("id")
        try:
            reply(answer=call(question))
        except SourceFailed as problem:
            is_over = isinstance(problem, ScriptOver)
            reply(problem=str(problem), is_over=is_over)
            if is_over:
                return None
        except (ValueError, TypeError, RecursionError) as error:
            reply(problem=f"returns what is no JSON ({type(error).__name__})")
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None
