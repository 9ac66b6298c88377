"""A refusal -> the client's dialect: Anthropic's envelope under /v1/messages, OpenAI's everywhere else."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec


class Refusal(Exception):
    """A request is refused. Raised anywhere on its way, turned into a response in one place.

    `status`: HTTP status; `code`: the stable name clients may rely on; `param`: the field at fault.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})


class Reply(NamedTuple):
    """A response of our own."""

    status: int
    body: bytes
    headers: dict[str, str]


# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def refuse(refusal: Refusal, endpoint: str) -> Reply:
    """The response that tells of `refusal`, in the dialect of `endpoint` (a path without query)."""
    status = refusal.status
    if endpoint == "/v1/messages" or endpoint.startswith("/v1/messages/"):
        kind = _ANTHROPIC_TYPES.get(status, "api_error")
        error = {"type": kind, "message": refusal.message, "code": refusal.code, "param": refusal.param}
        envelope: dict[str, object] = {"type": "error", "error": error}
    else:
        kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        envelope = {
            "error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code},
        }
        if endpoint == "/admin" or endpoint.startswith("/admin/"):
            envelope["detail"] = refusal.message  # where smol-llm-proxy's clients look
    return Reply(status, msgspec.json.encode(envelope), {"content-type": "application/json", **refusal.headers})


def stream_error(endpoint: str, code: str, message: str) -> bytes:
    """An event that tells a stream's client of an error, in the dialect of `endpoint`. It may come in the midst of an
    event: the empty lines before it end that one, and mean nothing elsewhere.
    """
    name = b"event: error\n"
    said: dict[str, object]
    if endpoint == "/v1/messages":
        said = {"type": "error", "error": {"type": "api_error", "message": message, "code": code}}
    elif endpoint in ("/v1/responses", "/responses"):
        # https://platform.openai.com/docs/api-reference/responses-streaming/error
        said = {"type": "error", "code": code, "message": message, "param": None}
    else:
        name = b""
        said = {"error": {"message": message, "type": "server_error", "param": None, "code": code}}
    return b"\n\n" + name + b"data: " + msgspec.json.encode(said) + b"\n\n"


def answer(status: int, body: object, headers: Mapping[str, str] | None = None) -> Reply:
    """A JSON response of our own."""
    return Reply(status, msgspec.json.encode(body), {"content-type": "application/json", **(headers or {})})
