"""What a failed attempt says of its server, and what Retry-After means."""

from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import failover
from gateway.failover import MAX_PAUSE_S, Failure, answered, pause_s
from gateway.health import Health
from gateway.servers import Server
from gateway.settings import Health as HealthConfig
from gateway.settings import Server as ServerConfig

NOW = datetime(2026, 11, 21, 9, 30, tzinfo=UTC)
LOADING = b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'


def told(failure: Failure, times: int = 1) -> Health:
    """A server that was up, after so many failures of a kind."""
    health = Health(HealthConfig(eject_after=3, eject_s=2))
    server = Server(ServerConfig("a", "http://a:1"), health)
    health.probe_ok(0)
    for _ in range(times):
        failover.tell(server, failure, 100, NOW)
    return health


TOLD: dict[str, tuple[Failure, int, str, float]] = {
    "refused": (Failure("refused", "Connect call failed"), 1, "down", 0),
    "closed, once": (Failure("closed", "was reset"), 1, "up", 0),
    "closed, in a row": (Failure("closed", "was reset"), 3, "ejected", 102),
    "timed out, once": (Failure("timed_out", "sent nothing"), 1, "up", 0),
    "timed out, in a row": (Failure("timed_out", "sent nothing"), 3, "ejected", 102),
    "502, once": (answered(502, {}, b""), 1, "up", 0),
    "502, in a row": (answered(502, {}, b""), 3, "ejected", 102),
    "503 and 504 as well": (answered(504, {}, b"x"), 3, "ejected", 102),
    "503, loading": (answered(503, {}, LOADING), 1, "loading", 0),
    "503, loading, with a pause": (answered(503, {"retry-after": "7"}, LOADING), 1, "loading", 0),
    "503, to be asked later": (answered(503, {"retry-after": "7"}, b"busy"), 1, "paused", 107),
    "503, to be asked at once": (answered(503, {"retry-after": "0"}, b"busy"), 3, "ejected", 102),
    "500 that speaks of loading": (answered(500, {}, LOADING), 1, "up", 0),
    "429": (answered(429, {}, b"busy"), 50, "up", 0),
    "429, to be asked later": (answered(429, {"retry-after": "7"}, b""), 1, "paused", 107),
    "429, to be asked some time": (answered(429, {"retry-after": "soon"}, b""), 50, "up", 0),
}


@pytest.mark.parametrize(("failure", "times", "state", "reopens_at"), TOLD.values(), ids=TOLD)
def test_what_a_failure_says_of_its_server(failure: Failure, times: int, state: str, reopens_at: float) -> None:
    health = told(failure, times)
    assert (health.state, health.reopens_at) == (state, reopens_at)


def test_refusing_costs_nothing_to_ask() -> None:
    assert told(Failure("refused", "Connect call failed")).refuses
    assert not told(Failure("closed", "was reset"), 3).refuses


def test_which_statuses_are_tried_elsewhere() -> None:
    """Not 500: llama-server answers its clients' mistakes with it, an image for a text model for one."""
    assert {status for status in range(100, 600) if status in failover.RETRIED} == {429, 502, 503, 504}


PAUSES: dict[str, tuple[str | None, float]] = {
    "none": (None, 0),
    "empty": ("", 0),
    "blank": ("  ", 0),
    "zero": ("0", 0),
    "seconds": ("7", 7),
    "spaces around": (" 7 ", 7),
    "leading zeros": ("007", 7),
    "an hour at most": ("3601", MAX_PAUSE_S),
    "huge": ("9" * 5000, MAX_PAUSE_S),
    "negative": ("-7", 0),
    "a fraction": ("7.5", 0),
    "an exponent": ("1e3", 0),
    "not a number": ("nan", 0),
    "other digits": ("٧", 0),
    "superscript": ("²", 0),
    "a list": ("7, 8", 0),
    "words": ("soon", 0),
    "a date": ("Sat, 21 Nov 2026 09:30:42 GMT", 42),
    "a date in another zone": ("Sat, 21 Nov 2026 10:30:42 +0100", 42),
    "a date without a zone": ("Sat, 21 Nov 2026 09:30:42", 42),
    "a date of unknown zone": ("Sat, 21 Nov 2026 09:30:42 -0000", 42),
    "RFC 850's": ("Saturday, 21-Nov-26 09:30:42 GMT", 42),
    "a date that is past": ("Sat, 21 Nov 2026 09:00:00 GMT", 0),
    "a date far ahead": ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_PAUSE_S),
    "a date beyond the calendar": ("Fri, 31 Dec 99999 23:59:59 GMT", 0),
    "no such day": ("Sat, 31 Feb 2026 09:30:42 GMT", 0),
    "an odd zone": ("Sat, 21 Nov 2026 09:30:42 +9999", 0),
    "half a date": ("Sat, 21 Nov", 0),
    "control characters": ("\x00\x01", 0),
}


@pytest.mark.parametrize(("retry_after", "seconds"), PAUSES.values(), ids=PAUSES)
def test_retry_after(retry_after: str | None, seconds: float) -> None:
    assert pause_s(retry_after, NOW) == seconds


@given(st.text())
def test_retry_after_is_any_text(text: str) -> None:
    assert 0 <= pause_s(text, NOW) <= MAX_PAUSE_S


_PARTS = (
    "Sat,",
    "21",
    "Nov",
    "2026",
    "09:30:42",
    "GMT",
    "+9999",
    "-2400",
    "0",
    "99999999999",
    "24:61:61",
    ":",
    ",",
    "-",
)


@given(st.lists(st.sampled_from(_PARTS), max_size=8))
def test_retry_after_is_nearly_a_date(parts: list[str]) -> None:
    assert 0 <= pause_s(" ".join(parts), NOW) <= MAX_PAUSE_S


@given(
    st.integers(-1_700_000_000, 200_000_000_000),
    st.integers(-23, 23).map(lambda hours: timezone(timedelta(hours=hours))),
)
def test_retry_after_is_any_date(seconds: int, zone: timezone) -> None:
    text = format_datetime((NOW + timedelta(seconds=seconds)).astimezone(zone))
    assert pause_s(text, NOW) == min(max(seconds, 0), MAX_PAUSE_S)
