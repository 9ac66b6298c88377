"""Which workers are alive: each holds a lock on a file of its own, for as long as it lives."""

import fcntl
import os
from pathlib import Path


class WorkerLock:
    """A locked file per worker: the kernel frees it however the worker ends, and no PID can be mistaken for another."""

    def __init__(self, folder: Path, worker: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / worker
        while True:
            self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if os.fstat(self._file).st_nlink:
                break
            os.close(self._file)  # before it was locked, another worker took it for a dead one's

    def others(self) -> set[str]:
        return {path.name for path in self._path.parent.iterdir()} - {self._path.name}

    def is_dead(self, worker: str) -> bool:
        """Whether nobody holds that worker's lock; then its file is removed."""
        path = self._path.parent / Path(worker or "-").name
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            path.unlink(missing_ok=True)
            return True
        finally:
            os.close(file)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._file)
