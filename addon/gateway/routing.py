"""Which server gets a request: models, aliases, and a pick that claims its server in the same step.

A claim counts the request as running on its server until it is released, once, however the request ends.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from gateway.config import Config
from gateway.config import Server as ServerConfig
from gateway.patterns import Pattern
from gateway.replies import Refusal


@dataclass(eq=False)
class Server:
    """An upstream server and what is known of it now. `up` None: not tried yet."""

    config: ServerConfig
    models: tuple[str, ...] = ()
    type: str | None = None
    up: bool | None = None
    running: int = 0
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

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def authority(self) -> str:
        """The Host header that this server shall see."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return host if self.port == default else f"{host}:{self.port}"


class Claim:
    """A server that was picked. Release it once the request has ended; a second release does nothing."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._held = True
        server.running += 1

    def release(self) -> None:
        if self._held:
            self._held = False
            self.server.running -= 1


# A strategy picks one of the servers that could take the request (at least one, in the order of the config).
Strategy = Callable[[Sequence[Server]], Server]


def least_busy(candidates: Sequence[Server]) -> Server:
    """The server with the fewest running requests for its weight; the first in the config among equals."""
    return min(candidates, key=lambda server: (server.running + 1) / server.config.weight)


class Router:
    """Servers, models and aliases of one config."""

    def __init__(self, config: Config, strategy: Strategy = least_busy) -> None:
        self.servers = [Server(server) for server in config.servers]
        self._default_model = config.default_model
        self._exact_aliases = {alias: model for alias, model in config.aliases.items() if Pattern(alias).is_exact}
        self._patterns = [
            (Pattern(alias), model) for alias, model in config.aliases.items() if not Pattern(alias).is_exact
        ]
        self._strategy = strategy
        self._served: dict[str, list[Server]] = {}
        self.learn()

    def learn(self) -> None:
        """To be called when a server's models have changed."""
        self._served = {}
        for server in self.servers:
            for model in server.models:
                self._served.setdefault(model, []).append(server)

    def resolve(self, asked: str | None) -> str | None:
        """The model as asked -> the model as its servers name it. None: there is nothing to choose from.

        Exact names win, aliases before models; then patterns, in the order of the config. Raises Refusal (404).
        """
        if asked is None:
            return self._resolve_missing()
        models = self.models()
        if asked in self._exact_aliases:
            return self._offered(asked, self._exact_aliases[asked])
        if asked in models:
            return asked
        for pattern, model in self._patterns:
            if pattern.matches(asked):
                return self._offered(asked, model)
        if not models:
            raise Refusal(
                503, "no_server_available", "No server has told its models yet.", headers={"retry-after": "5"}
            )
        raise Refusal(
            404, "model_not_found", f"There is no model {asked[:200]!r} here. GET /v1/models lists them.", param="model"
        )

    def _offered(self, asked: str, model: str) -> str:
        """An alias's model; refused when every server has told its models, and it is none of them."""
        if model not in self._served and all(server.models for server in self.servers):
            message = f"{asked[:200]!r} stands for {model!r}, which no server offers."
            raise Refusal(404, "model_not_found", message, param="model")
        return model

    def _resolve_missing(self) -> str | None:
        if self._default_model is not None:
            return self.resolve(self._default_model)
        models = self.models()
        if len(models) > 1:
            raise Refusal(
                404,
                "model_not_found",
                "The request names no model, and there are several to choose from.",
                param="model",
            )
        return next(iter(models), None)

    def models(self) -> dict[str, list[Server]]:
        """Each model and its servers, in the order of the config."""
        return self._served

    def visible(self) -> Iterable[tuple[str, str]]:
        """(name, model) of what clients may ask for: models of servers that are not known to be down, plain aliases."""
        reachable = {model for model, servers in self.models().items() if any(s.up is not False for s in servers)}
        names = {**{model: model for model in self.models()}, **self._exact_aliases}
        return ((name, model) for name, model in names.items() if model in reachable)

    def pick(self, model: str | None, tried: Sequence[Server] = ()) -> Claim:
        """Pick and claim a server for `model` (None: any), not one of `tried`. Raises Refusal (503) when none is left.

        Servers that last refused a connection come last: they may be back before we know.
        """
        servers = self.servers if model is None else self.models().get(model, [])
        left = [server for server in servers if server not in tried]
        candidates = [server for server in left if server.up is not False] or left
        if not candidates:
            raise Refusal(
                503, "no_server_available", "No server is available for this model.", headers={"retry-after": "5"}
            )
        return Claim(self._strategy(candidates))
