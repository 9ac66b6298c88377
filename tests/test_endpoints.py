"""Paths that are ours or nobody's, however they are written."""

import pytest

from gateway.endpoints import PRIVATE, canonical, is_private, is_reserved

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


WRITTEN = ["{}", "{}/", "{}/0", "/{}", "/x/..{}", "/.{}", "{}?", "{}%3f", "{};x", "{}%2F0"]


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
        "/admin",
        "/admin/x",
        "//admin/keys",
    ],
)
def test_reserved(path: str) -> None:
    assert is_reserved(path)
