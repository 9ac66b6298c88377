"""Child processes that end with the bench, however it ends."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from supervisor import StartFailedError, die_with_parent

SCRIPTS = Path(__file__).resolve().parent.parent
_STOP_WITHIN_S = 5.0
_READY_WITHIN_S = 60.0
_POLL_S = 0.05


class Processes:
    """A temporary folder and the processes started in it; leaving it stops them and removes the folder."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llmproxy-bench-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.stop(self._running)
        finally:
            self._folder.cleanup()

    def start(self, name: str, argv: Sequence[str], *, piped: bool = False) -> subprocess.Popen[str]:
        """What it says goes to NAME.log in the folder; with `piped` its standard output comes back instead."""
        with self.log(name).open("a") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else log,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": str(SCRIPTS)} if piped else None,
                process_group=0,
                preexec_fn=die_with_parent(),
            )
        self._running.append(process)
        return process

    def start_part(self, module: str, *argv: str) -> subprocess.Popen[str]:
        """A module of this package as a process; it ends when its standard input does."""
        return self.start(module, [sys.executable, "-m", f"benchmark.{module}", *argv], piped=True)

    def stop(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        for process in processes:
            _signal_group(process, signal.SIGTERM)
        for process in processes:
            try:
                process.wait(_STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGKILL)
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._running = [process for process in self._running if process not in processes]

    def wait_until(self, process: subprocess.Popen[str], name: str, is_ready: Callable[[], bool]) -> None:
        """Raises StartFailedError when it ends, or is not ready in time."""
        deadline = time.monotonic() + _READY_WITHIN_S
        while not is_ready():
            if process.poll() is not None:
                raise StartFailedError(f"{name} ended with {process.returncode}:\n{self.last_words(name)}")
            if time.monotonic() > deadline:
                raise StartFailedError(f"{name} was not ready within {_READY_WITHIN_S:g} s:\n{self.last_words(name)}")
            time.sleep(_POLL_S)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def last_words(self, name: str) -> str:
        return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-15:])


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)
