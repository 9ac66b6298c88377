"""What stands in config.yaml, as frozen records with their defaults. They are right once `config` has checked them."""

from pathlib import Path

import msgspec

from gateway.limits import Limits
from gateway.prices import Price
from gateway.secret import Secret as Secret
from gateway.sources.settings import Local, Source

SERVER_TYPES = ("llama.cpp", "openai")
STRATEGIES = ("prefix", "least-busy", "round-robin", "latency")
RESERVES = ("off", "prompt", "max_tokens")
MODES = ("first_match", "all")


class Address(str):
    """ "HOST:PORT" or "[IPV6]:PORT", checked. Raises ValueError."""

    __slots__ = ()

    def __new__(cls, text: str) -> "Address":
        host, colon, port = text.strip().rpartition(":")
        if not colon or not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise ValueError(f"Expected HOST:PORT, got {text!r}")
        return super().__new__(cls, text.strip())

    @property
    def host(self) -> str:
        return self.rpartition(":")[0].removeprefix("[").removesuffix("]")

    @property
    def port(self) -> int:
        return int(self.rpartition(":")[2])


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An upstream server. `models` None: asked from the server itself. `type` None: told by the server's answers.

    `slots`: how many requests it works on at once; None: asked from the server; 0: without a bound.
    """

    name: str
    url: str
    api_key: Secret = Secret("")
    models: tuple[str, ...] | None = None
    weight: float = 1
    type: str | None = None
    slots: int | None = None
    verify_tls: bool = True
    ca_file: Path | None = None


class Prefix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The strategy `prefix`. `stickiness`: seconds of waiting that a saved second of prompt reading is worth."""

    stickiness: float = 1
    index_size: int = 400_000


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which server gets a request, and how often it is tried. `models`: model -> a strategy of its own."""

    strategy: str = "prefix"
    models: dict[str, str] = {}
    prefix: Prefix = Prefix()
    max_attempts: int = 5
    backoff_s: float = 0.05
    max_backoff_s: float = 2


class Queue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests that wait for a server's slot. `max_length`: of one model, in one worker."""

    max_length: int = 500
    max_wait_s: float = 300


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Probes of each server, and how long one is left alone whose requests fail."""

    path: str = "/health"
    interval_s: float = 2
    timeout_s: float = 3
    up_after: int = 1
    down_after: int = 3
    eject_after: int = 3
    eject_s: float = 2
    max_eject_s: float = 60


class Auth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where keys come from. `mode`: the first source that knows a key decides, or all of them must say yes."""

    mode: str = "first_match"
    sources: tuple[Source, ...] = (Local(),)


class LimitsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`storage`: "local" (all workers of this machine) or a redis:// URL (of several machines).

    `reserve`: what a request holds until its use is known: nothing ("off"), an estimate of its prompt ("prompt"), or
    the most that it can use ("max_tokens"; `default_max_tokens` is written into requests that name none).
    `all`: of everybody together. `key`: of each key, where it has none of its own. `models`: of each model, by name
    or pattern.
    """

    storage: Secret = Secret("local")
    reserve: str = "prompt"
    default_max_tokens: int = 4096
    all: Limits = Limits()
    key: Limits = Limits()
    models: dict[str, Limits] = {}


class PricesSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What models cost, by name or pattern. Budgets of money are in this currency."""

    currency: str = "EUR"
    models: dict[str, Price] = {}


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. Times in seconds, sizes in megabytes of 10^6 bytes."""

    servers: tuple[Server, ...]
    listen: Address = Address("127.0.0.1:8000")
    dashboard: Address = Address("127.0.0.1:8001")
    data: Path = Path("data")
    admin_key: Secret = Secret("")
    aliases: dict[str, str] = {}
    default_model: str | None = None
    max_body_mb: float = 100
    first_byte_timeout_s: float = 600
    loading_wait_s: float = 60
    drain_s: float = 30
    routing: Routing = Routing()
    queue: Queue = Queue()
    health: Health = Health()
    fallbacks: dict[str, tuple[str, ...]] = {}
    trusted_proxies: tuple[str, ...] = ()
    auth: Auth = Auth()
    limits: LimitsSection = LimitsSection()
    teams: dict[str, Limits] = {}
    prices: PricesSection = PricesSection()
