"""Hostile input: what is answered, and whether it reached a server. The proxy serves others all the while.

`python tests/test_hostile.py` prints the table.
"""

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy import ROOT, Key, Proxy
from upstream import Request, Upstream, reply
from waiting import eventually

TIMEOUT_S = 20
CHAT = "/v1/chat/completions"
BODY = b'{"model":"tiny","messages":[]}'
KEY = "{key}"  # stands for the user's key in what is sent
AUTH = f"Authorization: Bearer {KEY}"
MAX_BODY_MB = 4
CLOSED = "closed"

# What a wrong line of ours costs in memory: far below what is sent, far above noise.
MAX_GROWTH_BYTES = 60 << 20

# The entry script with short deadlines, so that silence can be tested.
HASTY = """
import sys

sys.path.insert(0, {addon!r})

from gateway import connections

connections.TICK_S = 0.1
connections.HEAD_TIMEOUT_S = connections.IDLE_TIMEOUT_S = connections.BODY_TIMEOUT_S = 1.5

from gateway.hooks import Gateway

addons = [Gateway()]
"""


def request(line: str, *headers: str, body: bytes = b"", length: bool = True) -> bytes:
    fields = [*headers, *([f"Content-Length: {len(body)}"] if length and body else [])]
    return "".join(f"{text}\r\n" for text in (line, *fields, "")).encode("latin-1") + body


def chat(*headers: str, body: bytes = BODY, length: bool = True, host: str = "Host: gateway") -> bytes:
    return request(f"POST {CHAT} HTTP/1.1", *([host] if host else []), *headers, body=body, length=length)


def get(target: str, *headers: str, method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    return request(f"{method} {target} {version}", "Host: gateway", *headers)


@dataclass(frozen=True)
class Case:
    """`statuses`: of each answer on the connection, in order; "closed" when there is none. `reached`: how many of its
    requests a server saw."""

    name: str
    data: bytes
    statuses: Sequence[str]
    reached: int = 0

    def __str__(self) -> str:
        return self.name


def one(name: str, data: bytes, status: str, reached: int = 0) -> Case:
    return Case(name, data, (status,), reached)


def chunked(body: bytes, trailer: bytes = b"") -> bytes:
    return b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailer)


TE = "Transfer-Encoding: chunked"
NESTED = b'{"model":"tiny","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
NESTED_OBJECTS = b'{"model":"tiny","x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"


def model(name: object) -> bytes:
    return json.dumps({"model": name, "messages": []}).encode()


TARGETS = [
    one("absolute target, no key", get("http://evil.example/v1/chat/completions"), "401"),
    one("absolute target", get(f"http://evil.example{CHAT}", AUTH), "200", 1),
    one("absolute target, private path", get("http://evil.example/slots", AUTH), "403"),
    one("absolute target with user info", get(f"http://a:b@evil.example{CHAT}", AUTH), "400"),
    one("absolute target, https", get(f"https://evil.example{CHAT}", AUTH), "200", 1),
    one("absolute target, no path", get("http://evil.example", AUTH), "200", 1),
    one("absolute target, file:", get("file:///etc/passwd", AUTH), "400"),
    one("CONNECT, no key", request("CONNECT evil.example:443 HTTP/1.1", "Host: evil.example"), "400"),
    one("CONNECT", request("CONNECT evil.example:443 HTTP/1.1", "Host: evil.example", AUTH), "400"),
    one("CONNECT to the gateway itself", request("CONNECT gateway:80 HTTP/1.1", "Host: gateway", AUTH), "400"),
    one("target without a slash", get("v1/models", AUTH), "400"),
    one("target *", get("*", AUTH), "400"),
    one("OPTIONS *", get("*", AUTH, method="OPTIONS"), "400"),
    one("OPTIONS *, no key", get("*", method="OPTIONS"), "400"),
    one("empty target", b"GET  HTTP/1.1\r\nHost: gateway\r\n\r\n", "400"),
    one("target of 100 kB", get("/" + "a" * 100_000, AUTH), "431"),
    one("target with a NUL", get("/v1/a\0b", AUTH), "400"),
    one("target with a bare CR", get("/v1/a\rb", AUTH), "400"),
    one("target with bytes above 127", get("/v1/\xff\xfe", AUTH), "200", 1),
    one("target with a fragment", get("/v1/other#a", AUTH), "400"),
]

