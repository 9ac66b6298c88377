"""Where a request comes from: whose word counts, and what is no address is in no network."""

import pytest

from gateway.networks import client_address, is_in, network

TRUSTED = ("10.0.0.0/8", "fd00::/8")
CAME: dict[str, tuple[str, list[str], tuple[str, ...], str]] = {
    "directly": ("192.0.2.1", [], TRUSTED, "192.0.2.1"),
    "nobody is trusted": ("10.0.0.1", ["192.0.2.1"], (), "10.0.0.1"),
    "a liar": ("192.0.2.1", ["127.0.0.1"], TRUSTED, "192.0.2.1"),
    "through one of ours": ("10.0.0.1", ["192.0.2.1"], TRUSTED, "192.0.2.1"),
    "through two of ours": ("10.0.0.1", ["192.0.2.1, 10.0.0.2"], TRUSTED, "192.0.2.1"),
    "a liar through ours": ("10.0.0.1", ["127.0.0.1, 192.0.2.1"], TRUSTED, "192.0.2.1"),
    "several headers, in their order": (
        "10.0.0.1",
        ["127.0.0.1", "192.0.2.1, 10.0.0.2", "10.0.0.3"],
        TRUSTED,
        "192.0.2.1",
    ),
    "from one of ours": ("10.0.0.1", ["10.0.0.9, 10.0.0.2"], TRUSTED, "10.0.0.9"),
    "without the header": ("10.0.0.1", [], TRUSTED, "10.0.0.1"),
    "IPv4 within IPv6": ("::ffff:10.0.0.1", ["::ffff:192.0.2.1"], TRUSTED, "192.0.2.1"),
    "IPv6": ("fd00::1", ["2001:db8:0::1"], TRUSTED, "2001:db8::1"),
    "with ports": ("10.0.0.1", ["[2001:db8::1]:443, 10.0.0.2:80"], TRUSTED, "2001:db8::1"),
    "IPv4 with a port": ("10.0.0.1", ["192.0.2.1:4711"], TRUSTED, "192.0.2.1"),
    "a zone": ("fe80::1%eth0", [], TRUSTED, "fe80::1"),
    "a name": ("10.0.0.1", ["192.0.2.1, unknown"], TRUSTED, "unknown"),
    "nothing": ("10.0.0.1", [""], TRUSTED, ""),
    "no address at all": ("", ["192.0.2.1"], TRUSTED, ""),
}


@pytest.mark.parametrize(("peer", "forwarded_for", "trusted", "expected"), CAME.values(), ids=CAME)
def test_the_nearest_that_is_not_ours(
    peer: str, forwarded_for: list[str], trusted: tuple[str, ...], expected: str
) -> None:
    assert client_address(peer, forwarded_for, trusted) == expected


INSIDE: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "an address": ("192.0.2.1", ("192.0.2.1",), True),
    "another one": ("192.0.2.2", ("192.0.2.1",), False),
    "a network": ("192.0.2.255", ("192.0.2.0/24",), True),
    "just outside": ("192.0.3.0", ("192.0.2.0/24",), False),
    "the second network": ("10.1.2.3", ("192.0.2.0/24", "10.0.0.0/8"), True),
    "IPv6": ("2001:db8::5", ("2001:db8::/32",), True),
    "IPv4 within IPv6": ("::ffff:192.0.2.1", ("192.0.2.0/24",), True),
    "a network written so": ("192.0.2.1", ("::ffff:192.0.2.0/120",), True),
    "IPv4 is not in all of IPv6": ("192.0.2.1", ("::/0",), False),
    "a zone": ("fe80::1%eth0", ("fe80::/10",), True),
    "no network": ("192.0.2.1", (), False),
    "no address": ("unknown", ("0.0.0.0/0", "::/0"), False),
    "nothing": ("", ("0.0.0.0/0", "::/0"), False),
    "leading zeros": ("192.0.2.01", ("192.0.2.0/24",), False),
    "half a port": ("192.0.2.1:", ("192.0.2.0/24",), False),
    "several": ("192.0.2.1, 192.0.2.1", ("0.0.0.0/0",), False),
}


@pytest.mark.parametrize(("address", "networks", "expected"), INSIDE.values(), ids=INSIDE)
def test_is_in(address: str, networks: tuple[str, ...], expected: bool) -> None:
    assert is_in(address, networks) is expected


@pytest.mark.parametrize("text", ["", "10.0.0.1/8", "10.0.0.0/33", "host", "10.0.0.0/8 "])
def test_no_network(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        network(text)
