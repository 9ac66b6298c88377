"""https servers: verified unless the config says otherwise; whatever goes wrong, nobody unverified gets a request."""

import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mitmproxy import connection, exceptions, tls
from OpenSSL import SSL

from certificates import Authority, TlsUpstream
from conftest import StartProxy
from gateway import upstream_tls
from gateway.asking import Asker, Probe
from gateway.config import ConfigError
from gateway.servers import Server
from gateway.settings import Server as ServerConfig
from h2client import Http2
from proxy import ROOT, Key, Proxy
from upstream import CLOSE, STALL, Upstream, reply, stream
from waiting import eventually

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}

type StartTls = Callable[[ssl.SSLContext], TlsUpstream]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("unknown"), "Unknown CA")


@pytest.fixture
def start_tls() -> Iterator[StartTls]:
    started: list[TlsUpstream] = []

    def start(context: ssl.SSLContext) -> TlsUpstream:
        upstream = TlsUpstream(context)
        upstream.__enter__()
        started.append(upstream)
        return upstream

    yield start
    for upstream in started:
        upstream.__exit__()


# -- who is let in: by requests and by probes alike


def shake_hands(server: Server) -> str | None:
    """As mitmproxy does it with what the hook set. None: connected; otherwise why not."""
    conn = connection.Server(address=(server.host, server.port))
    data = tls.TlsData(conn, context=None)  # type: ignore[arg-type]
    upstream_tls.start(data, [server])
    assert data.ssl_conn
    with socket.create_connection((server.host, server.port), timeout=10) as sock:
        while True:
            try:
                data.ssl_conn.do_handshake()
                sock.sendall(data.ssl_conn.bio_read(65536))
                return None
            except SSL.WantReadError:
                sock.sendall(data.ssl_conn.bio_read(65536))
                data.ssl_conn.bio_write(sock.recv(65536))
            except SSL.Error:
                code = SSL._lib.SSL_get_verify_result(data.ssl_conn._ssl)  # type: ignore[attr-defined]
                return str(SSL._ffi.string(SSL._lib.X509_verify_cert_error_string(code)).decode())  # type: ignore[attr-defined]


UNKNOWN_CA = "unable to get local issuer certificate"
# the certificate's names, the url's host, what is trusted, and what is said about it
HANDSHAKES: dict[str, tuple[list[str], str, str, str | None]] = {
    "a host of a CA of one's own": (["localhost"], "localhost", "own", None),
    "an address of a CA of one's own": (["127.0.0.1"], "127.0.0.1", "own", None),
    "a CA that nobody knows": (["localhost"], "localhost", "default", UNKNOWN_CA),
    "another CA": (["localhost"], "localhost", "other", UNKNOWN_CA),
    "another host's certificate": (["example.org"], "localhost", "own", "hostname mismatch"),
    "another address's certificate": (["127.0.0.2"], "127.0.0.1", "own", "IP address mismatch"),
    "a host's certificate for an address": (["localhost"], "127.0.0.1", "own", "IP address mismatch"),
    "an address in words": (["127.0.0.1"], "localhost", "own", "hostname mismatch"),
    "no name but a common one": ([], "server", "own", "hostname mismatch"),
    "half a wildcard": (["l*.example.org"], "llama.example.org", "own", "hostname mismatch"),
    "not verified": (["example.org"], "localhost", "none", None),
}


@pytest.mark.parametrize(("names", "host", "trusted", "problem"), HANDSHAKES.values(), ids=HANDSHAKES)
def test_who_is_let_in(
    authority: Authority,
    unknown: Authority,
    start_tls: StartTls,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    host: str,
    trusted: str,
    problem: str | None,
) -> None:
    upstream = start_tls(authority.context(*names))
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", upstream.port))],
    )
    ca_file = {"own": authority.ca_file, "other": unknown.ca_file}.get(trusted)
    config = ServerConfig("a", f"https://{host}:{upstream.port}", ca_file=ca_file, verify_tls=trusted != "none")
    by_request = shake_hands(Server(config))
    found = Asker(config, 10).probe("/health", is_llama=False)
    assert (by_request, found.probe) == (problem, Probe.FAILED if problem else Probe.OK)
    if problem:
        said = found.reason.removeprefix("has a certificate that is not accepted: ").lower()
        assert said.startswith(problem.lower())
        assert upstream.requests == []


