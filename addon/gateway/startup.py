"""Makes a gateway of a mitmproxy: its options, its mode, and which of its default addons stay."""

import asyncio
import logging
import resource
import signal
import sys
from collections.abc import Callable

from mitmproxy import ctx
from mitmproxy.proxy import mode_specs

from gateway import http1
from gateway.dispatch import Dispatch
from gateway.settings import Config

log = logging.getLogger(__name__)

# Where requests go that nobody gave a destination: a name that is reserved to never exist (RFC 6761).
NOWHERE = "reverse:http://no-route.invalid"

# Default addons that a gateway does not need, and the option that asks for each all the same. Dispatching every
# event to some forty addons is half of mitmproxy's cost per request. Only under mitmdump: mitmweb and mitmproxy
# show what they do.
UNNEEDED = {
    "anticache": "anticache",
    "anticomp": "anticomp",
    "block": "",
    "blocklist": "block_list",
    "browser": "",
    "commandhistory": "",
    "comment": "",
    "cut": "",
    "disableh2c": "",
    "dnsresolver": "",
    "dumper": "",
    "export": "",
    "maplocal": "map_local",
    "mapremote": "map_remote",
    "modifybody": "modify_body",
    "modifyheaders": "modify_headers",
    "onboarding": "",
    "proxyauth": "proxyauth",
    "readfilestdin": "",
    "save": "save_stream_file",
    "savehar": "hardump",
    "serverplayback": "server_replay",
    "stickyauth": "stickyauth",
    "stickycookie": "stickycookie",
    "strip_dns_https_records": "",
    "updatealtsvc": "",
    "upstreamauth": "upstream_auth",
}

# Above this, mitmdump's user wants flows printed, with more than a line each.
QUIET_FLOW_DETAIL = 1


def prepare() -> None:
    """Before anything else: errors in our dialect, and room for many connections."""
    http1.take_over()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if hard > soft else (soft, hard))
    # A line per connection says nothing that a row does not.
    logging.getLogger("mitmproxy.proxy.server").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # nor does one per probe
    if ctx.options.mode == ["regular"]:
        logging.getLogger("mitmproxy.addons.proxyserver").addFilter(_is_not_about_default_mode)


def _is_not_about_default_mode(record: logging.LogRecord) -> bool:
    """mitmproxy starts its default mode before it loads scripts, and would exit when that fails. It is replaced anyway,
    and that its port is taken (8080 is llama-server's, too) is nobody's concern. Stopping what never listened is logged
    as an error without a message.
    """
    message = record.getMessage()
    return bool(message) and "HTTP(S) proxy failed to listen" not in message


def set_options(config: Config) -> None:
    """Options that a gateway depends on, whatever the command line says."""
    # mitmproxy lets every logger make its records, and drops most of them later. Its console has no such option.
    if "termlog_verbosity" in ctx.options:
        logging.getLogger("gateway").setLevel(logging.getLevelName(ctx.options.termlog_verbosity.upper()))
    ctx.options.update(
        connection_strategy="lazy",  # connect when a request has a destination, not when a client connects
        keep_host_header=False,
        validate_inbound_headers=True,
        # servers[].verify_tls decides, for each server. This holds should upstream_tls itself fail.
        ssl_insecure=False,
        rawtcp=False,
        websocket=False,
        block_global=False,
        # Ours is max_body_mb, answered in the client's dialect; mitmproxy's would cut answers, too.
        body_size_limit=None,
        stream_large_bodies=None,
    )
    set_timeout(config)


def set_timeout(config: Config) -> None:
    """Silence on a client's connection while a server thinks. First bytes have a deadline of their own."""
    ctx.options.update(tcp_timeout=max(86400, int(config.first_byte_timeout_s) * 2))


def trim_addons() -> None:
    """Remove what is not needed, once the running addons are not being walked through."""
    if ctx.master.addons.get("view") is None:  # a view is a sequence, and empty at first
        asyncio.get_running_loop().call_soon(_trim)


def _trim() -> None:
    for name, option in UNNEEDED.items():
        addon = ctx.master.addons.get(name)
        wanted = (
            ctx.options.flow_detail > QUIET_FLOW_DETAIL if name == "dumper" else option and getattr(ctx.options, option)
        )
        if addon and not wanted:
            ctx.master.addons.remove(addon)
    Dispatch(ctx.master.addons).install()


def listen(config: Config) -> None:
    """Without a mode of the user's own, listen where the config says."""
    if ctx.options.mode == ["regular"]:
        asyncio.get_running_loop().create_task(_listen(f"{NOWHERE}@{config.listen}"))


async def _listen(mode: str) -> None:
    ctx.options.update(mode=[mode])
    servers = ctx.master.addons.get("proxyserver").servers
    if not await servers.update([mode_specs.ProxyMode.parse(mode)]):
        # The reason is logged. Without a listener there is nothing to stay for.
        asyncio.get_running_loop().call_soon(sys.exit, 1)


def on_hangup(reload: Callable[[], None]) -> None:
    """SIGHUP is for reading the config again, and would end the process by default."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def stop_listening() -> None:
    ctx.options.update(server=False)


def second_signal() -> asyncio.Event:
    """An event that is set by the next SIGTERM or SIGINT."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event