HOSTS = [
    one("forged Host", chat(AUTH, host="Host: evil.example"), "200", 1),
    one("no Host", chat(AUTH, host=""), "200", 1),
    one("two Hosts", chat("Host: evil.example", AUTH), "200", 1),
    one("Host mitm.it", get("/", "Host: mitm.it"), "401"),
    one("Host with a port and path", chat(AUTH, host="Host: evil.example:1/x"), "200", 1),
]

LENGTHS = [
    one("TE and CL", chat(AUTH, TE, "Content-Length: 5", body=chunked(BODY), length=False), "400"),
    one("CL twice, different", chat(AUTH, "Content-Length: 5", "Content-Length: 30", body=BODY, length=False), "400"),
    one("CL twice, the same", chat(AUTH, *["Content-Length: 30"] * 2, body=BODY, length=False), "400"),
    one("CL +30", chat(AUTH, "Content-Length: +30", body=BODY, length=False), "400"),
    one("CL -1", chat(AUTH, "Content-Length: -1", body=BODY, length=False), "400"),
    one("CL 3 0", chat(AUTH, "Content-Length: 3 0", body=BODY, length=False), "400"),
    one("CL 30, 30", chat(AUTH, "Content-Length: 30, 30", body=BODY, length=False), "400"),
    one("CL 0x1e", chat(AUTH, "Content-Length: 0x1e", body=BODY, length=False), "400"),
    one("CL of 30 digits", chat(AUTH, f"Content-Length: {'9' * 30}", body=BODY, length=False), CLOSED),
    one("CL of 5,000 digits", chat(AUTH, f"Content-Length: {'9' * 5000}", body=BODY, length=False), "400"),
    one("CL in other digits", chat(AUTH, "Content-Length: \u00b2", body=BODY, length=False), "400"),
    one("bad TE", chat(AUTH, "Transfer-Encoding: xchunked", body=chunked(BODY), length=False), "400"),
    one("TE twice", chat(AUTH, TE, TE, body=chunked(BODY), length=False), "400"),
    one("TE with a space before the colon", chat(AUTH, "Transfer-Encoding : chunked", length=False), "400"),
    one(
        "TE in HTTP/1.0",
        request(f"POST {CHAT} HTTP/1.0", "Host: g", AUTH, TE, body=chunked(BODY), length=False),
        "400",
    ),
    one("chunk size with a sign", chat(AUTH, TE, body=b"+1e\r\n" + BODY + b"\r\n0\r\n\r\n", length=False), CLOSED),
    one("chunk size no number", chat(AUTH, TE, body=b"zz\r\n" + BODY + b"\r\n0\r\n\r\n", length=False), CLOSED),
    one("chunk of 2**64", chat(AUTH, TE, body=b"1" + b"0" * 16 + b"\r\n" + BODY, length=False), CLOSED),
    one("chunked with trailers", chat(AUTH, TE, body=chunked(BODY, b"X-T: 1\r\n"), length=False), "200", 1),
    one(
        "chunked with a key in the trailers",
        chat(TE, body=chunked(BODY, f"{AUTH}\r\n".encode()), length=False),
        "401",
    ),
    one("chunked", chat(AUTH, TE, body=chunked(BODY), length=False), "200", 1),
]

