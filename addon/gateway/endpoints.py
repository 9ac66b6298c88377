"""Paths: which are ours, and which of the servers' are not for plain keys. All others are proxied, known or not.

A path goes on as it came, and servers differ in how they read one. What is forbidden is so in every reading; what is
allowed must be so in every reading.
"""

import functools
import posixpath
import re
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


@functools.lru_cache(maxsize=256)
def canonical(path: str) -> str:
    """A path as a lenient server may understand it: decoded, without dots and doubled slashes, in lower case."""
    plain = unquote(path).replace("\\", "/").split(";")[0].split("?")[0].lower()
    return _normal(plain)


@functools.lru_cache(maxsize=256)
def readings(path: str) -> tuple[str, ...]:
    """All that servers may understand by a path, as `canonical` writes it: some end it at a ; or at an encoded ?, some
    leave out what follows a ; in a segment, some take both for parts of a name.
    """
    decoded = unquote(path)
    uncut = decoded.replace("\\", "/").lower()
    ways = (uncut, uncut.split("?")[0], re.sub(r";[^/]*", "", uncut), re.sub(r";[^/]*", "", uncut.split("?")[0]))
    return tuple(dict.fromkeys((canonical(path), *map(_normal, ways))))


def _normal(plain: str) -> str:
    return posixpath.normpath("/" + plain.lstrip("/")) if plain else "/"


_ENDS = re.compile("[;?]")


def is_unclear(path: str) -> bool:
    """Whether servers may take a path for another one altogether: it climbs (..), or holds what some end a path at."""
    decoded = unquote(path)
    if any(character in decoded for character in "\\#\0"):
        return True
    return any(_ENDS.split(segment)[0] in (".", "..") for segment in decoded.split("/"))


def is_private(path: str) -> bool:
    """Whether a path (without query) is one of PRIVATE, or below it, however it is written."""
    return any(plain == private or plain.startswith(private + "/") for plain in readings(path) for private in PRIVATE)


def is_reserved(path: str) -> bool:
    """Whether a path belongs to the gateway itself: never proxied, also where nothing answers it yet."""
    ours = ("/health", "/v1/health", "/metrics", "/v1/usage", "/usage", "/admin")
    return any(plain in ours or plain.startswith(("/usage/", "/admin/")) for plain in readings(path))
