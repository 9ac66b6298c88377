"""A certificate authority of a test's own, servers' certificates, and a scripted upstream that speaks TLS with them."""

import asyncio
import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from upstream import Upstream


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class Authority:
    """`ca_file`: what a client needs in order to trust it."""

    def __init__(self, folder: Path, name: str = "Test CA") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._name = _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        basic = x509.BasicConstraints(ca=True, path_length=None)
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(self._sign(self._name, self._key, basic))

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType) -> bytes:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(issuer_name=self._name, subject_name=subject, public_key=key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def context(self, *names: str) -> ssl.SSLContext:
        """For a server with a certificate for these host names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = [x509.SubjectAlternativeName(list(map(_alternative, names)))] if names else []
        return _server_context(self._folder / "server.pem", self._sign(_name("server"), key, *alternatives), key)

    def self_signed(self, name: str) -> tuple[ssl.SSLContext, Path]:
        """For a server whose certificate nobody signed but itself, and what a client needs in order to trust it."""
        alternatives = x509.SubjectAlternativeName([_alternative(name)])
        certificate = self._folder / "self-signed.pem"
        certificate.write_bytes(self._sign(self._name, self._key, alternatives))
        return _server_context(self._folder / "server.pem", certificate.read_bytes(), self._key), certificate


def _server_context(file: Path, certificate: bytes, key: ec.EllipticCurvePrivateKey) -> ssl.SSLContext:
    """It would also speak HTTP/2. `file`: where a certificate and its key can stand while they are loaded."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    file.write_bytes(certificate + key.private_bytes(encoding, form, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


class TlsUpstream(Upstream):
    """`context` may be changed: new connections get the new certificate. The lists have an item for each handshake."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()
        self.context = context
        self.asked_names: list[str | None] = []  # SNI
        self.protocols: list[str | None] = []  # ALPN

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    async def _listen(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sni_callback = self._begin_handshake
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, ssl=context, backlog=1024, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]

    def _begin_handshake(self, one: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        self.asked_names.append(name)
        one.context = self.context

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.protocols.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
        await super()._serve(reader, writer)
