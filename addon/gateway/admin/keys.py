"""Keys of keys.db. A key itself is told once, when it is made or rotated; of all others only the hint."""

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from gateway.admin import cautions
from gateway.admin.desk import Desk, Done
from gateway.admin.limits import Amount, LimitChanges, changed, merged
from gateway.admin.routes import MAX_INT, Nothing, Route, Routes, bad
from gateway.keystore import Changes, Key, KeyStore
from gateway.limits import NONE, Limits
from gateway.records import utc_now

# The name of a key that nobody named; smol-llm-proxy's.
UNNAMED = "unnamed"
TEN_YEARS_S = 3650 * 86400


class KeyInfo(msgspec.Struct, frozen=True):
    """`active`: 0 when it is disabled. `state`: active, disabled, expired or not_yet_valid. `rpm_limit`, `tpm_limit`:
    those of `limits`. Null: no limit. `old_until`: when the key before a rotation ends. `warning`: what will not be as
    one may expect.
    """

    id: int
    name: str
    active: int
    rpm_limit: int | None
    tpm_limit: int | None
    created_at: str
    hint: str
    state: str
    disabled: bool
    expires_at: str | None
    not_before: str | None
    models: tuple[str, ...]
    endpoints: tuple[str, ...]
    networks: tuple[str, ...]
    weight: float
    priority: str
    team: str | None
    limits: Limits
    old_until: str | None
    warning: str | UnsetType = UNSET


class NewKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`expires_at`, `not_before`: a date, a time or a span as in 90d. `rpm_limit`, `tpm_limit`: those of `limits`."""

    name: str | UnsetType = UNSET
    models: tuple[str, ...] = ()
    endpoints: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    expires_at: str | None = None
    not_before: str | None = None
    weight: float = 1
    priority: str = "normal"
    team: str | None = None
    limits: Limits = NONE
    rpm_limit: Amount | UnsetType | None = UNSET
    tpm_limit: Amount | UnsetType | None = UNSET


class KeyChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is left out stays. `limits`: field by field, null takes one away. Null in the place of all of them takes all
    away. `team`, `expires_at`, `not_before` null: none.
    """

    name: str | UnsetType = UNSET
    disabled: bool | UnsetType = UNSET
    expires_at: str | UnsetType | None = UNSET
    not_before: str | UnsetType | None = UNSET
    models: tuple[str, ...] | UnsetType = UNSET
    endpoints: tuple[str, ...] | UnsetType = UNSET
    networks: tuple[str, ...] | UnsetType = UNSET
    weight: float | UnsetType = UNSET
    priority: str | UnsetType = UNSET
    team: str | UnsetType | None = UNSET
    limits: LimitChanges | UnsetType | None = UNSET


class KeyMade(msgspec.Struct, frozen=True):
    """`key`: the key itself. It is kept nowhere and never told again. `warning`: what will not be as one may expect."""

    id: int
    key: str
    name: str
    ok: bool = True
    warning: str | UnsetType = UNSET


class KeyToggled(msgspec.Struct, frozen=True):
    id: int
    name: str
    active: int
    created_at: str


class KeyLimits(msgspec.Struct, frozen=True):
    id: int
    name: str
    active: int
    rpm_limit: int | None
    tpm_limit: int | None
    limits: Limits
    warning: str | UnsetType = UNSET


class KeyRotated(msgspec.Struct, frozen=True):
    """`old_until`: until then the key before this one holds as well."""

    id: int
    key: str
    name: str
    old_until: str | None
    ok: bool = True


class KeyId(msgspec.Struct, frozen=True):
    key_id: Annotated[int, Meta(ge=1, le=MAX_INT)]


class Toggle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    active: bool | Annotated[int, Meta(ge=0, le=1)] = True


class Rotation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    overlap_s: Annotated[float, Meta(ge=0, le=TEN_YEARS_S)] = 0


async def list_keys(desk: Desk, params: Nothing, body: Nothing) -> list[KeyInfo]:
    keys = await desk.keys(lambda store: store.list())
    return [_info(key) for key in sorted(keys, key=lambda key: key.id, reverse=True)]


async def get_key(desk: Desk, params: KeyId, body: Nothing) -> KeyInfo:
    return _info(await desk.keys(lambda store: store.get(params.key_id)))


def _info(key: Key) -> KeyInfo:
    return KeyInfo(
        id=key.id,
        name=key.name,
        active=int(not key.disabled),
        rpm_limit=key.limits.rpm,
        tpm_limit=key.limits.tpm,
        created_at=key.created_at,
        hint=key.hint,
        state=key.state(utc_now()),
        disabled=key.disabled,
        expires_at=key.expires_at,
        not_before=key.not_before,
        models=key.models,
        endpoints=key.endpoints,
        networks=key.networks,
        weight=key.weight,
        priority=key.priority,
        team=key.team,
        limits=key.limits,
        old_until=key.old_until,
    )


