"""What a client is told of limits: a denial in words with the true time to come back at, and what is left."""

import math
from collections.abc import Sequence

from gateway.limits import MICRO
from gateway.quota import Ask, Denial, Standing
from gateway.replies import Refusal

# A window that opens within this time is waited for: a client that comes back after Retry-After, whole seconds as they
# are, must not come too early.
GRACE_S = 0.25
# What is told to come back after when no time would help: somebody may have changed the limit.
NEVER_S = 3600.0
# Clients shall not wait longer than this by themselves: their user wants to know.
PATIENCE_S = 60.0

_KINDS = {"rpm": "rate", "rps": "rate", "tpm": "rate", "concurrency": "limit", "budget": "budget"}
_UNITS = {
    "rpm": "requests per minute",
    "rps": "requests in a burst",
    "tpm": "tokens per minute",
    "concurrency": "requests at the same time",
}


def refusal(denial: Denial, ask: Ask, currency: str, headers: dict[str, str]) -> Refusal:
    """A denial in words, with the true time to come back at."""
    standing, wait_s = denial.standing, denial.wait_s
    told_s = NEVER_S if wait_s is None else wait_s
    if standing.limit in ("rpm", "tpm"):
        told_s -= GRACE_S  # which is waited for
    told_ms = math.ceil((NEVER_S if wait_s is None else wait_s) * 1000)
    told = {"retry-after": str(max(math.ceil(told_s), 1)), "retry-after-ms": str(told_ms)}
    if wait_s is None or wait_s > PATIENCE_S:
        told["x-should-retry"] = "false"
    code = "insufficient_quota" if standing.limit == "budget" else "rate_limit_exceeded"
    return Refusal(429, code, _message(denial, ask, currency), headers={**headers, **told})


def _message(denial: Denial, ask: Ask, currency: str) -> str:
    standing, wait_s = denial.standing, denial.wait_s
    allowed = amount_of(standing, standing.allowed, currency)
    text = f"The {_KINDS[standing.limit]} of {whose_is(standing.scope)} is {allowed}"
    if standing.limit == "budget" and standing.per != "total":
        text += f" per {standing.per}"
    held = {"tpm": ask.tokens, "tokens": ask.tokens, "money": ask.micros}.get(standing.unit or standing.limit)
    left = standing.allowed - standing.used - standing.held
    if ask.is_bound and held and left > 0:
        needs, left_over = amount_of(standing, held, currency), amount_of(standing, left, currency)
        text += f": this request may use up to {needs}, and {left_over} are left."
    else:
        text += ", and is used up." if standing.allowed else "."
    return text + (" Waiting won't help this request." if wait_s is None else f" Try again in {duration(wait_s)}.")


def amount_of(standing: Standing, amount: float, currency: str) -> str:
    """An amount of what a limit counts, in words."""
    if standing.unit == "money":
        return f"{amount / MICRO:,.6f}".rstrip("0").rstrip(".") + f" {currency}"
    unit = "tokens" if standing.unit == "tokens" else _UNITS[standing.limit]
    return f"{amount:,.0f} {unit}"


def whose_is(scope: str) -> str:
    """A scope in words for those whom it limits. Keys are not named: the one who asks knows its own."""
    kind, _, name = scope.partition(":")
    return {"key": "this API key", "team": f"the team {name!r}", "model": f"the model {name!r}"}.get(kind, "all users")


def headers_of(standings: Sequence[Standing]) -> dict[str, str]:
    """As OpenAI names them, of the limits that have the least left.

    https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers
    """
    told = {}
    for limit, name in (("rpm", "requests"), ("tpm", "tokens")):
        found = [each for each in standings if each.limit == limit]
        if found:
            tightest = min(found, key=_left)
            told[f"x-ratelimit-limit-{name}"] = f"{tightest.allowed:.0f}"
            told[f"x-ratelimit-remaining-{name}"] = f"{max(_left(tightest), 0):.0f}"
            told[f"x-ratelimit-reset-{name}"] = duration(tightest.reset_s or 0)
    return told


def _left(standing: Standing) -> float:
    return standing.allowed - standing.used - standing.held


def duration(seconds: float) -> str:
    """As in 120ms, 6.5s, 1m0s, 3h20m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 10) / 10:g}s" if seconds <= 59.9 else "1m0s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
