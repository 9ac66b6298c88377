"""A webhook as a key source: what it is told, and what each of its answers means."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benches import Hook
from certificates import Authority
from gateway.keys import Key, hash_key
from gateway.secret import Secret
from gateway.sources import settings
from gateway.sources.source import Asked, Refused, SourceFailed
from gateway.sources.webhook import Webhook

ASKED = Asked(Secret("sk-1"), hash_key("sk-1"), "192.0.2.1")
ALICE = Key(id=0, name="alice", hint="", created_at="", disabled=False, expires_at=None, models=())


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Hook]:
    hook = Hook(tmp_path, lambda name: pytest.fail(name))
    yield hook
    hook.close()


def ask(hook: Hook, **more: Any) -> object:
    source = Webhook(settings.Webhook(url=hook.url, timeout_s=10, **more))
    try:
        return source.find(ASKED)
    finally:
        source.close()


ANSWERS: dict[str, tuple[int, object, object]] = {
    "yes": (200, {"allowed": True, "name": "alice"}, ALICE),
    "no": (200, {"allowed": False}, Refused("key_disabled")),
    "no, and why": (
        200,
        {"allowed": False, "code": "key_expired", "reason": "since May"},
        Refused("key_expired", "since May"),
    ),
    "null": (200, None, None),
    "not found": (404, {"allowed": True, "name": "alice"}, None),
    "forbidden": (403, {"allowed": True, "name": "alice"}, Refused("key_disabled")),
    "it does not know us": (401, {"allowed": True, "name": "alice"}, "does not accept the gateway's api_key"),
    "a redirect": (307, {"allowed": True, "name": "alice"}, "HTTP 307"),
    "its own fault": (500, {"allowed": True, "name": "alice"}, "HTTP 500"),
    "created": (201, {"allowed": True, "name": "alice"}, "HTTP 201"),
    "not said": (200, {"name": "alice"}, "allowed: missing"),
    "nobody": (200, {"allowed": True}, "name: missing"),
    "a list": (200, [{"allowed": True, "name": "alice"}], "allowed: missing"),
    "true": (200, True, "allowed: missing"),
    "null for yes or no": (200, {"allowed": None, "name": "alice"}, "allowed: expected true or false"),
    "1 for yes": (200, {"allowed": 1, "name": "alice"}, "allowed: expected true or false"),
    "maybe": (200, {"allowed": "maybe", "name": "alice"}, "allowed: expected true or false"),
    "no models": (200, {"allowed": True, "name": "alice", "models": []}, "models: expected one name at least"),
    "too much": (200, {"allowed": True, "name": "alice", "notes": "x" * 200_000}, "more than 100,000 bytes"),
}


@pytest.mark.parametrize(("status", "body", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_answers(hook: Hook, status: int, body: object, expected: object) -> None:
    hook.say("sk-1", status, json.dumps(body).encode())
    if isinstance(expected, str):
        with pytest.raises(SourceFailed) as caught:
            ask(hook)
        assert expected in str(caught.value)
    else:
        assert ask(hook) == expected
    assert len(hook.asked) == 1  # a redirect is not followed


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 5000, b"<html>"], ids=["empty", "half", "latin", "deep", "HTML"]
)
def test_no_json(hook: Hook, body: bytes) -> None:
    hook.say("sk-1", 200, body)
    with pytest.raises(SourceFailed, match="something else than JSON"):
        ask(hook)


def test_what_it_is_told(hook: Hook) -> None:
    """The key itself only where the config says so."""
    ask(hook)
    ask(hook, send_key=True, api_key=Secret("hush"), headers={"X-Team": Secret("a")})
    questions = [question for _, question in hook.asked]
    sha256 = hash_key("sk-1")
    assert questions == [
        {"key_sha256": sha256, "address": "192.0.2.1"},
        {"key_sha256": sha256, "address": "192.0.2.1", "key": "sk-1"},
    ]
    seen = [(told.get("authorization"), told.get("x-team"), told["content-type"]) for told, _ in hook.asked]
    assert seen == [(None, None, "application/json"), ("Bearer hush", "a", "application/json")]


def test_a_key_that_is_no_text_is_not_its(hook: Hook) -> None:
    source = Webhook(settings.Webhook(url=hook.url, send_key=True))
    assert source.find(Asked(Secret("\udcff"), "0", "")) is None
    assert not hook.asked


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A webhook with a certificate of a private authority: its URL, and the authority's file."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = b'{"allowed": true, "name": "alice"}'
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    authority = Authority(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.socket = authority.context("127.0.0.1").wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"https://127.0.0.1:{server.server_address[1]}/", authority.ca_file
    server.shutdown()
    server.server_close()


def test_certificates(tls: tuple[str, Path]) -> None:
    url, ca_file = tls
    assert Webhook(settings.Webhook(url=url, ca_file=ca_file)).find(ASKED) == ALICE
    assert Webhook(settings.Webhook(url=url, verify_tls=False)).find(ASKED) == ALICE
    with pytest.raises(SourceFailed, match="CERTIFICATE_VERIFY_FAILED"):
        Webhook(settings.Webhook(url=url)).find(ASKED)


TRICKLES = {
    "in its first line": b"H",
    "in a header": b"HTTP/1.1 200 OK\r\nX-A: ",
    "in its body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{",
}


@pytest.mark.parametrize("begin", TRICKLES.values(), ids=TRICKLES)
def test_one_that_answers_byte_by_byte_keeps_nobody_for_longer_than_it_may(begin: bytes) -> None:
    is_over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            with server.accept()[0] as connection:
                connection.sendall(begin)
                try:
                    while not is_over.wait(0.02):
                        connection.sendall(b"1")
                except OSError:
                    is_over.set()  # it was hung up upon

        threading.Thread(target=trickle, daemon=True).start()
        source = Webhook(settings.Webhook(url=f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_s=0.3))
        began = time.monotonic()
        try:
            with pytest.raises(SourceFailed, match=r"within 0\.3 s"):
                source.find(ASKED)
            assert time.monotonic() - began < 10
            assert is_over.wait(10)
        finally:
            is_over.set()
            source.close()


def test_a_connection_is_used_again(hook: Hook) -> None:
    """Its second question has a time of its own."""
    hook.put("sk-1", name="alice")
    source = Webhook(settings.Webhook(url=hook.url, timeout_s=10))
    assert [source.find(ASKED) for _ in range(3)] == [ALICE] * 3
    source.close()


def test_a_header_that_can_not_be_sent_is_not_told(hook: Hook) -> None:
    with pytest.raises(SourceFailed) as caught:
        ask(hook, headers={"x-token": Secret("hush\n")})
    assert str(caught.value) == "can't be asked: LocalProtocolError"
