"""TLS to https servers: verified unless the config says otherwise, and closed when anything about it fails.

The config decides for each server. mitmproxy's own options (ssl_insecure, ssl_verify_upstream_trusted_ca, …) are not
looked at: they hold for all servers at once, and a flag left over from a debugging session must not switch off what
config.yaml promises.
"""

import ipaddress
import logging
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import urlsplit

from mitmproxy import connection, exceptions, tls
from mitmproxy.addons.tlsconfig import DEFAULT_HOSTFLAGS
from mitmproxy.net import tls as net_tls
from OpenSSL import SSL

from gateway.config import ConfigError
from gateway.servers import Server
from gateway.settings import Server as ServerConfig

log = logging.getLogger(__name__)

# Our layers speak HTTP/1.1 to servers. Without this, mitmproxy would offer what the client offered to us: HTTP/2.
ALPN = b"http/1.1"
HTTPS_PORT = 443


def check(servers: Sequence[ServerConfig]) -> None:
    """To be called before the start: CA files can be used, and servers at one address agree. Raises ConfigError."""
    settings: dict[tuple[str | None, int], tuple[object, ...]] = {}
    for index, server in enumerate(servers):
        url = urlsplit(server.url)
        if url.scheme != "https":
            continue
        try:
            if server.ca_file:
                server.ca_file.open("rb").close()
            _context(server, net_tls.create_proxy_server_context.__wrapped__)  # as the file is now
        except OSError as error:
            raise ConfigError(f"servers[{index}].ca_file: {server.ca_file} can't be read: {error.strerror}") from None
        except RuntimeError:
            raise ConfigError(
                f"servers[{index}].ca_file: expected certificates in PEM format, found none in {server.ca_file}"
            ) from None
        wanted = (server.verify_tls, server.ca_file)
        # Connections to one address are shared, so one of them would be used with the other's settings.
        if settings.setdefault((url.hostname, url.port or HTTPS_PORT), wanted) != wanted:
            raise ConfigError(
                f"servers[{index}]: expected the same verify_tls and ca_file as another server at {url.netloc}"
            )


def replace(before: Sequence[ServerConfig], after: Sequence[ServerConfig]) -> set[tuple[str | None, int]]:
    """Go over to other servers, which have been checked. CA files are read again.

    Gives the addresses to which connections must not be used for another request: their server is gone, or shall be
    verified in another way.
    """
    if any(server.ca_file for server in after):
        net_tls.create_proxy_server_context.cache_clear()
    wanted = {(server.url, server.verify_tls) for server in after if server.ca_file is None}
    urls = (urlsplit(server.url) for server in before if (server.url, server.verify_tls) not in wanted)
    return {(url.hostname, url.port or (HTTPS_PORT if url.scheme == "https" else 80)) for url in urls}


def start(data: tls.TlsData, servers: Iterable[Server]) -> None:
    """For the hook `tls_start_server`: sets `data.ssl_conn` as the config of the server at this address wants it.

    When that fails no other addon may have a try (AddonHalt): without a TLS object, mitmproxy closes the connection.
    """
    conn = data.conn
    try:
        assert isinstance(conn, connection.Server)
        server = next(s for s in servers if s.scheme == "https" and (s.host, s.port) == conn.address)
        conn.sni, conn.alpn_offers = server.host, [ALPN]  # what mitmproxy tells of the connection
        data.ssl_conn = _connect(server)
    except Exception:
        log.exception("TLS to a server can't be set up: it is not connected to")
        data.ssl_conn = None
        raise exceptions.AddonHalt from None


def _context(
    server: ServerConfig, make: Callable[..., SSL.Context] = net_tls.create_proxy_server_context
) -> SSL.Context:
    """Made once for the same settings. Without a CA file of its own a server is verified against certifi's CAs."""
    return make(
        method=net_tls.Method.TLS_CLIENT_METHOD,
        min_version=net_tls.DEFAULT_MIN_VERSION,
        max_version=net_tls.DEFAULT_MAX_VERSION,
        cipher_list=None,
        ecdh_curve=None,
        verify=net_tls.Verify.VERIFY_PEER if server.verify_tls else net_tls.Verify.VERIFY_NONE,
        ca_path=None,
        ca_pemfile=str(server.ca_file) if server.ca_file else None,
        client_cert=None,
        legacy_server_connect=False,
    )


def _connect(server: Server) -> SSL.Connection:
    """A TLS object that only shakes hands with whom the url names."""
    conn = SSL.Connection(_context(server.config))
    _expect_name(conn, server.host)
    conn.set_alpn_protos([ALPN])
    conn.set_connect_state()
    return conn


def _expect_name(conn: SSL.Connection, host: str) -> None:
    """pyOpenSSL has no words of its own for this. As `mitmproxy.addons.tlsconfig` does it."""
    lib = SSL._lib  # type: ignore[attr-defined]
    param = lib.SSL_get0_param(conn._ssl)
    lib.X509_VERIFY_PARAM_set_hostflags(param, DEFAULT_HOSTFLAGS)
    try:
        packed = ipaddress.ip_address(host).packed
    except ValueError:
        name = host.encode("idna")
        conn.set_tlsext_host_name(name)
        is_set = lib.X509_VERIFY_PARAM_set1_host(param, name, len(name))
    else:  # addresses are not allowed as SNI (RFC 6066)
        is_set = lib.X509_VERIFY_PARAM_set1_ip(param, packed, len(packed))
    if is_set != 1:
        raise RuntimeError(f"OpenSSL does not take {host!r} for a host's name")
