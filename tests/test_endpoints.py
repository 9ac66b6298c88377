"""Paths that are ours or nobody's, however they are written."""

import pytest

from gateway.endpoints import PRIVATE, canonical, is_private, is_reserved, is_unclear, readings

CANONICAL = {
    "/v1/models": "/v1/models",
    "/V1/Models": "/v1/models",
    "/v1//models/": "/v1/models",
    "//v1/models": "/v1/models",
    "/v1/./x/../models": "/v1/models",
    "/../../v1/models": "/v1/models",
    "/v1%2fmodels": "/v1/models",
    "/%76%31/models": "/v1/models",
    "/v1\\models": "/v1/models",
    "/v1/models;a=b": "/v1/models",
    "/v1/models%3Fx": "/v1/models",
    "": "/",
    "/": "/",
    "//": "/",
}


@pytest.mark.parametrize(("path", "expected"), CANONICAL.items())
def test_canonical(path: str, expected: str) -> None:
    assert canonical(path) == expected


READINGS = {
    "/V1/models/": {"/v1/models"},
    "/v1/models/org%2Fmodel": {"/v1/models/org/model"},
    "/x;/../../slots": {"/x", "/slots"},
    "/x%3f/../slots": {"/x", "/slots"},
    "/v1/embeddings;x/chat": {"/v1/embeddings", "/v1/embeddings;x/chat", "/v1/embeddings/chat"},
    "/v1/embeddings%3Fx/chat": {"/v1/embeddings", "/v1/embeddings?x/chat"},
    "/v1/embeddings%3bx%3fy": {"/v1/embeddings", "/v1/embeddings;x?y", "/v1/embeddings;x"},
}


@pytest.mark.parametrize(("path", "expected"), READINGS.items())
def test_readings(path: str, expected: set[str]) -> None:
    assert set(readings(path)) == expected
    assert canonical(path) in readings(path)


UNCLEAR = [
    "/v1/x;/../../slots",
    "/x%3f/../slots",
    "/v1/embeddings;x/../chat/completions",
    "/v1/embeddings%3F/%2e%2e/chat/completions",
    "/v1\\embeddings;\\..\\chat\\completions",
    "/v1/./models",
    "/v1/..;x/slots",
    "/v1/..%3fx",
    "/v1/%2E%2E%2fslots",
    "/v1/models%5cx",
    "/slots%00",
    "/slots%23",
    "/slots#x",
    "/..",
]


@pytest.mark.parametrize("path", UNCLEAR)
def test_unclear(path: str) -> None:
    assert is_unclear(path)


CLEAR = ["/", "/v1/models/org%2Fmodel", "/v1/.well-known/...", "/a..b/c.", "/with;semicolon=1/and,comma", "/v1//models"]


@pytest.mark.parametrize("path", CLEAR)
def test_clear(path: str) -> None:
    assert not is_unclear(path)


WRITTEN = [
    "{}",
    "{}/",
    "{}/0",
    "/{}",
    "/x/..{}",
    "/.{}",
    "{}?",
    "{}%3f",
    "{};x",
    "{}%2F0",
    "/x;/..{}",
    "/x%3f/..{}",
    "/x;y/../{}",
]


@pytest.mark.parametrize("way", WRITTEN)
@pytest.mark.parametrize("private", PRIVATE)
def test_private_however_written(private: str, way: str) -> None:
    path = way.format(private)
    assert is_private(path)
    assert is_private(path.upper().replace("%2F", "%2f"))
    assert is_private("/" + "".join(f"%{ord(letter):02x}" for letter in private[1:]))


PUBLIC = [
    "/v1/chat/completions",
    "/v1/models",
    "/completion",
    "/v1/completions",
    "/infill",
    "/v1/messages",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/v1/audio/transcriptions",
    "/v1/rerank",
    "/embedding",
    "/slotsx",
    "/v1/streaming",
    "/v1/slots",
    "/loading",
    "/",
    "/models",
    "/unknown/path",
]


@pytest.mark.parametrize("path", PUBLIC)
def test_not_private(path: str) -> None:
    assert not is_private(path)
    assert not is_reserved(path)


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/v1/health",
        "/metrics",
        "/METRICS/",
        "/%6detrics",
        "/v1/usage",
        "/usage",
        "/usage/x",
        "/admin",
        "/admin/x",
        "//admin/keys",
        "/x;/../metrics",
        "/x%3f/../admin/keys",
    ],
)
def test_reserved(path: str) -> None:
    assert is_reserved(path)
