"""Paths: which are ours, and which of the servers' are not for plain keys. All others are proxied, known or not."""

import posixpath
from urllib.parse import unquote

# Paths that show or change what belongs to everybody who uses a server: slots, loaded models, other people's streams.
# llama-server's first, then vLLM's, SGLang's and TGI's.
PRIVATE = (
    "/slots",
    "/props",
    "/lora-adapters",
    "/v1/stream",
    "/v1/streams",
    "/v1/chat/completions/control",
    "/models/load",
    "/models/unload",
    "/models/sse",
    "/cors-proxy",
    "/tools",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/collective_rpc",
    "/server_info",
    "/start_profile",
    "/stop_profile",
    "/flush_cache",
    "/update_weights",
    "/get_server_info",
    "/abort_request",
    "/load",
)


def canonical(path: str) -> str:
    """A path as a lenient server may understand it: decoded, without dots and doubled slashes, in lower case."""
    plain = unquote(path).replace("\\", "/").split(";")[0].split("?")[0].lower()
    return posixpath.normpath("/" + plain.lstrip("/")) if plain else "/"


def is_private(path: str) -> bool:
    """Whether a path (without query) is one of PRIVATE, or below it, however it is written."""
    plain = canonical(path)
    return any(plain == private or plain.startswith(private + "/") for private in PRIVATE)


def is_reserved(path: str) -> bool:
    """Whether a path belongs to the gateway itself: never proxied, also where nothing answers it yet."""
    plain = canonical(path)
    return plain in ("/health", "/v1/health", "/metrics", "/v1/usage", "/usage", "/admin") or plain.startswith(
        "/admin/"
    )
