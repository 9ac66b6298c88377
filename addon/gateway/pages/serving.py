"""Serves the pages. Each is one document: its style and scripts are put into it at the start, and nothing else may run.

The policy names each script and style by its hash, so a page loads nothing, and what others serve at this origin can't
run in it. Pages hold no data: their scripts ask for a key, keep it in memory, and send it to this origin alone.
"""

import base64
import hashlib
import re
from pathlib import Path

from gateway.replies import Reply

FOLDER = Path(__file__).parent

_STYLE = re.compile(r'<link rel="stylesheet" href="([a-z_]+\.css)">')
_SCRIPT = re.compile(r'<script src="([a-z_]+\.js)"></script>')
# Where a path without its slash, or with one too many, leads. Relative: a proxy before this one may have a prefix.
_MOVED = {"/admin": "admin/", "/usage/": "../usage"}

_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Pages:
    """The pages, read once."""

    def __init__(self) -> None:
        self._usage = _read("usage.html")
        self._admin = _read("admin.html")

    def page(self, method: str, path: str, *, has_admin: bool) -> Reply | None:
        """`path`: without its query. `has_admin`: whether there is an admin API to talk to. None: no page is there."""
        if method not in ("GET", "HEAD") or (path.startswith("/admin") and not has_admin):
            return None
        if path in _MOVED:
            return Reply(307, b"", {"location": _MOVED[path], "cache-control": "no-store"})
        return {"/usage": self._usage, "/admin/": self._admin}.get(path)


def _read(name: str) -> Reply:
    """The HTML file with what it links to put in its place, and the policy that lets only that run."""
    styles: list[str] = []
    scripts: list[str] = []

    def style(link: re.Match[str]) -> str:
        styles.append((FOLDER / link[1]).read_text(encoding="utf-8"))
        return f"<style>{styles[-1]}</style>"

    def script(link: re.Match[str]) -> str:
        scripts.append((FOLDER / link[1]).read_text(encoding="utf-8"))
        return f"<script>{scripts[-1]}</script>"

    text = _SCRIPT.sub(script, _STYLE.sub(style, (FOLDER / name).read_text(encoding="utf-8")))
    return Reply(200, text.encode(), {**_HEADERS, "content-security-policy": _policy(styles, scripts)})


def _policy(styles: list[str], scripts: list[str]) -> str:
    # Trusted types: the browser itself refuses text as HTML, so that a key's name can't become markup.
    return "; ".join(
        [
            "default-src 'none'",
            f"style-src {' '.join(map(_source, styles))}",
            f"script-src {' '.join(map(_source, scripts))}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