def test_a_certificate_that_signed_itself_can_be_trusted(authority: Authority, start_tls: StartTls) -> None:
    context, certificate = authority.self_signed("localhost")
    upstream = start_tls(context)
    config = ServerConfig("a", f"https://localhost:{upstream.port}", ca_file=certificate)
    assert shake_hands(Server(config)) is None
    assert Asker(config, 10).probe("/health", is_llama=False).probe is Probe.OK


def test_http_where_tls_is_expected(upstream: Upstream) -> None:
    upstream.plan_connections((reply({}, 400), CLOSE))
    found = Asker(ServerConfig("a", upstream.url.replace("http:", "https:")), 10).probe("/health", is_llama=False)
    assert found.probe is Probe.FAILED
    assert found.reason.startswith("does not speak TLS as it should")


@pytest.mark.parametrize(
    ("host", "sni"), [("localhost", "localhost"), ("127.0.0.1", None)], ids=["a host", "an address"]
)
def test_the_urls_host_is_asked_for_and_only_http_1_offered(
    authority: Authority, start_tls: StartTls, host: str, sni: str | None
) -> None:
    upstream = start_tls(authority.context(host))
    server = Server(ServerConfig("a", f"https://{host}:{upstream.port}", ca_file=authority.ca_file))
    assert shake_hands(server) is None
    eventually(lambda: upstream.protocols, "the connection")
    assert (upstream.asked_names, upstream.protocols) == ([sni], ["http/1.1"])


# -- closed, when something fails


def test_an_address_that_is_no_servers_gets_no_tls() -> None:
    data = tls.TlsData(connection.Server(address=("localhost", 2)), None, SSL.Connection(SSL.Context(SSL.TLS_METHOD)))  # type: ignore[arg-type]
    for servers in (
        [],
        [Server(ServerConfig("a", "https://localhost:1"))],
        [Server(ServerConfig("a", "http://localhost:2"))],
    ):
        with pytest.raises(exceptions.AddonHalt):  # no other addon may have a try
            upstream_tls.start(data, servers)
        assert data.ssl_conn is None


def test_a_ca_file_that_is_gone_closes(authority: Authority, tmp_path: Path) -> None:
    server = Server(ServerConfig("a", "https://localhost:1", ca_file=tmp_path / "gone.pem"))
    data = tls.TlsData(connection.Server(address=("localhost", 1)), None)  # type: ignore[arg-type]
    with pytest.raises(exceptions.AddonHalt):
        upstream_tls.start(data, [server])
    assert data.ssl_conn is None


# -- the check before the start


def test_settings_that_can_be_used(authority: Authority, unknown: Authority) -> None:
    upstream_tls.check(
        [
            ServerConfig("a", "https://gpu/a", ca_file=authority.ca_file),
            ServerConfig("b", "https://gpu:443/b", ca_file=authority.ca_file),
            ServerConfig("c", "https://gpu:8443", ca_file=unknown.ca_file),
            ServerConfig("d", "https://other"),
            ServerConfig("e", "https://another", verify_tls=False),
            ServerConfig("f", "http://gpu:443", ca_file=Path("not-looked-at")),
        ]
    )


def test_a_ca_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    servers = [ServerConfig("a", "http://a"), ServerConfig("b", "https://b", ca_file=path)]
    with pytest.raises(ConfigError) as caught:
        upstream_tls.check(servers)
    assert str(caught.value) == f"servers[1].ca_file: {path} can't be read: No such file or directory"


