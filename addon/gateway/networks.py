"""Where a request comes from. Only a trusted proxy's word counts, and what is no address is in no network."""

import functools
import ipaddress
import re
from collections.abc import Sequence

type Address = ipaddress.IPv4Address | ipaddress.IPv6Address
type Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# An entry of X-Forwarded-For with a port, as some proxies write it.
_WITH_PORT = re.compile(r"(?:\[([^\[\]]*)\]|([0-9.]+))(?::[0-9]{1,5})?")
# ::ffff:0:0/96, an IPv4 address as a socket for both kinds sees it.
_MAPPED_BITS = 96


def client_address(peer: str, forwarded_for: Sequence[str], trusted: tuple[str, ...]) -> str:
    """Of those through whom a request came, the nearest that is not ours.

    `peer`: the other end of the connection. `forwarded_for`: the values of X-Forwarded-For. `trusted`: networks whose
    word counts. What stands there and is no address is returned as it is.
    """
    if not trusted or not is_in(peer, trusted):
        return _text(peer)
    hops = [hop.strip() for value in forwarded_for for hop in value.split(",")]
    for hop in reversed(hops):
        if not is_in(hop, trusted):
            return _text(hop)
    return _text(hops[0] if hops else peer)


def is_in(address: str, networks: tuple[str, ...]) -> bool:
    """Whether one of the networks holds the address. What is no address is in none."""
    found = parse(address)
    return found is not None and any(found in network for network in _parsed(networks))


@functools.lru_cache(maxsize=4096)  # the same clients come again and again
def parse(text: str) -> Address | None:
    """An address, also with a zone (fe80::1%eth0), a port ([::1]:80, 10.0.0.1:80), or IPv4 within IPv6."""
    match = _WITH_PORT.fullmatch(text)
    host = (match[1] or match[2] or "") if match else text
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return (address.version == 6 and address.ipv4_mapped) or address


def network(text: str) -> Network:
    """10.0.0.0/8, or an address alone. Raises ValueError."""
    found = ipaddress.ip_network(text)
    if found.version == 6 and found.network_address.ipv4_mapped and found.prefixlen >= _MAPPED_BITS:
        mapped = found.network_address.ipv4_mapped
        return ipaddress.ip_network(f"{mapped}/{found.prefixlen - _MAPPED_BITS}")
    return found


@functools.lru_cache(maxsize=1024)
def _parsed(networks: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(map(network, networks))


def _text(address: str) -> str:
    found = parse(address)
    return address if found is None else str(found)