KEYS = [
    one("no key", chat(), "401"),
    one("wrong key", chat("Authorization: Bearer sk-wrong"), "401"),
    one("Authorization twice, the same", chat(AUTH, AUTH), "401"),
    one("Authorization twice, good and bad", chat(AUTH, "Authorization: Bearer sk-wrong"), "401"),
    one("Authorization twice, bad and good", chat("Authorization: Bearer sk-wrong", AUTH), "401"),
    one("two keys in one Authorization", chat(f"Authorization: Bearer sk-wrong, Bearer {KEY}"), "401"),
    one("wrong Authorization, good x-api-key", chat("Authorization: Bearer sk-wrong", f"X-Api-Key: {KEY}"), "401"),
    one("good Authorization, wrong x-api-key", chat(AUTH, "X-Api-Key: sk-wrong"), "200", 1),
    one("the key in all three headers", chat(AUTH, f"X-Api-Key: {KEY}", f"Api-Key: {KEY}"), "200", 1),
    one("x-api-key twice", chat(f"X-Api-Key: {KEY}", f"X-Api-Key: {KEY}"), "401"),
    one("Basic, the key as password", chat("Authorization: Basic c2s6c2s="), "401"),
    one("scheme in capitals", chat(f"authorization: BEARER {KEY}"), "200", 1),
    one("a key of 60 kB", chat(f"Authorization: Bearer {'a' * 60_000}"), "401"),
    one("a key that is no UTF-8", chat("Authorization: Bearer \xff\xfe"), "401"),
    one("a key with a NUL", chat(f"Authorization: Bearer {KEY}\0"), "400"),
    one("the key named as hop-by-hop", chat(AUTH, "Connection: authorization"), "200", 1),
    one("the key as a proxy's", chat(f"Proxy-Authorization: Bearer {KEY}"), "401"),
    one("key in the query", request(f"POST {CHAT}?api_key=sk HTTP/1.1", "Host: g", body=BODY), "401"),
    one("underscores for dashes", chat(f"X_Api_Key: {KEY}"), "401"),
    one("space before the colon", chat(f"Authorization : Bearer {KEY}"), "400"),
    one("key in a folded line", chat(f"Authorization: Bearer\r\n {KEY}"), "400"),
]

HEADERS = [
    one("head of 70 kB in one header", chat(AUTH, f"X-A: {'a' * 70_000}"), "431"),
    one("head of 10 MB", chat(AUTH, f"X-A: {'a' * 10_000_000}"), "431"),
    one("200,000 headers", chat(AUTH, *["A: b"] * 200_000), "431"),
    one("head without an end, 10 MB", b"POST / HTTP/1.1\r\nX-A: " + b"a" * 10_000_000, "431"),
    one("10 MB without a line end", b"a" * 10_000_000, "431"),
    one("a name of 60 kB", chat(AUTH, f"{'a' * 60_000}: b"), "200", 1),
    one("NUL in a value", chat(AUTH, "X-A: a\0b"), "400"),
    one("bare CR in a value", chat(AUTH, "X-A: a\rX-B: b"), "400"),
    one("bare LF as line end", chat(AUTH, "X-A: a\nX-B: b"), "200", 1),
    one("a header without a colon", chat(AUTH, "nonsense"), "400"),
    one("a header without a name", chat(AUTH, ": b"), "400"),
    one("obs-fold", chat(AUTH, "X-A: a\r\n b"), "400"),
    one("bytes above 127", chat(AUTH, "X-A: \xe4\xff"), "200", 1),
    one("Expect: 100-continue", chat(AUTH, "Expect: 100-continue"), "200", 1),
    one("Expect: nonsense", chat(AUTH, "Expect: nonsense"), "200", 1),
    one("X-Conversation-Id", chat(AUTH, "X-Conversation-Id: other"), "200", 1),
    one("X-Request-ID of 30 kB", chat(AUTH, f"X-Request-ID: {'a' * 30_000}"), "200", 1),
    one("X-Request-ID twice", chat(AUTH, "X-Request-ID: a", "X-Request-ID: b"), "200", 1),
    one("X-Request-ID no UTF-8", chat(AUTH, "X-Request-ID: \xff\xfe"), "200", 1),
]