@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_ca_file_without_certificates(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        upstream_tls.check([ServerConfig("a", "https://a", ca_file=path)])
    assert str(caught.value) == f"servers[0].ca_file: expected certificates in PEM format, found none in {path}"


def test_servers_at_one_address_must_agree(authority: Authority) -> None:
    """mitmproxy uses one's connection for the other."""
    servers = [ServerConfig("a", "https://gpu/a"), ServerConfig("b", "https://gpu:443/b", verify_tls=False)]
    with pytest.raises(ConfigError, match=r"servers\[1\]: expected the same verify_tls and ca_file"):
        upstream_tls.check(servers)


# -- through the gateway

# Probes find out as well, and a server that is down gets no requests: one probe at the start, while all is well.
ONE_PROBE = {"interval_s": 600}
STREAMED = ('data: {"choices":[{"index":0,"delta":{"content":"yes"}}]}\n\n', "data: [DONE]\n\n")


def server_of(upstream: Upstream, host: str = "127.0.0.1", **more: Any) -> dict[str, Any]:
    return {"name": "a", "url": f"https://{host}:{upstream.port}", **more}


def ask(proxy: Proxy, key: Key) -> tuple[int, str]:
    """A status, and the refusal's code and message."""
    with proxy.client(key) as client:
        answer = client.post(CHAT, json=BODY)
    error = answer.json().get("error", {})
    return answer.status_code, f"{error.get('code', '')} {error.get('message', '')}".strip()


def test_a_server_with_a_ca_of_ones_own(authority: Authority, start_tls: StartTls, start_proxy: StartProxy) -> None:
    upstream = start_tls(authority.context("127.0.0.1"))
    upstream.plan(stream(*STREAMED))
    proxy = start_proxy([server_of(upstream, ca_file="ca.pem")], start=False)
    (proxy.folder / "ca.pem").write_bytes(authority.ca_file.read_bytes())
    proxy.start()
    alice = proxy.create_key("alice")
    with proxy.client(alice) as client:
        assert client.post(CHAT, json=BODY | {"stream": True}).text == "".join(STREAMED)
    assert ask(proxy, alice) == (200, "")
    assert [row["outcome"] for row in proxy.wait_rows(2)] == ["ok", "ok"]


CERTIFICATES: dict[str, tuple[str, list[str], str]] = {
    "an unknown CA": ("127.0.0.1", ["127.0.0.1"], UNKNOWN_CA),
    "another address's": ("127.0.0.1", ["127.0.0.2", "localhost"], "IP address mismatch"),
    "another host's": ("localhost", ["example.org", "127.0.0.1"], "hostname mismatch"),
}


@pytest.mark.parametrize("arguments", [[], ["--set", "ssl_insecure=true"]], ids=["plain", "ssl_insecure"])
@pytest.mark.parametrize(("host", "names", "problem"), CERTIFICATES.values(), ids=CERTIFICATES)
def test_a_certificate_that_is_not_accepted(
    authority: Authority,
    unknown: Authority,
    start_tls: StartTls,
    start_proxy: StartProxy,
    host: str,
    names: list[str],
    problem: str,
    arguments: list[str],
) -> None:
    """The config decides: mitmproxy's own switch does not open what it closes."""
    upstream = start_tls(authority.context(host))
    servers = [server_of(upstream, host, ca_file=str(authority.ca_file))]
    proxy = start_proxy(servers, arguments=arguments, health=ONE_PROBE)
    alice = proxy.create_key("alice")
    assert ask(proxy, alice) == (200, "")
    upstream.context = (unknown if problem == UNKNOWN_CA else authority).context(*names)
    upstream.drop_connections()
    before = len(upstream.requests)
    status, said = ask(proxy, alice)
    assert (status, said.split()[0]) == (502, "upstream_unreachable")
    assert f"Certificate verify failed: {problem}" in said
    assert len(upstream.requests) == before


def test_probes_do_not_accept_it_either(authority: Authority, start_tls: StartTls, start_proxy: StartProxy) -> None:
    upstream = start_tls(authority.context("127.0.0.1"))
    proxy = start_proxy([server_of(upstream)])
    eventually(lambda: f"has a certificate that is not accepted: {UNKNOWN_CA}" in proxy.log(), "a line in the log")
    status, said = ask(proxy, proxy.create_key("alice"))
    assert (status, said.split()[0]) == (503, "no_server_available")
    assert upstream.requests == []


def test_a_server_that_needs_no_verification(
    authority: Authority, start_tls: StartTls, start_proxy: StartProxy
) -> None:
    upstream = start_tls(authority.context("example.org"))
    proxy = start_proxy([server_of(upstream, verify_tls=False)])
    assert ask(proxy, proxy.create_key("alice")) == (200, "")


def test_a_ca_file_that_is_not_there_stops_the_start(start_proxy: StartProxy) -> None:
    proxy = start_proxy([{"name": "a", "url": "https://127.0.0.1:1", "ca_file": "gone.pem"}], start=False)
    proxy.launch()
    assert proxy.wait(30) == 1
    assert f"servers[0].ca_file: {proxy.folder / 'gone.pem'} can't be read: No such file or directory" in proxy.log()


def test_a_client_of_http_2_and_a_server_that_would_speak_it_too(
    authority: Authority, start_tls: StartTls, start_proxy: StartProxy
) -> None:
    upstream = start_tls(authority.context("127.0.0.1"))
    upstream.plan(stream(*STREAMED), stream(*STREAMED))
    proxy = start_proxy([server_of(upstream, ca_file=str(authority.ca_file))])
    alice = proxy.create_key("alice")
    with Http2(proxy.port) as client:
        asked = [client.post(CHAT, alice, BODY | {"stream": True}) for _ in range(2)]
        answers = [client.answer(number) for number in asked]
    assert [(answer.status, answer.body.decode(), answer.complete) for answer in answers] == [
        (200, "".join(STREAMED), True)
    ] * 2
    assert {request.line[2] for request in upstream.requests} == {"HTTP/1.1"}
    assert set(upstream.protocols) == {"http/1.1"}


def test_a_server_that_never_shakes_hands(authority: Authority, start_tls: StartTls, start_proxy: StartProxy) -> None:
    upstream = start_tls(authority.context("127.0.0.1"))
    servers = [server_of(upstream, ca_file=str(authority.ca_file))]
    proxy = start_proxy(servers, health=ONE_PROBE, first_byte_timeout_s=1, routing={"max_attempts": 1})
    alice = proxy.create_key("alice")
    assert ask(proxy, alice) == (200, "")
    upstream.refuse()
    silent = Upstream()
    silent.port = upstream.port
    with silent:
        silent.plan_connections(*[STALL] * 20)
        assert ask(proxy, alice)[0] in (502, 504)


SABOTAGE = """
import sys
sys.path.insert(0, {addon!r})
from gateway import upstream_tls
from gateway.hooks import Gateway

def broken(*_):
    raise RuntimeError("a fault of the test's")

{place} = broken
addons = [Gateway()]
"""


@pytest.mark.parametrize("place", ["upstream_tls._connect", "upstream_tls._expect_name", "upstream_tls.start"])
def test_a_fault_closes(authority: Authority, start_tls: StartTls, start_proxy: StartProxy, place: str) -> None:
    """Even when mitmproxy was told not to verify: nobody else makes the connection instead."""
    upstream = start_tls(authority.context("127.0.0.1"))
    servers = [server_of(upstream, verify_tls=False)]
    proxy = start_proxy(servers, start=False, allow_errors=True, arguments=["--set", "ssl_insecure=true"])
    proxy.addon = proxy.folder / "entry.py"
    proxy.addon.write_text(SABOTAGE.format(addon=str(ROOT / "addon"), place=place))
    proxy.start()
    status, said = ask(proxy, proxy.create_key("alice"))
    assert (status, said.split()[0]) == (502, "upstream_unreachable")
    assert [request for request in upstream.requests if request.method == "POST"] == []
