# Sourced by the scripts beside it: `use LOCKFILE` sets $python to an interpreter that has what LOCKFILE pins.
# Needs nothing but a Python >= 3.12; .venv is made at the first call, and again when the lock file has changed.

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd) || exit 1

find_python() { # prints the path of the first interpreter that runs and is new enough
    # From the root, where version managers (pyenv, asdf, mise) read .python-version; a shim may be there and yet fail.
    cd "$root" || return 1
    for candidate in ${PYTHON:+"$PYTHON"} python3.14 python3.13 python3.12 python3 python; do
        "$candidate" -c 'import sys; sys.version_info >= (3, 12) or sys.exit(1); print(sys.executable)' 2>/dev/null && return
    done
    return 1
}

use() { # LOCKFILE, relative to the root
    python=$root/.venv/bin/python
    "$python" -I "$root/scripts/make_venv.py" --check "$1" 2>/dev/null && return
    found=$(find_python) || {
        echo "llmproxy needs Python 3.12 or newer: install it, or name one, as in PYTHON=/path/to/python3.13 $0" >&2
        exit 1
    }
    "$found" -I "$root/scripts/make_venv.py" "$1" || exit 1
}