PROTOCOLS = [
    one(
        "h2c upgrade", chat(AUTH, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA"), "200", 1
    ),
    one("websocket", get("/v1/realtime", AUTH, "Connection: Upgrade", "Upgrade: websocket"), "200", 1),
    one("websocket, no key", get("/v1/realtime", "Connection: Upgrade", "Upgrade: websocket"), "401"),
    Case("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0", ("400", "400")),
    one("HTTP/2.0 in the request line", get("/v1/other", AUTH, version="HTTP/2.0"), "400"),
    one("HTTP/2.0, no key", get("/v1/other", version="HTTP/2.0"), "400"),
    one("HTTP/3 in the request line", get("/v1/other", AUTH, version="HTTP/3"), "400"),
    one("HTTP/9.9", get("/v1/other", AUTH, version="HTTP/9.9"), "400"),
    one("HTTP/0.9", b"GET /v1/models\r\n\r\n", "400"),
    one("HTTP/1.0", request(f"POST {CHAT} HTTP/1.0", "Host: g", AUTH, body=BODY), "200", 1),
    one("nonsense", b"\xff\xfe\xfd nonsense\r\n\r\n", "400"),
    one("a TLS hello that is none", b"\x16\x03\x01\x00\x05hello", CLOSED),
    Case("pipelined, good and without a key", chat(AUTH) + chat() + chat(AUTH), ("200", "401", "200"), 2),
    Case("a request smuggled behind a refused one", chat(body=b"") + chat(AUTH), ("401", "200"), 1),
    Case("a body that looks like a request", chat(body=chat()), ("401",)),
    Case("private behind public", get("/health") + get("/slots", AUTH) + get("/slots"), ("200", "403", "401")),
]

METHODS = [
    one("TRACE", get("/v1/other", AUTH, method="TRACE"), "405"),
    one("TRACE, no key", get("/v1/other", method="TRACE"), "405"),
    one("lower-case post", request(f"post {CHAT} HTTP/1.1", "Host: g", AUTH, body=BODY), "200", 1),
    one("lower-case get of a private path", get("/slots", AUTH, method="get"), "403"),
    one("made-up method, no key", get("/v1/other", method="FOO"), "401"),
    one("HEAD", get("/v1/models", AUTH, method="HEAD"), "200"),
    one("DELETE of a private path", get("/slots", AUTH, method="DELETE"), "403"),
    one("OPTIONS, no key", get(CHAT, method="OPTIONS"), "401"),
]

PRIVATE = [
    one(f"private: {path}", get(path, AUTH), "403")
    for path in (
        "/slots",
        "/slots/0?action=save",
        "/slots/",
        "//slots",
        "///slots//",
        "/./slots",
        "/v1/../slots",
        "/v1/%2e%2e/slots",
        "/v1/..%2fslots",
        "/%73lots",
        "/%53LOTS",
        "/SLOTS?x",
        "/slots;x",
        "/slots%3fx",
        "/slots%2f0",
        "/\\slots",
        "/%5cslots",
        "/slots/../slots",
        "/v1/x;/../../slots",
        "/x%3f/../slots",
        "/props",
        "/lora-adapters",
        "/v1/stream/abc",
        "/v1/streams",
        "/models/load",
        "/tools",
    )
]

# Once decoded, as servers do, these are no private paths.
PRIVATE += [one(f"not private: {path}", get(path, AUTH), "200", 1) for path in ("/slots%20", "/%2573lots")]

UNCLEAR = [
    one(f"unclear: {path}", get(path, AUTH), "400")
    for path in (
        "/slots%00",
        "/v1/embeddings;x/../chat/completions",
        "/v1/embeddings%3F/%2e%2e/chat/completions",
        "/v1\\embeddings;\\..\\chat\\completions",
        "/v1/other#x",
    )
]

OURS = [
    one("/metrics of a server", get("/v1/../metrics", AUTH), "404"),
    one("//metrics", get("//metrics", AUTH), "404"),
    one("/admin", get("/admin/keys", AUTH), "404"),
    one("/admin, no key", get("/admin/keys"), "404"),
    one("/%61dmin", get("/%61dmin/keys", AUTH), "404"),
    one("POST /health", request("POST /health HTTP/1.1", "Host: g", AUTH, body=BODY), "404"),
    one("/health?x", get("/health?x"), "200"),
    one("//health, no key", get("//health"), "401"),
    one("/health/../slots", get("/health/../slots"), "401"),
]

BODIES = [
    one("no JSON", chat(AUTH, body=b"{nonsense"), "400"),
    one("a list", chat(AUTH, body=b"[1]"), "400"),
    one("a string", chat(AUTH, body=b'"tiny"'), "400"),
    one("null", chat(AUTH, body=b"null"), "400"),
    one("two objects", chat(AUTH, body=BODY + BODY), "400"),
    one("nothing, where JSON should be", chat(AUTH, "Content-Length: 0", body=b""), "200", 1),
    one("UTF-16", chat(AUTH, body=BODY.decode().encode("utf-16")), "400"),
    one("a BOM", chat(AUTH, body=b"\xef\xbb\xbf" + BODY), "400"),
    one("bytes that are no UTF-8", chat(AUTH, body=b'{"model":"\xff\xfe"}'), "400"),
    one("100,000 lists deep", chat(AUTH, body=NESTED), "400"),
    one("100,000 objects deep", chat(AUTH, body=NESTED_OBJECTS), "400"),
    one("a number of 1 MB", chat(AUTH, body=b'{"model":"tiny","n":' + b"9" * 1_000_000 + b"}"), "400"),
    one("n of 1e308", chat(AUTH, body=b'{"model":"tiny","n":1e308}'), "200", 1),
    one("n of 2**70", chat(AUTH, body=b'{"model":"tiny","n":1180591620717411303424}'), "200", 1),
    one("n of -1e999", chat(AUTH, body=b'{"model":"tiny","n":-1e999}'), "400"),
    one("NaN", chat(AUTH, body=b'{"model":"tiny","n":NaN}'), "400"),
    one("model a number", chat(AUTH, body=model(7)), "400"),
    one("model a list", chat(AUTH, body=model(["tiny"])), "400"),
    one("model null", chat(AUTH, body=model(None)), "200", 1),
    one("model twice", chat(AUTH, body=b'{"model":"nothing","model":"tiny"}'), "400"),
    one("model twice, escaped", chat(AUTH, body=b'{"model":"tiny","mod\\u0065l":"nothing"}'), "400"),
    one("model with control characters", chat(AUTH, body=model("tiny\0\r\n\x1b[31m")), "404"),
    one("model of 1 MB", chat(AUTH, body=model("m" * 1_000_000)), "400"),
    one("model of emoji", chat(AUTH, body=model("\U0001f999" * 50)), "404"),
    one("model half a surrogate", chat(AUTH, body=b'{"model":"\\ud83d"}'), "400"),
    one("model like SQL", chat(AUTH, body=model("'; drop table requests; --")), "404"),
    one("model like a path", chat(AUTH, body=model("../../etc/passwd")), "404"),
    one("model over a pattern's bound", chat(AUTH, body=model("gpt-" + "a" * 5000)), "400"),
    one("stream a string", chat(AUTH, body=b'{"model":"tiny","stream":"yes"}'), "200", 1),
    one("stream_options a list", chat(AUTH, body=b'{"model":"tiny","stream":true,"stream_options":[]}'), "200", 1),
    one("JSON called a form", chat(AUTH, "Content-Type: multipart/form-data"), "200", 1),
    one("a multipart body without a boundary", chat(AUTH, "Content-Type: multipart/form-data", body=b"--x"), "400"),
    one("compressed", chat(AUTH, "Content-Encoding: gzip", body=b"\x1f\x8b\x08nonsense"), "400"),
]

TABLES = {
    "targets": TARGETS,
    "hosts": HOSTS,
    "lengths": LENGTHS,
    "keys": KEYS,
    "headers": HEADERS,
    "protocols": PROTOCOLS,
    "methods": METHODS,
    "private": PRIVATE,
    "unclear": UNCLEAR,
    "ours": OURS,
    "bodies": BODIES,
}
CASES = [case for cases in TABLES.values() for case in cases]


class Rig:
    def __init__(self, folder: Path, upstream: Upstream, aliases: dict[str, str] | None = None, **more: object) -> None:
        self.upstream = upstream
        upstream.always("/slots", reply({"private": True}))
        entry = folder / "entry.py"
        entry.write_text(HASTY.format(addon=str(ROOT / "addon")))
        servers = [{"name": "a", "url": upstream.url, "models": ["tiny"]}]
        aliases = {"gpt-*": "tiny"} if aliases is None else aliases
        self.proxy = Proxy(folder / "proxy", servers, aliases=aliases, max_body_mb=MAX_BODY_MB, **more)  # type: ignore[arg-type]
        self.proxy.addon = entry
        self.proxy.start()
        self.key: Key = self.proxy.create_key("alice")

    def send(self, data: bytes | Iterable[bytes], count: int = 1) -> tuple[str, ...]:
        """The statuses of what is answered: until there are `count`, or the connection ends."""
        parts = [data] if isinstance(data, bytes) else data
        address = ("127.0.0.1", self.proxy.port)
        with closing(socket.create_connection(address, TIMEOUT_S)) as connection, ThreadPoolExecutor(1) as pool:
            # Read all the while, as an answer may come long before all is sent.
            reading = pool.submit(read_answers, connection, count)
            with contextlib.suppress(ConnectionError):
                for part in parts:
                    connection.sendall(part.replace(KEY.encode(), self.key.key.encode()))
            received = reading.result()
            if count <= len(statuses(received)):
                assert self.proxy.healthy()
                connection.settimeout(0)  # what else came meanwhile
                with contextlib.suppress(OSError):
                    received += connection.recv(1 << 16)
        return statuses(received)

    def booked(self) -> int:
        """Requests that went to a server and have their final row."""
        return len(self.proxy.query("select 1 from requests where attempts > 0 and outcome != 'open'"))

    def rss(self) -> int:
        status = Path(f"/proc/{self.proxy.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10

    def check(self, seen: Sequence[Request]) -> None:
        assert self.proxy.healthy()
        for one_request in seen:
            assert self.key.key.encode() not in one_request.head + one_request.raw_body, "the key reached the server"
            assert one_request.target.startswith("/")
            assert one_request.values("host") == [f"127.0.0.1:{self.upstream.port}"]
            assert len(one_request.values("content-length")) <= 1
            assert not one_request.values("transfer-encoding")
            assert not one_request.values("upgrade") + one_request.values("x-conversation-id")
        assert not self.upstream.incomplete


def read_answers(connection: socket.socket, count: int) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            received += part
            if (found := statuses(received)) != (CLOSED,) and len(found) >= count:
                break
    return received


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            received += part
    return received


def statuses(received: bytes) -> tuple[str, ...]:
    """The status of each answer in what came; Content-Length frames all of ours and of the upstream's."""
    found = []
    while match := re.match(rb"HTTP/1\.[01] (\d+)", received):
        head, _, rest = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head.lower())
        received = rest[int(length[1]) if length else 0 :]
        if match[1] != b"100":
            found.append(match[1].decode())
    return tuple(found) or (CLOSED,)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, confdir: Path) -> Iterator[Rig]:
    with Upstream() as upstream:
        rig = Rig(tmp_path_factory.mktemp("hostile"), upstream, confdir=confdir)
        yield rig
        log = rig.proxy.log()
        rig.proxy.kill()
        print(log[-3000:])
    assert "Traceback" not in log
    assert "has crashed" not in log


