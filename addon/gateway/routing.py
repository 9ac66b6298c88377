"""Models and aliases: what a request asks for -> the model as its servers name it, and which servers have it."""

from collections.abc import Iterable, Sequence

from gateway.config import Config
from gateway.health import Health
from gateway.patterns import Pattern
from gateway.replies import Refusal
from gateway.servers import Server


class Router:
    """Servers, models and aliases of one config."""

    def __init__(self, config: Config) -> None:
        self.servers = [Server(server, Health(config.health)) for server in config.servers]
        self._default_model = config.default_model
        self._exact_aliases = {alias: model for alias, model in config.aliases.items() if Pattern(alias).is_exact}
        self._patterns = [
            (Pattern(alias), model) for alias, model in config.aliases.items() if not Pattern(alias).is_exact
        ]
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
        reachable = {
            model for model, servers in self.models().items() if any(s.health.state != "down" for s in servers)
        }
        names = {**{model: model for model in self.models()}, **self._exact_aliases}
        return ((name, model) for name, model in names.items() if model in reachable)

    def servers_of(self, model: str | None) -> Sequence[Server]:
        """The servers that have a model, in the order of the config. None: any will do."""
        return self.servers if model is None else self._served.get(model, [])
