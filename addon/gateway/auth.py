"""Who is asking, and may they?

Authentication starts from *no*: a caller exists only where a key was found and is good.
"""

import functools
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from gateway import networks
from gateway.keys import PRIORITIES, Key, KeysUnavailable, Team, hash_key
from gateway.limits import Limits
from gateway.patterns import Pattern
from gateway.replies import Refusal
from gateway.secret import Secret
from gateway.settings import Config
from gateway.sources import kinds
from gateway.sources.chain import Chain, Grant
from gateway.sources.combined import Conflict, narrowest, team_of
from gateway.sources.source import Asked, Refused, SourceFailed

log = logging.getLogger(__name__)

# Headers that carry a key, in order. All of them are taken from every request: a user's key never reaches a server.
KEY_HEADERS = ("authorization", "x-api-key", "api-key")

# No key is longer, and no source is asked for such a one.
MAX_KEY_BYTES = 1000
# Names of teams that are not known: each is told of once, and so many of them.
MAX_STRANGE_TEAMS = 100

_STATES = {"disabled": "is disabled", "expired": "is expired", "not_yet_valid": "is not valid yet"}


class Caller(msgspec.Struct, frozen=True):
    """Whose request it is, what it may use (of models, endpoints: none named means all), and its place among those
    that wait.

    `key_id` None: its key is not in keys.db, but `source` knows it. `weight`: its share relative to other callers of
    its class. `priority`: the class, 0 goes first. `limits`: its own; `team_limits`: what it shares with its team.
    `also`: the same caller as other sources know it, where all of them must say yes.
    """

    key_id: int | None
    key_name: str
    models: tuple[Pattern, ...]
    weight: float = 1
    priority: int = PRIORITIES["normal"]
    source: str = "local"
    endpoints: tuple[Pattern, ...] = ()
    limits: Limits = Limits()
    team: str | None = None
    team_limits: Limits = Limits()
    also: tuple["Caller", ...] = ()

    @property
    def scope(self) -> str:
        """Names what is counted for it: the same for each of its requests, and for no one else's."""
        return f"key:{self.key_id}" if self.key_id is not None else f"key:{self.source}/{self.key_name}"

    @property
    def may_use_all(self) -> bool:
        """Of models: it need not name one."""
        return not self.models and all(other.may_use_all for other in self.also)

    def may_use(self, *names: str) -> bool:
        """`names`: those of one model, as asked and as served. One of them must be allowed."""
        allowed = not self.models or any(pattern.matches(name) for pattern in self.models for name in names)
        return allowed and all(other.may_use(*names) for other in self.also)

    def may_call(self, endpoint: str) -> bool:
        """`endpoint`: the path without its query, as `endpoints.canonical` gives it."""
        allowed = not self.endpoints or any(pattern.matches(endpoint) for pattern in self.endpoints)
        return allowed and all(other.may_call(endpoint) for other in self.also)


class Keys(Protocol):
    """keys.db. Both raise KeysUnavailable."""

    def find(self, key: str) -> Key | None: ...

    def team(self, name: str) -> Team | None: ...


