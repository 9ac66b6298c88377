"""What a request counts for limits and budgets, by its final row.

The row holds what the server said. Where a server that answered said nothing, the counters take an estimate: answers
that tell no usage, and clients that hang up before it comes, would be free otherwise. The row stays as it is. What the
server itself broke off costs no more than is known.
"""

import math

from gateway import bounds
from gateway.exchange import Exchange
from gateway.limits import MAX_AMOUNT
from gateway.prices import Use
from gateway.records import Row
from gateway.usage import FORMATS, is_use

# An event of a stream holds about one token, and so much around it.
BYTES_PER_EVENT = 200


def told(row: Row) -> Use:
    """What is known of it."""
    times = [each for each in (row.prompt_ms, row.predicted_ms) if each is not None]
    return Use(row.prompt_tokens, row.cached_tokens, row.completion_tokens, sum(times) if times else None)


def charged(exchange: Exchange, row: Row) -> Use:
    """What it counts."""
    use = told(row)
    if not is_use(exchange.meaning):
        return Use()
    was_served = exchange.has_begun and row.outcome in ("ok", "client_closed")
    if not was_served or exchange.asked.kind != "json" or exchange.meaning not in FORMATS:
        return use
    prompt = bounds.estimate(exchange.body) if use.prompt is None else use.prompt
    completion = _estimated_answer(exchange, row) if use.completion is None else use.completion
    if _tells_one_choice_only(exchange, row):
        prompt, completion = prompt * exchange.asked.prompts, completion * exchange.asked.answers
    return Use(_sane(prompt), use.cached, _sane(completion), use.gpu_ms)


def tokens_of(use: Use) -> int | None:
    """None: nothing is known."""
    known = [count for count in (use.prompt, use.completion) if count is not None]
    return _sane(sum(known)) if known else None


def _estimated_answer(exchange: Exchange, row: Row) -> int:
    if exchange.meaning not in bounds.FIELDS:
        return 0
    return math.ceil(row.response_bytes / (BYTES_PER_EVENT if row.stream else bounds.BYTES_PER_TOKEN))


def _tells_one_choice_only(exchange: Exchange, row: Row) -> bool:
    """llama-server's usage of a whole answer with several choices is the first one's."""
    is_llama = exchange.server is not None and exchange.server.type == "llama.cpp"
    return is_llama and not row.stream and row.tokens_source is not None and exchange.asked.answers > 1


def _sane(count: int) -> int:
    """A server may say anything; counters are bounded."""
    return min(max(count, 0), MAX_AMOUNT)
