"""The OpenAPI document, made of the table that answers the requests: it can't tell of what is not there.

https://spec.openapis.org/oas/v3.1.1
"""

from typing import Any

import msgspec

from gateway.admin.desk import Problem
from gateway.admin.routes import Nothing, Route, Routes

REF = "#/components/schemas/{name}"
# Refusals that any route may come to; 405 and 413 are about the request as a whole.
ANY = {
    400: "Something in the request is wrong: `error.param` names it.",
    401: "No admin key was given.",
    403: "The admin key is wrong.",
    404: "There is no such thing.",
    409: "It is declared in the config file, or stands in the way of another.",
    413: "The body is too large.",
    500: "The gateway failed.",
    503: "Not at the moment: the gateway is ending, or a database can't be used.",
}
ALWAYS = (400, 401, 403, 413, 500, 503)


def document(routes: Routes) -> bytes:
    kinds = [
        kind for route in routes for kind in (route.gives, route.body, *route.also.values()) if kind is not Nothing
    ]
    schemas, components = msgspec.json.schema_components([Problem, *kinds], schema_hook=_any, ref_template=REF)
    schema_of = dict(zip([Problem, *kinds], schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    told = {
        "openapi": "3.1.0",
        "info": {"title": "llmproxy's admin API", "version": "1"},
        "security": [{"admin_key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"admin_key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(told)


def _operation(route: Route[Any, Any], schema_of: dict[Any, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "operationId": route.handler.__name__.strip("_"),
        "summary": route.summary,
        "tags": [route.path.split("/")[2].partition(".")[0]],
        "responses": _responses(route, schema_of),
    }
    if parameters := _parameters(route):
        told["parameters"] = parameters
    if route.has_body:
        told["requestBody"] = {"required": True, **_json(schema_of[route.body])}
    return told


def _responses(route: Route[Any, Any], schema_of: dict[Any, Any]) -> dict[str, Any]:
    problem = schema_of[Problem]
    told = {"200": {"description": "Done.", **_json(schema_of[route.gives])}}
    for status in sorted({*ALWAYS, *route.refuses, *route.also}):
        also = schema_of[route.also[status]] if status in route.also else None
        schema = {"anyOf": [also, problem]} if also else problem
        told[str(status)] = {"description": ANY[status], **_json(schema)}
    return told


def _parameters(route: Route[Any, Any]) -> list[dict[str, Any]]:
    (schema,), components = msgspec.json.schema_components([route.params], ref_template=REF)
    found = components[schema["$ref"].rpartition("/")[2]]
    return [
        {
            "name": name,
            "in": "path" if name in route.in_path else "query",
            "required": name in found.get("required", ()),
            "schema": _without_null(kind),
        }
        for name, kind in found["properties"].items()
    ]


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter that is left out is left out: its text is never null."""
    kinds = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    return dict(kinds[0]) if len(kinds) == 1 else schema


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _any(kind: type) -> dict[str, Any]:
    """`object`: any JSON value may stand there."""
    return {"description": "Any value."}
