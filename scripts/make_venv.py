"""Makes .venv from a lock file with uv when it is on PATH, else with pip: `make_venv.py [--check] LOCKFILE`.

Runs on the bare interpreter, so it imports the standard library alone. Of several at once one works, the others wait.
What an interrupted one left behind is made anew, since a half-installed package looks installed.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UNFINISHED = VENV / "unfinished"


def stamp(lock: Path) -> Path:
    """The file that stands for "this lock is installed": a new lock or another Python makes another name."""
    version = f"{sys.implementation.cache_tag}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    return VENV / f"installed-{version}"


def installed(lock: Path) -> bool:
    return stamp(lock).exists() and not UNFINISHED.exists()


@contextmanager
def alone() -> Iterator[int]:
    """Yields the descriptor that holds the lock: a pip that outlives this process keeps it by inheritance."""
    with (ROOT / ".venv.lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def run(*command: str | Path, lock_fd: int) -> bool:
    """Only what goes wrong is shown: the tools' progress stays out of the scripts' output."""
    silent = subprocess.DEVNULL
    return subprocess.run(command, stdin=silent, stdout=silent, pass_fds=[lock_fd], check=False).returncode == 0


def usable() -> bool:
    """Whether what is in .venv can be added to: whole, and run by the Python that runs this."""
    if UNFINISHED.exists() or not PYTHON.exists():
        return False
    probe = [str(PYTHON), "-Ic", "import sys; print(sys.implementation.cache_tag)"]
    answer = subprocess.run(probe, capture_output=True, text=True, check=False)
    return answer.stdout.strip() == sys.implementation.cache_tag


def install(lock: Path, lock_fd: int) -> None:
    if not usable():
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
    UNFINISHED.touch()
    if not run(sys.executable, "-Im", "venv", "--without-pip", VENV, lock_fd=lock_fd):
        raise SystemExit(f"{sys.executable} cannot make virtual environments: install its venv module and try again")
    if not (with_uv(lock, lock_fd) or with_pip(lock, lock_fd)):
        raise SystemExit(f"installing {lock.name} failed: see above; the next start tries again")
    stamp(lock).touch()
    UNFINISHED.unlink()


def with_uv(lock: Path, lock_fd: int) -> bool:
    uv = shutil.which("uv")
    if uv is None:
        return False
    os.environ.setdefault("UV_SYSTEM_CERTS", "true")  # as pip does: a firm's own authority is known to the system only
    uv_pip = (uv, "pip", "install", "--quiet", "--python", str(PYTHON))
    if run(*uv_pip, "--require-hashes", "--no-deps", "--requirement", lock, lock_fd=lock_fd):
        return True
    print("uv could not install it: trying pip ...", file=sys.stderr, flush=True)
    return False


def with_pip(lock: Path, lock_fd: int) -> bool:
    """Also tried when uv fails: pip may be configured for a registry of which uv knows nothing."""
    if not run(PYTHON, "-Im", "ensurepip", lock_fd=lock_fd):
        raise SystemExit(f"{sys.executable} comes without pip: install its venv package (python3-venv), or uv")
    # A lock names everything that is needed: nothing is left to resolve, hence --no-deps.
    pip = (str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq")
    return run(*pip, "--require-hashes", "--no-deps", "--requirement", lock, lock_fd=lock_fd)


def main() -> None:
    *options, name = sys.argv[1:]
    lock = ROOT / name
    if options == ["--check"]:
        raise SystemExit(0 if installed(lock) else 1)
    with alone() as lock_fd:
        if installed(lock):  # by the one we waited for
            return
        print(f"Installing {name} into .venv: about a minute at the first start ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        install(lock, lock_fd)
        print(f"Installed in {time.monotonic() - began:.0f} s.", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