@pytest.mark.parametrize("case", CASES, ids=str)
def test_input(rig: Rig, case: Case) -> None:
    before, booked = len(rig.upstream.asked), rig.booked()
    answer = rig.send(case.data, len(case.statuses))
    seen = rig.upstream.asked[before:]
    rig.check(seen)
    assert (answer, len(seen)) == (tuple(case.statuses), case.reached)
    # The status comes before the end of the answer, and that comes after the row.
    eventually(lambda: rig.booked() - booked == case.reached, "the row")


NARROW = {
    "/v1/embeddings": "200",
    "/V1/Embeddings/": "200",
    "//v1/embeddings": "200",
    "/v1/embeddings?/../chat/completions": "200",
    CHAT: "403",
    "/v1/embeddings/x": "403",
    "/v1/embeddings;x": "403",
    "/v1/embeddings%3bx/chat/completions": "403",
    "/v1/embeddings%3f": "403",
    "/v1/embeddings/../chat/completions": "400",
    "/v1/embeddings;x/../chat/completions": "400",
    "/v1/embeddings%3F/%2e%2e/chat/completions": "400",
    "/v1\\embeddings;\\..\\chat\\completions": "400",
    "/v1/embeddings#/../chat/completions": "400",
}


def test_a_key_for_one_endpoint(rig: Rig) -> None:
    key = rig.proxy.create_key("narrow", "--endpoint", "/v1/embeddings").key
    before = len(rig.upstream.asked)
    answers = {path: rig.send(get(path, f"Authorization: Bearer {key}"))[0] for path in NARROW}
    assert answers == NARROW
    assert [each.target for each in rig.upstream.asked[before:]] == [path for path in NARROW if NARROW[path] == "200"]


