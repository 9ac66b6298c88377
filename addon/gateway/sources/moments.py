"""Times as databases and services write them -> UTC ISO 8601. What says "never" (9999-12-31, infinity, the year 10000)
is the last moment there is; what can't be understood is an error.
"""

import re
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal

from gateway.keys import iso

NEVER = "9999-12-31T23:59:59.999Z"
# The last second of the year 9999. A number beyond it is meant as milliseconds.
LAST_SECOND = 253_402_300_799
_FAR_YEARS = 9999
# PostgreSQL's words for what is later than all times, or than the year 9999.
_FAR = re.compile(r"\+?(infinity|[0-9]{5,}-[0-9]{2}-[0-9]{2}([ T].*)?)", re.IGNORECASE)
_DIGITS = re.compile(r"[0-9]{9,}")


def end(value: object) -> str:
    """When something ends: a date is valid through it. Raises ValueError."""
    return _moment(value, timedelta(days=1))


def start(value: object) -> str:
    """When something begins: a date means its beginning. Raises ValueError."""
    return _moment(value, timedelta())


def _moment(value: object, of_a_date: timedelta) -> str:
    """Without a zone, UTC is meant. A number is seconds since 1970, or milliseconds."""
    if isinstance(value, str):
        text = value.strip()
        if _FAR.fullmatch(text):
            return NEVER
        value = int(text) if _DIGITS.fullmatch(text) else _read(text)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _since_1970(value)
    if isinstance(value, date):
        return _iso(value, of_a_date)
    raise ValueError("no time")


def _read(text: str) -> date:
    moment = datetime.fromisoformat(text)
    return moment if "T" in text or ":" in text else moment.date()


def _since_1970(number: float | Decimal) -> str:
    try:
        return iso(datetime.fromtimestamp(float(number if number <= LAST_SECOND else number / 1000), UTC))
    except (ArithmeticError, OSError):
        raise ValueError("no time") from None


def _iso(moment: date, of_a_date: timedelta) -> str:
    try:
        if not isinstance(moment, datetime):
            moment = datetime.combine(moment, time()) + of_a_date
        return iso(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except OverflowError:
        if moment.year == _FAR_YEARS:
            return NEVER
        raise ValueError("no time") from None