async def create_key(desk: Desk, params: Nothing, body: NewKey) -> KeyMade:
    given = {name: value for name, value in msgspec.structs.asdict(body).items() if name not in _OF_ITS_OWN}
    limits = _limits_of(body)

    def make(store: KeyStore) -> tuple[Key, str]:
        name = _free_name(store) if body.name is UNSET else body.name
        return store.create(name, **given, limits=limits, actor=desk.actor)

    key, secret = await desk.keys(make)
    cautions_told = [*cautions.of_sources(desk.room.declared), *await _cautions(desk, key)]
    return KeyMade(key.id, secret, key.name, warning=cautions.told(cautions_told))


# What of a new key is not taken as it stands.
_OF_ITS_OWN = ("name", "limits", "rpm_limit", "tpm_limit")


def _limits_of(new: NewKey) -> Limits:
    """Under either name. Raises Refusal."""
    rpm, tpm = (UNSET if amount is None else amount for amount in (new.limits.rpm, new.limits.tpm))
    return merged(new.limits, LimitChanges(rpm_limit=new.rpm_limit, tpm_limit=new.tpm_limit, rpm=rpm, tpm=tpm))


async def _cautions(desk: Desk, key: Key) -> list[str]:
    config = desk.room.declared
    teams = {team.name for team in await desk.keys(lambda store: store.teams.list())} if key.team else set()
    return [*cautions.of_team(config, key.team, key.team in teams), *cautions.of_limits(config, key.limits)]


def _free_name(store: KeyStore) -> str:
    taken = {key.name for key in store.list()}
    names = [UNNAMED, *(f"{UNNAMED}-{number}" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


async def change_key(desk: Desk, params: KeyId, body: KeyChanges) -> KeyInfo:
    if all(value is UNSET for value in msgspec.structs.astuple(body)):
        raise bad("body", "No fields to update")
    given = {name: value for name, value in msgspec.structs.asdict(body).items() if name != "limits"}

    def change(key: Key) -> Changes:
        limits = UNSET if body.limits is UNSET else merged(key.limits, body.limits)
        return Changes(**given, limits=limits)

    key = await desk.keys(lambda store: store.change(params.key_id, change, actor=desk.actor))
    return msgspec.structs.replace(_info(key), warning=cautions.told(await _cautions(desk, key)))


async def delete_key(desk: Desk, params: KeyId, body: Nothing) -> Done:
    await desk.keys(lambda store: store.revoke(params.key_id, actor=desk.actor))
    return Done(ok=True)


async def toggle_key(desk: Desk, params: KeyId, body: Toggle) -> KeyToggled:
    key = await desk.keys(lambda store: store.set_disabled(params.key_id, not body.active, actor=desk.actor))
    return KeyToggled(key.id, key.name, int(not key.disabled), key.created_at)


async def limit_key(desk: Desk, params: KeyId, body: LimitChanges) -> KeyLimits:
    def limit(key: Key) -> Changes:
        return Changes(limits=changed(key.limits, body))

    key = await desk.keys(lambda store: store.change(params.key_id, limit, actor=desk.actor))
    warning = cautions.told(cautions.of_limits(desk.room.declared, key.limits))
    return KeyLimits(key.id, key.name, int(not key.disabled), key.limits.rpm, key.limits.tpm, key.limits, warning)


async def rotate_key(desk: Desk, params: KeyId, body: Rotation) -> KeyRotated:
    key, secret = await desk.keys(lambda store: store.rotate(params.key_id, body.overlap_s, actor=desk.actor))
    return KeyRotated(key.id, secret, key.name, key.old_until)


_ONE = "/admin/keys/{key_id}"
ROUTES: Routes = (
    Route("GET", "/admin/keys", "List keys, the newest first", list_keys, Nothing, Nothing, list[KeyInfo]),
    Route("POST", "/admin/keys", "Make a key", create_key, Nothing, NewKey, KeyMade, (409,)),
    Route("GET", _ONE, "Show a key", get_key, KeyId, Nothing, KeyInfo, (404,)),
    Route("PATCH", _ONE, "Change a key; its limits field by field", change_key, KeyId, KeyChanges, KeyInfo, (404, 409)),
    Route("DELETE", _ONE, "Revoke a key", delete_key, KeyId, Nothing, Done, (404,)),
    Route("PATCH", f"{_ONE}/toggle", "Enable or disable a key", toggle_key, KeyId, Toggle, KeyToggled, (404,)),
    Route(
        "PUT",
        f"{_ONE}/limits",
        "Change a key's limits, field by field",
        limit_key,
        KeyId,
        LimitChanges,
        KeyLimits,
        (404,),
    ),
    Route("POST", f"{_ONE}/rotate", "Replace a key by a new one", rotate_key, KeyId, Rotation, KeyRotated, (404,)),
)
