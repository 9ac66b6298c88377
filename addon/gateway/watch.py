"""One file, looked at every now and then: has its content changed?

A look costs a `stat`; only when that differs the file is read. A change counts once two looks in a row have seen the
same, since whoever writes may not be done. The file may be replaced, be a link that is, or be gone: that is a content
like any other.
"""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from gateway.keys import iso
from gateway.small_files import read_small

type _Stat = tuple[int, ...]


class FileWatch:
    """All methods block. `path` need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.take()

    def take(self) -> None:
        """The file as it is now is known: what differs from this is a change."""
        self._known = self._last = self._stat()
        self._digest = self._read()

    @property
    def written_at(self) -> str | None:
        """Since when the content that is known stands there, as UTC ISO 8601. None: there is none."""
        return None if self._known is None else iso(datetime.fromtimestamp(self._known[3] / 1e9, UTC))

    def has_changed(self) -> bool:
        stat, last = self._stat(), self._last
        self._last = stat
        if stat == self._known or stat != last:
            return False
        if self._read() != self._digest:
            return True
        self._known = stat
        return False

    def _stat(self) -> _Stat | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _read(self) -> bytes | None:
        try:
            return hashlib.sha256(read_small(self.path)).digest()
        except OSError:
            return None
