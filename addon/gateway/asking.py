"""What a server says when it is asked, and words for its silence. All of this blocks: it is for threads.

None of the questions needs a slot or wakes a sleeping llama-server. Each goes over a connection of its own: whether
the server still accepts any is a part of what is asked.
"""

import socket
import ssl
import time
from dataclasses import dataclass
from enum import Enum, auto
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Annotated

import certifi
import httpx
import msgspec

from gateway.settings import Server as ServerConfig

# Far more than any list of models: an endless answer must not fill the memory.
MAX_BYTES = 10_000_000
# Of a server's words about an error, as much as a person wants to read; in bytes.
MAX_WORDS = 300
LLAMA_CPP, OPENAI = "llama.cpp", "openai"
# All that msgspec raises on what a server may send.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class NoAnswer(Exception):
    """A question was not answered, this time."""


class Probe(Enum):
    OK = auto()
    LOADING = auto()
    FAILED = auto()


@dataclass(frozen=True)
class Found:
    """What a probe found. `reason` is to be read after the server's name. `is_llama` False: nothing is known of that.

    `refuses`: nothing listens there, and asking again costs nothing.
    """

    probe: Probe
    reason: str = ""
    refuses: bool = False
    is_llama: bool = False


@dataclass(frozen=True)
class Told:
    """What a server told of its models. None: not told. `problem`: why there is no list.

    `is_refusal`: the problem is the gateway's key, so it would refuse requests as well.
    """

    type: str | None = None
    models: tuple[str, ...] | None = None
    problem: str | None = None
    is_refusal: bool = False


@dataclass(frozen=True)
class Said:
    """What became of a request. `problem` None: it was answered well. `status` None: there was no answer."""

    status: int | None
    problem: str | None = None


@dataclass(frozen=True)
class _Reply:
    status: int
    is_llama: bool
    body: bytes  # empty where nobody wants to know it


class _Model(msgspec.Struct):
    id: str
    owned_by: object = None


class _Models(msgspec.Struct):
    data: list[_Model] = []


class _Props(msgspec.Struct):
    total_slots: Annotated[int, msgspec.Meta(ge=0)]


class Asker:
    """Asks one server. Raises OSError when its CA file can't be used."""

    def __init__(self, server: ServerConfig, timeout_s: float) -> None:
        self._root = server.url.rstrip("/")
        self._timeout_s = timeout_s
        self._has_key = bool(server.api_key)
        headers = {b"connection": b"close", b"accept-encoding": b"identity"}
        if server.api_key:
            headers[b"authorization"] = b"Bearer " + server.api_key.encode()
        self._client = httpx.Client(
            headers=headers,
            verify=tls_context(server),
            timeout=timeout_s,
            limits=httpx.Limits(max_keepalive_connections=0),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # none is kept: each question is the first
            trust_env=False,
        )

    def probe(self, path: str, *, is_llama: bool) -> Found:
        """GET `path`. `is_llama`: what is known of the server; any 503 of llama.cpp means that it loads."""
        try:
            reply = self._get(path, body_of=503)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Found(Probe.FAILED, self._reason(error, path), isinstance(_root(error), ConnectionRefusedError))
        if reply.status == 503 and (is_llama or reply.is_llama or b"Loading model" in reply.body):
            return Found(Probe.LOADING, "loads its model", is_llama=reply.is_llama)
        if reply.status >= 500:
            return Found(Probe.FAILED, f"answers {path} with HTTP {reply.status}", is_llama=reply.is_llama)
        return Found(Probe.OK, is_llama=reply.is_llama)  # 401, 404 and their like: it lives

    def models(self) -> Told:
        """GET /v1/models: which models it has, and what it is."""
        path = "/v1/models"
        try:
            reply = self._get(path, body_of=200)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Told(problem=self._reason(error, path))
        kind = LLAMA_CPP if reply.is_llama else OPENAI
        if reply.status in (401, 403):
            refuses = "refuses the gateway's api_key" if self._has_key else "wants an api_key of the gateway"
            return Told(kind, problem=f"{refuses} (HTTP {reply.status})", is_refusal=True)
        if reply.status != 200:
            return Told(kind, problem=f"answers {path} with HTTP {reply.status}")
        try:
            models = msgspec.json.decode(reply.body, type=_Models).data
        except _UNREADABLE as error:
            return Told(kind, problem=f"tells its models in a way that is not understood: {error}")
        if any(model.owned_by == "llamacpp" for model in models):  # a proxy in between says `Server: nginx`
            kind = LLAMA_CPP
        return Told(kind, tuple(dict.fromkeys(model.id for model in models)))

    def slots(self) -> int | None:
        """GET /props: how many requests a llama-server works on at once. None: it does not tell. Raises NoAnswer."""
        try:
            reply = self._get("/props", body_of=200)
            return msgspec.json.decode(reply.body, type=_Props).total_slots if reply.status == 200 else None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoAnswer(self._reason(error, "/props")) from error
        except _UNREADABLE:
            return None

    def post(self, path: str, body: object) -> Said:
        """A real request, for an administrator who wants to know whether it is answered. This does need a slot."""
        try:
            content, headers = msgspec.json.encode(body), {"content-type": "application/json"}
            with self._client.stream("POST", self._root + path, content=content, headers=headers) as response:
                said = self._read(response)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Said(None, self._reason(error, path))
        if response.status_code == 200:
            return Said(200)
        words = " ".join(said[:MAX_WORDS].decode(errors="replace").split())
        return Said(response.status_code, f"answers {path} with HTTP {response.status_code}: {words}")

    def _get(self, path: str, *, body_of: int) -> _Reply:
        """`body_of`: the status whose body is wanted."""
        with self._client.stream("GET", self._root + path) as response:
            body = self._read(response) if response.status_code == body_of else b""
            return _Reply(response.status_code, response.headers.get("server") == LLAMA_CPP, body)

    def _read(self, response: httpx.Response) -> bytes:
        """httpx's timeout is for each piece; the deadline is for all."""
        deadline = time.monotonic() + self._timeout_s
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            if len(body) > MAX_BYTES:
                raise httpx.RemoteProtocolError(f"its answer has more than {MAX_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("its answer does not end")
        return bytes(body)

    def _reason(self, error: Exception, path: str) -> str:
        root = _root(error)
        match root:
            case _ if isinstance(error, httpx.TimeoutException):
                return late(path, self._timeout_s)
            case ConnectionRefusedError():
                return "refuses connections"
            case ssl.SSLCertVerificationError():
                return f"has a certificate that is not accepted: {root.verify_message}"
            case ssl.SSLError():
                return f"does not speak TLS as it should: {root.reason or root}"
            case socket.gaierror():
                return f"has a name that is not found: {root.strerror}"
            case OSError():
                return f"can't be reached: {root.strerror or root}"
        return f"does not answer {path}: {error or type(error).__name__}"


def late(path: str, timeout_s: float) -> str:
    return f"does not answer {path} within {timeout_s:g} s"


def tls_context(server: ServerConfig) -> ssl.SSLContext:
    """As strict as the gateway's own connections (upstream_tls): not less, not more. Raises OSError.

    Not `ssl.create_default_context`, which since Python 3.13 refuses CAs that they accept.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificates and names; trusts nobody yet
    context.hostname_checks_common_name = False
    if not server.verify_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif server.url.startswith("https:"):
        context.load_verify_locations(server.ca_file or certifi.where())
    return context


def _root(error: BaseException) -> BaseException:
    """What httpx and httpcore wrapped; httpcore cuts the chain of causes by `from None`."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error
