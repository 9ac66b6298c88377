"""An upstream server: where it is, what is known of it now, and the claims of those that it works for.

A claim counts a request as running on its server until it is released, once, however the request ends.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from gateway.health import Health
from gateway.settings import Health as HealthConfig
from gateway.settings import Server as ServerConfig

# A new value's part in a moving average: the last ten or so count.
SHARE = 0.2
# Until anything was measured: a short answer, and a GPU that reads 1,000 tokens of four bytes in a second.
FIRST_SERVICE_S = 1.0
FIRST_READ_S_PER_BYTE = 0.00025


def average(known: float | None, value: float) -> float:
    return value if known is None else known + SHARE * (value - known)


@dataclass(eq=False)
class Server:
    """An upstream server and what is known of it now. `slots` None or 0: it takes whatever comes."""

    config: ServerConfig
    health: Health = field(default_factory=lambda: Health(HealthConfig()))
    models: tuple[str, ...] = ()
    type: str | None = None
    slots: int | None = None
    running: int = 0
    waiting: int = 0  # requests that wait for a slot of this server rather than another
    measured_service_s: float | None = None  # how long a request holds its slot
    measured_read_s_per_byte: float | None = None  # how long it reads a byte of a prompt that is not in its cache
    host: str = field(init=False)
    port: int = field(init=False)
    scheme: str = field(init=False)
    path_prefix: str = field(init=False)

    def __post_init__(self) -> None:
        url = urlsplit(self.config.url)
        self.scheme = url.scheme
        self.host = url.hostname or ""
        self.port = url.port or (443 if url.scheme == "https" else 80)
        self.path_prefix = url.path.rstrip("/")
        self.models = self.config.models or ()
        self.type = self.config.type
        self.slots = self.config.slots

    def reconfigure(self, config: ServerConfig) -> None:
        """Other settings for the same server. What was learned of it stays where the config leaves it open."""
        before, self.config = self.config, config
        self.models = config.models or (self.models if config.models is None else ())
        if config.type != before.type:
            self.type = config.type
        if config.slots != before.slots:
            self.slots = config.slots

    def is_at(self, url: str) -> bool:
        return self.config.url.rstrip("/") == url.rstrip("/")

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def authority(self) -> str:
        """The Host header that this server shall see."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return host if self.port == default else f"{host}:{self.port}"

    @property
    def is_full(self) -> bool:
        return bool(self.slots) and self.running >= (self.slots or 0)

    @property
    def service_s(self) -> float:
        return FIRST_SERVICE_S if self.measured_service_s is None else self.measured_service_s

    @property
    def read_s_per_byte(self) -> float:
        return FIRST_READ_S_PER_BYTE if self.measured_read_s_per_byte is None else self.measured_read_s_per_byte


class Claim:
    """A server that was picked. Release it once the request has ended; a second release does nothing.

    `released` is called once, when its slot is free again.
    """

    def __init__(self, server: Server, now: float, released: Callable[[], None] = lambda: None) -> None:
        self.server = server
        self._released = released
        self._held = True
        self._trial = server.health.begin_trial(now)
        server.running += 1

    def release(self) -> None:
        if not self._held:
            return
        self._held = False
        self.server.running -= 1
        if self._trial is not None:
            self.server.health.end_trial(self._trial)
        self._released()