def endless(size: int) -> Iterator[bytes]:
    for _ in range(size >> 20):
        yield b"a" * (1 << 20)


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size >> 20):
        yield b"100000\r\n" + b"a" * (1 << 20) + b"\r\n"
    yield b"0\r\n\r\n"


HUGE = 200 << 20
UPLOADS: dict[str, Callable[[], Iterator[bytes]]] = {
    "Content-Length": lambda: _two(chat(AUTH, f"Content-Length: {HUGE}", body=b"", length=False), endless(HUGE)),
    "chunked": lambda: _two(chat(AUTH, TE, body=b"", length=False), chunks(HUGE)),
    "no key": lambda: _two(chat(f"Content-Length: {HUGE}", body=b"", length=False), endless(HUGE)),
    "no key, chunked": lambda: _two(chat(TE, body=b"", length=False), chunks(HUGE)),
}


def _two(head: bytes, body: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from body


@pytest.mark.parametrize("name", UPLOADS)
def test_a_body_of_200_mb(rig: Rig, name: str) -> None:
    before, seen = rig.rss(), len(rig.upstream.asked)
    assert rig.send(UPLOADS[name]()) == (("401",) if "no key" in name else ("413",))
    assert rig.rss() - before < MAX_GROWTH_BYTES
    assert len(rig.upstream.asked) == seen
    assert rig.proxy.healthy()


def test_silence_is_cut_and_serves_others(rig: Rig) -> None:
    """1,000 connections that say nothing, some that begin a request and stop."""
    begun = [b"", b"POST ", chat(AUTH)[:-5], chat(AUTH, TE, body=b"5\r\nab", length=False)]
    with ExitStack() as stack:
        address = ("127.0.0.1", rig.proxy.port)
        silent = [stack.enter_context(closing(socket.create_connection(address, TIMEOUT_S))) for _ in range(1000)]
        for number, connection in enumerate(silent[:40]):
            connection.sendall(begun[number % len(begun)].replace(KEY.encode(), rig.key.key.encode()))
        assert rig.send(chat(AUTH)) == ("200",)
        for connection in silent:
            read_all(connection)  # times out, should it not be closed
        assert rig.send(chat(AUTH)) == ("200",)
    open_sockets = Path(f"/proc/{rig.proxy.pid}/fd")
    eventually(lambda: len(list(open_sockets.iterdir())) < 100, "the end of the silent ones' sockets")


def test_a_pattern_that_is_slow(tmp_path: Path, confdir: Path, upstream: Upstream) -> None:
    """A regular expression that backtracks without end holds up one request, not the gateway."""
    rig = Rig(tmp_path, upstream, aliases={"/(a|aa)+c/": "tiny"}, confdir=confdir)
    with closing(socket.create_connection(("127.0.0.1", rig.proxy.port), TIMEOUT_S)) as connection:
        connection.sendall(chat(AUTH, body=model("a" * 500)).replace(KEY.encode(), rig.key.key.encode()))
        try:
            # Sent behind the other one, so that it is known to have arrived.
            eventually(lambda: rig.proxy.healthy(), "an answer of /health")
            assert statuses(read_answers(connection, 1)) == ("404",)
        finally:
            rig.proxy.kill()


def test_a_head_byte_by_byte_is_cut(rig: Rig) -> None:
    """However busy it looks: the head has one deadline as a whole."""

    def drip() -> Iterator[bytes]:
        for byte in chat(AUTH, f"X-A: {'a' * 10_000}"):
            yield bytes([byte])
            time.sleep(0.01)  # the drip itself

    assert rig.send(drip()) in [(CLOSED,), ("408",)]
    assert rig.proxy.healthy()


def test_all_that_was_let_in_is_booked(rig: Rig) -> None:
    """Comes last: after all of the above no row is open, no claim is held."""
    eventually(lambda: not rig.proxy.query("select 1 from requests where outcome = 'open'"), "the end of all")
    with rig.proxy.client() as client:
        assert client.get("/health").json()["running"] == 0


def main() -> None:
    """Print the table of what is."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, Upstream() as upstream:
        rig = Rig(Path(folder), upstream)
        print("| input | answer | reached a server |\n|---|---|---|")
        for kind, cases in TABLES.items():
            for case in cases:
                before = len(upstream.asked)
                answer = ", ".join(rig.send(case.data, len(case.statuses)))
                reached = len(upstream.asked) - before
                name = case.name.replace("|", "\\|").encode("unicode_escape").decode()
                print(f"| {kind}: {name} | {answer} | {'yes' if reached else 'no'} |")
        rig.proxy.kill()


if __name__ == "__main__":
    main()
