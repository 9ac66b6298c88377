"""A refusal in each dialect, as whole bodies."""

import json

import pytest

from gateway.replies import Refusal, Reply, answer, refuse

OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    504: "server_error",
}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@pytest.mark.parametrize(("status", "kind"), OPENAI_TYPES.items())
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messagesx", "/", "*", ""])
def test_openai(path: str, status: int, kind: str) -> None:
    reply = refuse(Refusal(status, "some_code", 'Nö "x"', param="model"), path)
    assert (reply.status, reply.headers) == (status, {"content-type": "application/json"})
    assert json.loads(reply.body) == {
        "error": {"message": 'Nö "x"', "type": kind, "param": "model", "code": "some_code"}
    }


@pytest.mark.parametrize(("status", "kind"), ANTHROPIC_TYPES.items())
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropic(path: str, status: int, kind: str) -> None:
    reply = refuse(Refusal(status, "some_code", "No."), path)
    error = {"type": kind, "message": "No.", "code": "some_code", "param": None}
    assert json.loads(reply.body) == {"type": "error", "error": error}


def test_headers_of_a_refusal() -> None:
    reply = refuse(Refusal(503, "x", "y", headers={"retry-after": "5"}), "/")
    assert reply.headers == {"content-type": "application/json", "retry-after": "5"}


def test_answer() -> None:
    assert answer(200, {"a": [1]}, {"x": "y"}) == Reply(
        200, b'{"a":[1]}', {"content-type": "application/json", "x": "y"}
    )
