"""What stands in usage.db: its rows as records with the columns' names and units, and how ids and times are written."""

import os
import time
from datetime import UTC, datetime

import msgspec

# A head may be tens of kilobytes; what clients write into the books of all is less.
MAX_TEXT = 1000


class Row(msgspec.Struct):
    """A row of `requests`: the columns' names and units. None: unknown, or not come to."""

    id: str
    started_at: str
    endpoint: str
    outcome: str
    worker: str
    key_id: int | None = None
    key_name: str | None = None
    team: str | None = None
    model: str | None = None
    served_model: str | None = None
    server: str | None = None
    route: str | None = None
    fallback_from: str | None = None
    stream: int | None = None
    status: int | None = None
    error_code: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    tokens_source: str | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    duration_ms: float | None = None
    prompt_ms: float | None = None
    predicted_ms: float | None = None
    cost_micros: int | None = None
    currency: str | None = None
    attempts: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    client_request_id: str | None = None


class ServerEvent(msgspec.Struct):
    """A row of `server_events`: the columns' names."""

    at: str
    server: str
    state: str
    previous: str
    reason: str | None
    worker: str


def utc_now() -> str:
    """UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def uuid7() -> str:
    """A UUIDv7 (RFC 9562): sorts by the time it was made in, to the millisecond."""
    millis, noise = time.time_ns() // 1_000_000, os.urandom(10)
    high = (noise[0] & 0x0F) | 0x70
    variant = (noise[2] & 0x3F) | 0x80
    digits = f"{millis:012x}{high:02x}{noise[1]:02x}{variant:02x}{noise[3:].hex()}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
