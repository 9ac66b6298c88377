"""Models and aliases: what a request asks for -> the model as its servers name it, and which servers have it."""

from collections.abc import Iterable, Iterator, Sequence

from gateway.health import Health
from gateway.patterns import Pattern
from gateway.replies import Refusal
from gateway.servers import Server
from gateway.settings import Config


class Router:
    """Servers, models and aliases of the config."""

    def __init__(self, config: Config) -> None:
        self.servers: Sequence[Server] = ()
        self._leaving: Sequence[Server] = ()
        self._served: dict[str, list[Server]] = {}
        self.reconfigure(config, self.successors(config))

    def successors(self, config: Config) -> list[Server]:
        """The servers of another config, in its order: new ones, and those that it keeps, by name and url. What is
        known of them, and what runs on them, stays.
        """
        old = {server.name: server for server in self.servers}
        return [
            kept if (kept := old.get(record.name)) and kept.is_at(record.url) else Server(record, Health(config.health))
            for record in config.servers
        ]

    def reconfigure(self, config: Config, successors: Sequence[Server]) -> None:
        """Go over to another config. Servers that are gone get no new requests; what runs on them ends there."""
        self._leaving = [server for server in self.known() if server.running and server not in successors]
        self.servers = successors
        for server, record in zip(successors, config.servers, strict=True):
            server.reconfigure(record)
            server.health.reconfigure(config.health)
        self._default_model = config.default_model
        self._exact_aliases = {alias: model for alias, model in config.aliases.items() if Pattern(alias).is_exact}
        self._patterns = [
            (Pattern(alias), model) for alias, model in config.aliases.items() if not Pattern(alias).is_exact
        ]
        self.learn()

    def known(self) -> Iterator[Server]:
        """The servers, and those that the config no longer has, for as long as something runs on them."""
        yield from self.servers
        yield from (server for server in self._leaving if server.running)

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
        reachable = {
            model for model, servers in self.models().items() if any(s.health.state != "down" for s in servers)
        }
        names = {**{model: model for model in self.models()}, **self._exact_aliases}
        return ((name, model) for name, model in names.items() if model in reachable)

    def servers_of(self, model: str | None) -> Sequence[Server]:
        """The servers that have a model, in the order of the config. None: any will do."""
        return self.servers if model is None else self._served.get(model, [])