class Authenticator:
    """Keys -> callers. `utc_now` returns the time as UTC ISO 8601. Raises ConfigError when a source can't be set up."""

    def __init__(self, config: Config, keys: Keys, utc_now: Callable[[], str]) -> None:
        self._keys = keys
        self._utc_now = utc_now
        self._config = config
        self._strange_teams: set[str] = set()
        self._chain = self.prepare(config, Chain((), config.auth.mode))
        self._chain.start()

    def close(self) -> None:
        self._chain.close()

    def prepare(self, config: Config, before: Chain | None = None) -> Chain:
        """The sources of a config that may be applied, checked; may block. Those that did not change are kept, with
        what they remember. Raises ConfigError, and then nothing has changed.
        """
        return kinds.build(config.auth, self._keys, before or self._chain)

    def apply(self, config: Config, chain: Chain) -> None:
        """From here on, another config holds. `chain`: what `prepare` made of it."""
        before, self._chain, self._config = self._chain, chain, config
        self._strange_teams.clear()
        chain.start()
        before.close(but=chain)

    def reconfigure(self, config: Config) -> None:
        """Both at once. Raises ConfigError."""
        self.apply(config, self.prepare(config))

    async def authenticate(self, key_headers: dict[str, list[str]], client_address: str) -> Caller:
        """`key_headers`: the values of each of KEY_HEADERS in a request. Raises Refusal: 401, 403 or 503."""
        key = _key_of(key_headers)
        if key is None:
            raise Refusal(
                401,
                "invalid_api_key",
                "No API key was given. Send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'.",
                headers={"www-authenticate": "Bearer"},
            )
        try:
            found = await self._find(key, client_address)
            if isinstance(found, Refused):
                raise Refusal(403, found.code, f"The API key is refused{found.why and ': '}{found.why}.")
            if not found:
                raise Refusal(
                    401, "invalid_api_key", "This API key is not known here.", headers={"www-authenticate": "Bearer"}
                )
            for grant in found:
                self._check(grant.key, client_address)
            team = team_of(found)
            return _caller(found, self._config.limits.key, team, self._limits_of(team))
        except (SourceFailed, KeysUnavailable, Conflict) as error:
            raise Refusal(503, "keys_unavailable", "Keys can't be checked at the moment.") from error

    async def _find(self, key: str, client_address: str) -> tuple[Grant, ...] | Refused:
        if len(key.encode("utf-8", "surrogateescape")) > MAX_KEY_BYTES:
            return ()
        return await self._chain.find(Asked(Secret(key), hash_key(key), client_address))

    def _check(self, key: Key, client_address: str) -> None:
        state = key.state(self._utc_now())
        if state != "active":
            raise Refusal(403, f"key_{state}", f"The API key {key.name!r} {_STATES[state]}.")
        if key.networks and not networks.is_in(client_address, key.networks):
            raise Refusal(403, "network_not_allowed", f"The API key {key.name!r} may not be used from here.")

    def _limits_of(self, team: str | None) -> Limits:
        """What config.yaml says of a team, else what keys.db says."""
        if team is None:
            return Limits()
        declared = self._config.teams.get(team)
        if declared is not None:
            return declared
        made = self._keys.team(team)
        if made is None:
            self._tell_of(team)
            return Limits()
        return made.limits

    def _tell_of(self, team: str) -> None:
        """A key of a team that nobody has made, or whose name is mistyped: only its own limits hold."""
        if team not in self._strange_teams and len(self._strange_teams) < MAX_STRANGE_TEAMS:
            self._strange_teams.add(team)
            log.warning("keys name a team %r that neither the config nor keys.db knows: it has no limits", team)


@functools.lru_cache(maxsize=1024)
def _caller(grants: tuple[Grant, ...], default: Limits, team: str | None, team_limits: Limits) -> Caller:
    """The first is whose request it is; the others can only narrow what it may."""
    first, *others = grants
    return Caller(
        key_id=first.key.id or None,
        key_name=first.key.name,
        models=tuple(map(Pattern, first.key.models)),
        weight=first.key.weight,
        priority=PRIORITIES[first.key.priority],
        source=first.source,
        endpoints=tuple(map(Pattern, first.key.endpoints)),
        limits=narrowest(grants).over(default),
        team=team,
        team_limits=team_limits,
        also=tuple(_caller((other,), Limits(), None, Limits()) for other in others),
    )


def _key_of(key_headers: dict[str, list[str]]) -> str | None:
    """The first header that holds a key decides. Given twice, it is ambiguous, and what is ambiguous is no key."""
    for name in KEY_HEADERS:
        values = key_headers.get(name, [])
        if len(values) > 1:
            return None
        if values:
            value = values[0].strip()
            if name == "authorization":
                scheme, _, value = value.partition(" ")
                if scheme.lower() != "bearer":
                    continue
            if value.strip():
                return value.strip()
    return None
