"""Keys that a web service knows: it gets a POST with {"key_sha256": …, "address": …}, and answers with JSON.

200: {"allowed": true, "name": …} and the fields of `fields.FIELDS`; {"allowed": false, "code": …, "reason": …}; or
null, which is "not mine". 404: not mine. 403: mine and refused. All else is a failure: with 401, it does not know us.
"""

import ssl
from urllib.parse import urlsplit

import certifi
import httpcore
import httpx
import msgspec

from gateway.sources import answers, settings
from gateway.sources.deadline import Backend, Deadline
from gateway.sources.source import Answer, Asked, Refused, SourceFailed
from gateway.yaml_text import ConfigError

MAX_BYTES = 100_000
# Longer, and a server in between might have closed it.
IDLE_S = 5.0


class Webhook:
    """Raises ConfigError when the URL, a header or the CA file is wrong."""

    def __init__(self, given: settings.Webhook) -> None:
        try:
            url = urlsplit(given.url)
            is_right = url.scheme in ("http", "https") and url.hostname and not url.username and url.port != 0
            place = httpx.URL(given.url)
        except (ValueError, httpx.InvalidURL):
            is_right = False
        if not is_right:
            raise ConfigError("url: expected http://HOST/PATH or https://HOST/PATH")
        if given.ca_file is not None and not given.verify_tls:
            raise ConfigError("ca_file: is of no use with verify_tls: false; leave one of them out")
        headers = {"accept-encoding": "identity", **{name.lower(): value for name, value in given.headers.items()}}
        headers["content-type"] = "application/json"
        if given.api_key:
            headers["authorization"] = f"Bearer {given.api_key}"
        self._answers = answers.Reader(given)
        self._url = httpcore.URL(scheme=place.raw_scheme, host=place.raw_host, port=place.port, target=place.raw_path)
        self._deadline = Deadline()
        self._send_key = given.send_key
        self._timeout_s = given.timeout_s
        try:
            self._headers = [(name.encode("ascii"), value.encode()) for name, value in headers.items()]
            self._client = httpcore.ConnectionPool(
                _tls(given), max_connections=None, keepalive_expiry=IDLE_S, network_backend=Backend(self._deadline)
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"headers or ca_file: can't be used: {type(error).__name__}") from None

    def close(self) -> None:
        self._client.close()

    def find(self, asked: Asked) -> Answer:
        question = {"key_sha256": asked.sha256, "address": asked.address}
        try:
            if self._send_key:
                asked.key.encode()
                question["key"] = str(asked.key)
        except UnicodeEncodeError:
            return None  # no text of JSON
        status, body = self._ask(msgspec.json.encode(question))
        if status == 404:
            return None
        if status == 403:
            return Refused("key_disabled")
        if status == 401:
            raise SourceFailed("does not accept the gateway's api_key (HTTP 401)")
        if status != 200:
            raise SourceFailed(f"answers with HTTP {status}")
        try:
            reply = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise SourceFailed("answers with something else than JSON") from None
        if reply is not None and (not isinstance(reply, dict) or "allowed" not in reply):
            raise SourceFailed("field allowed: missing")
        if reply is not None and not isinstance(reply["allowed"], bool):
            raise SourceFailed("field allowed: expected true or false")
        return self._answers.read(reply)

    def _ask(self, question: bytes) -> tuple[int, bytes]:
        try:
            with (
                self._deadline.within(self._timeout_s),
                self._client.stream("POST", self._url, headers=self._headers, content=question) as response,
            ):
                body = bytearray()
                for piece in response.iter_stream() if response.status == 200 else ():
                    body += piece
                    if len(body) > MAX_BYTES:
                        raise SourceFailed(f"answers with more than {MAX_BYTES:,} bytes")
                return response.status, bytes(body)
        except (TimeoutError, httpcore.TimeoutException):
            raise SourceFailed(f"does not end its answer within {self._timeout_s:g} s") from None
        except httpcore.NetworkError as error:
            raise SourceFailed(f"can't be asked: {type(error).__name__} {error}") from None
        except httpcore.ProtocolError as error:  # whose text may hold a header of ours
            raise SourceFailed(f"can't be asked: {type(error).__name__}") from None


def _tls(given: settings.Webhook) -> ssl.SSLContext:
    context = ssl.SSLContext(
        ssl.PROTOCOL_TLS_CLIENT
    )  # verifies; and, unlike the default, takes private CAs as they are
    context.load_verify_locations(given.ca_file or certifi.where())
    if not given.verify_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
