"""The counters in Redis, with servers that forget, are full, are somebody else's, or are none."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from socketserver import StreamRequestHandler, ThreadingTCPServer

import pytest

from databases import RedisServer
from gateway.quota import CountersUnavailable
from gateway.shared_accounts import CallFailed, SharedAccounts
from gateway.shared_calls import admission, settling
from gateway.yaml_text import ConfigError
from test_shared_accounts import accounts as accounts
from test_shared_accounts import ask, end, rules
from test_shared_accounts import clock as clock
from test_shared_accounts import server as server


def test_scripts_that_redis_forgot_are_sent_again(server: RedisServer, accounts: SharedAccounts) -> None:
    limit = rules(rpm=3)
    with server.client() as client, ThreadPoolExecutor(2) as both:
        for _ in range(3):
            client.script_flush()
            replies = both.submit(accounts.run, [admission(ask(limit)), admission(ask(rules(rpm=1)))]).result()
            assert all(isinstance(reply, bytes) for reply in replies)
    assert accounts.admit(ask(limit), 0).denial


def test_a_call_that_can_never_succeed_does_not_hold_up_others(server: RedisServer, accounts: SharedAccounts) -> None:
    with server.client() as client:
        client.set("llmproxy:spend:key:1:day:2026-11-21", "somebody else's")
    bad, good = ask(()), ask(rules(rpm=1))
    replies = accounts.run([settling(end(bad, tokens=5)), admission(good)])
    assert isinstance(replies[0], CallFailed)
    assert isinstance(replies[1], bytes)


def test_a_full_memory_passes(server: RedisServer, accounts: SharedAccounts) -> None:
    with server.client() as client:
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(CountersUnavailable, match="maxmemory"):
                accounts.settle(end(ask(()), tokens=5), 0)
        finally:
            client.config_set("maxmemory", "0")
    assert accounts.settle(end(ask(()), tokens=5), 0) == []


def test_wrong_password(server: RedisServer) -> None:
    wrong = SharedAccounts(f"redis://:not-the-secret@127.0.0.1:{server.port}/0")
    with pytest.raises(CountersUnavailable, match="user or password are wrong") as raised:
        wrong.admit(ask(rules(rpm=1)), 0)
    assert "secret" not in f"{raised.value} {wrong.address}"
    none = SharedAccounts(f"redis://127.0.0.1:{server.port}/0")
    with pytest.raises(CountersUnavailable, match="Authentication required"):
        none.admit(ask(rules(rpm=1)), 0)


class Web(StreamRequestHandler):
    """Answers as web servers do to what they don't understand."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        self.rfile.read()


def test_no_redis_at_all() -> None:
    with ThreadingTCPServer(("127.0.0.1", 0), Web) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        with pytest.raises(CountersUnavailable, match=r"what answers there is not Redis: .*400 Bad Request"):
            SharedAccounts(f"redis://127.0.0.1:{web.server_address[1]}").admit(ask(rules(rpm=1)), 0)
        web.shutdown()
    nobody = SharedAccounts("redis://127.0.0.1:1/0")
    with pytest.raises(CountersUnavailable, match="Connection refused"):
        nobody.admit(ask(rules(rpm=1)), 0)


@pytest.mark.parametrize(
    "url",
    ["redis://host:port/0", "http://host", "redis://host?socket_timeout=soon", "redis://:se/cret@host:6379/0"],
    ids=["port", "scheme", "option", "password"],
)
def test_no_url(url: str) -> None:
    with pytest.raises(
        ConfigError, match=r"limits\.storage: expected a URL as in redis://:PASSWORD@HOST:6379"
    ) as raised:
        SharedAccounts(url)
    assert url not in str(raised.value)
    assert "'" not in str(raised.value), "a part of it is quoted"


def test_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=r"limits\.storage: .* needs redis, which is not installed: run scripts/ext"):
        SharedAccounts("redis://127.0.0.1:1/0")


def test_started_again_it_goes_on(server: RedisServer) -> None:
    """What Redis keeps on its disk survives it: limits are as used as before."""
    accounts = SharedAccounts(server.url)
    limit = rules(rpm=1)
    assert not accounts.admit(ask(limit), 0).denial
    server.stop()
    with pytest.raises(CountersUnavailable):
        accounts.admit(ask(limit), 0)
    server.start()
    assert accounts.admit(ask(limit), 0).denial
    accounts.close()
