"""How the pages are served: whole, guarded by a policy that names each script, and only where they belong."""

import base64
import hashlib
import re
from pathlib import Path

import pytest

from gateway.pages.serving import FOLDER, Pages
from gateway.replies import Reply

PAGES = Pages()
DOCUMENTS = ["/usage", "/admin/"]
SCRIPTS = sorted(FOLDER.glob("*.js"))
STYLES = sorted(FOLDER.glob("*.css"))
MAX_LINES = 400

# What makes markup of text, runs text, keeps or shows a key, or asks elsewhere.
NOT_IN_SCRIPTS = (
    "innerHTML",
    "outerHTML",
    "insertAdjacentHTML",
    "document.write",
    "eval(",
    "Function(",
    "localStorage",
    "sessionStorage",
    "indexedDB",
    "document.cookie",
    "history.",
    "location",
    "console.",
    "XMLHttpRequest",
    "WebSocket",
    "sendBeacon",
    "import(",
)


def served(path: str) -> Reply:
    reply = PAGES.page("GET", path, has_admin=True)
    assert reply
    return reply


@pytest.mark.parametrize("path", DOCUMENTS)
def test_headers(path: str) -> None:
    reply = served(path)
    policy = reply.headers.pop("content-security-policy")
    assert reply.status == 200
    assert reply.headers == {
        "content-type": "text/html; charset=utf-8",
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }
    reply.headers["content-security-policy"] = policy
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    hashed = r"('sha256-[A-Za-z0-9+/]{43}=' ?)+"
    assert re.fullmatch(hashed, rules.pop("script-src"))
    assert re.fullmatch(hashed, rules.pop("style-src"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


@pytest.mark.parametrize("path", DOCUMENTS)
def test_the_policy_names_what_is_in_the_document_and_no_more(path: str) -> None:
    reply = served(path)
    text = reply.body.decode()
    inside = re.findall(r"<style>(.*?)</style>|<script>(.*?)</script>", text, re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256((a or b).encode()).digest()).decode() for a, b in inside}
    assert set(re.findall(r"'sha256-(\S+)'", reply.headers["content-security-policy"])) == hashes
    assert len(inside) == text.count("<script") + text.count("<style") >= 5
    assert not re.search(r"<(?:link|img|iframe|script|source)[^>]*\s(?:src|href)=\"(?!data:)", text)
    assert not re.search(r"<[^>]+\s(?:on\w+|style)=", re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("path", [*SCRIPTS, *STYLES], ids=lambda path: path.name)
def test_a_file_is_used_reads_in_minutes_and_ends_no_tag(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert "</script" not in text
    assert "</style" not in text
    assert any(text in served(document).body.decode() for document in DOCUMENTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("word", NOT_IN_SCRIPTS)
def test_what_no_script_says(script: Path, word: str) -> None:
    code = "\n".join(line.split("//")[0] for line in script.read_text().splitlines())
    assert word not in code


@pytest.mark.parametrize(
    ("method", "path", "status", "location"),
    [
        ("GET", "/usage", 200, None),
        ("HEAD", "/usage", 200, None),
        ("GET", "/admin/", 200, None),
        ("GET", "/usage/", 307, "../usage"),
        ("GET", "/admin", 307, "admin/"),
        ("POST", "/usage", None, None),
        ("POST", "/admin/", None, None),
        ("GET", "/admin/keys", None, None),
        ("GET", "/usage/usage.js", None, None),
        ("GET", "/v1/usage", None, None),
        ("GET", "/", None, None),
    ],
)
def test_where_they_are(method: str, path: str, status: int | None, location: str | None) -> None:
    reply = PAGES.page(method, path, has_admin=True)
    assert (reply.status if reply else None, reply.headers.get("location") if reply else None) == (status, location)


@pytest.mark.parametrize("path", ["/admin", "/admin/"])
def test_without_an_admin_key_there_is_no_admin_page(path: str) -> None:
    assert PAGES.page("GET", path, has_admin=False) is None
    assert PAGES.page("GET", "/usage", has_admin=False) == served("/usage")
