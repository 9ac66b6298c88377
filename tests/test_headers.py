"""Which headers of a request a server sees, and which of an answer a client sees."""

import pytest

from gateway.headers import Field, to_client, to_server

DROPPED_TO_SERVER: dict[str, tuple[Field, ...]] = {
    "keys": ((b"Authorization", b"Bearer user"), (b"X-Api-Key", b"user"), (b"API-KEY", b"user")),
    "of one hop": (
        (b"Connection", b"keep-alive"),
        (b"Keep-Alive", b"5"),
        (b"Proxy-Connection", b"x"),
        (b"Proxy-Authorization", b"x"),
        (b"TE", b"trailers"),
        (b"Trailer", b"x"),
        (b"Upgrade", b"h2c"),
        (b"HTTP2-Settings", b"x"),
    ),
    "named by Connection": ((b"connection", b"close, X-One ,x-two"), (b"X-ONE", b"1"), (b"x-two", b"2")),
    "named by two Connections": (
        (b"Connection", b"x-one"),
        (b"Connection", b"x-two"),
        (b"x-one", b"1"),
        (b"x-two", b"2"),
    ),
    "framing": ((b"Content-Length", b"9"), (b"Transfer-Encoding", b"chunked"), (b"Expect", b"100-continue")),
    "host": ((b"Host", b"evil"), (b"host", b"evil")),
    "encodings": ((b"Accept-Encoding", b"gzip, br"),),
    "llama-server's stream names": ((b"X-Conversation-Id", b"1"), (b"x-conversation-ID", b"2")),
}
KEPT: tuple[Field, ...] = (
    (b"Content-Type", b"application/json"),
    (b"X-Other", b"\xff"),
    (b"x-other", b"2"),
    (b"Cookie", b"c"),
)


@pytest.mark.parametrize("dropped", DROPPED_TO_SERVER.values(), ids=DROPPED_TO_SERVER)
def test_not_for_servers(dropped: tuple[Field, ...]) -> None:
    fields = (*KEPT[:2], *dropped, *KEPT[2:])
    assert tuple(to_server(fields, 5, "gpu:1", "secret")) == (
        (b"Host", b"gpu:1"),
        *KEPT,
        (b"Content-Length", b"5"),
        (b"Accept-Encoding", b"identity"),
        (b"Authorization", b"Bearer secret"),
    )


def test_without_body_and_key() -> None:
    assert tuple(to_server((), None, "gpu", "")) == ((b"Host", b"gpu"), (b"Accept-Encoding", b"identity"))


def test_an_empty_body_has_a_length() -> None:
    assert (b"Content-Length", b"0") in tuple(to_server((), 0, "gpu", ""))


TO_CLIENT: dict[str, tuple[tuple[Field, ...], tuple[Field, ...]]] = {
    "framing stays": (((b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked")),) * 2,
    "framing stays, though Connection names it": (
        ((b"Connection", b"content-length"), (b"Content-Length", b"5")),
        ((b"Content-Length", b"5"),),
    ),
    "of one hop": (
        ((b"Connection", b"close"), (b"Keep-Alive", b"timeout=5"), (b"Server", b"llama.cpp")),
        ((b"Server", b"llama.cpp"),),
    ),
    "named by Connection": (((b"Connection", b"X-Hop"), (b"x-hop", b"1"), (b"x", b"2")), ((b"x", b"2"),)),
    "our request id": (((b"X-Request-Id", b"theirs"), (b"x", b"2")), ((b"x", b"2"),)),
    "doubled ones": (((b"Set-Cookie", b"a"), (b"Set-Cookie", b"b")),) * 2,
}


@pytest.mark.parametrize(("fields", "expected"), TO_CLIENT.values(), ids=TO_CLIENT)
def test_to_client(fields: tuple[Field, ...], expected: tuple[Field, ...]) -> None:
    assert tuple(to_client(fields)) == expected
