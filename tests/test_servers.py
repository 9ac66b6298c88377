"""What is known of a server, and claims: counted once, given back once."""

import pytest

from gateway.health import Health
from gateway.servers import SHARE, Claim, Server, average
from gateway.settings import Health as HealthConfig
from gateway.settings import Server as ServerConfig


def server(url: str = "http://h:1", slots: int | None = None) -> Server:
    return Server(ServerConfig("a", url, slots=slots), Health(HealthConfig(eject_after=1, eject_s=2)))


ADDRESSES = {
    "plain": ("http://gpu-1:9000", ("http", "gpu-1", 9000, "", "gpu-1:9000")),
    "default port": ("http://gpu-1", ("http", "gpu-1", 80, "", "gpu-1")),
    "default port, said": ("http://gpu-1:80", ("http", "gpu-1", 80, "", "gpu-1")),
    "https": ("https://gpu-1/", ("https", "gpu-1", 443, "", "gpu-1")),
    "https on http's port": ("https://gpu-1:80", ("https", "gpu-1", 80, "", "gpu-1:80")),
    "IPv6": ("http://[::1]:9000", ("http", "::1", 9000, "", "[::1]:9000")),
    "a path": ("https://proxy/llama/a/", ("https", "proxy", 443, "/llama/a", "proxy")),
}


@pytest.mark.parametrize(("url", "parts"), ADDRESSES.values(), ids=ADDRESSES)
def test_address(url: str, parts: tuple[str, str, int, str, str]) -> None:
    upstream = server(url)
    assert (upstream.scheme, upstream.host, upstream.port, upstream.path_prefix, upstream.authority) == parts


@pytest.mark.parametrize(
    ("slots", "running", "is_full"),
    [(None, 1000, False), (0, 1000, False), (1, 0, False), (1, 1, True), (2, 1, False), (2, 2, True), (1, 2, True)],
)
def test_full(slots: int | None, running: int, is_full: bool) -> None:
    """With fewer slots than before it may have more running than it has slots."""
    upstream = server(slots=slots)
    upstream.running = running
    assert upstream.is_full is is_full


def test_averages() -> None:
    assert average(None, 4) == 4
    assert average(4, 9) == 4 + SHARE * 5
    upstream = server()
    assert upstream.service_s > 0
    assert upstream.read_s_per_byte > 0
    upstream.measured_service_s = upstream.measured_read_s_per_byte = 0.0  # 0 is measured
    assert (upstream.service_s, upstream.read_s_per_byte) == (0, 0)


def test_a_claim_counts_until_its_release() -> None:
    upstream, running_then = server(), []
    claims = [Claim(upstream, 0, lambda: running_then.append(upstream.running)) for _ in range(3)]
    assert upstream.running == 3
    claims[1].release()
    claims[1].release()
    assert upstream.running == 2
    claims[0].release()
    claims[2].release()
    assert running_then == [2, 1, 0]  # free before it is told, and told once


def test_a_claim_within_a_release() -> None:
    """Who waits claims the slot while it is given back."""
    upstream = server(slots=1)
    nexts: list[Claim] = []
    first = Claim(upstream, 0, lambda: nexts.append(Claim(upstream, 0)))
    first.release()
    first.release()
    assert (len(nexts), upstream.running) == (1, 1)


def test_a_claim_of_an_ejected_server_is_its_trial() -> None:
    upstream = server()
    upstream.health.failed(10, "was reset")
    trial = Claim(upstream, 12)
    assert not upstream.health.may_take(12)
    trial.release()
    assert upstream.health.may_take(12)


def test_other_claims_are_none() -> None:
    """Those from before, and that of a last resort while the server is to be left alone."""
    upstream = server()
    before = Claim(upstream, 0)
    upstream.health.failed(10, "was reset")
    last_resort = Claim(upstream, 11)
    trial = Claim(upstream, 12)
    before.release()
    last_resort.release()
    assert not upstream.health.may_take(12)
    trial.release()
    assert upstream.health.may_take(12)
