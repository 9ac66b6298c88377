"""An answer's head -> the relay that its body goes through."""

import logging
import time
from collections.abc import Mapping

from gateway.exchange import Exchange
from gateway.relay import BodyMeter, Meter, Relay, StreamMeter
from gateway.tally import Tally
from gateway.usage import ends_with_mark, format_of

log = logging.getLogger(__name__)


def relay_for(exchange: Exchange, head: Mapping[str, str]) -> Relay:
    """`head`: the answer's headers. What is compressed, though we asked for none of it, can only be passed on."""
    read = format_of(exchange.meaning)
    tally = Tally(exchange.asked.prompts, exchange.asked.answers)
    is_stream = "event-stream" in head.get("content-type", "")
    meter: Meter | None = StreamMeter(read, tally, strip=exchange.usage_asked) if is_stream else BodyMeter(read, tally)
    if head.get("content-encoding", "identity").lower() != "identity":
        log.warning("an answer of %s is compressed though we asked for none: it goes on unmetered", exchange.endpoint)
        meter = None
    length = head.get("content-length", "")
    changes_length = exchange.usage_asked and is_stream
    return Relay(
        meter,
        tally,
        time.monotonic,
        content_length=int(length) if length.isdigit() and not changes_length else None,
        is_stream=is_stream,
        has_mark=is_stream and ends_with_mark(exchange.meaning),
        changes_length=changes_length,
    )
