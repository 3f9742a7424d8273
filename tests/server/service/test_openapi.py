"""The OpenAPI document says what the server is: its routes, its scopes, its schemas. That replies fit it: `tests/fuzz`."""

import json
import re
from typing import Any

import pytest
from jsonschema_rs import meta

from trimtab.server.keys.access import OPEN, ROUTES
from trimtab.server.service.openapi.document import openapi
from trimtab.server.service.openapi.operations import OPERATIONS
from trimtab.server.steering import Steering

HTTP = {route for route in ROUTES if route[0] != "GRPC"}


def operations() -> dict[tuple[str, str], Any]:
    return {
        (method.upper(), path): operation
        for path, item in openapi()["paths"].items()
        for method, operation in item.items()
    }


def test_it_has_every_route_of_the_table_and_no_other() -> None:
    assert operations().keys() == HTTP == OPERATIONS.keys()


def test_what_asks_for_a_key_says_so_with_its_scopes() -> None:
    for route, operation in operations().items():
        assert ("security" in operation) == (ROUTES[route] != OPEN), route
        for scope in ROUTES[route]:
            assert scope in operation["description"], route


def test_every_reference_and_every_link_leads_somewhere() -> None:
    text = json.dumps(openapi())
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', text)) <= openapi()["components"]["schemas"].keys()
    names = {operation["operationId"] for operation in operations().values()}
    assert len(names) == len(HTTP)
    assert set(re.findall(r'"links": .*?"operationId": "([^"]+)"', text)) <= names


def test_every_schema_is_one() -> None:
    for schema in openapi()["components"]["schemas"].values():
        meta.validate(schema)


@pytest.mark.parametrize("name", ["ChatCompletionRequest", "CompletionRequest", "ResponsesRequest"])
def test_generation_takes_steering_in_full(name: str) -> None:
    properties = openapi()["components"]["schemas"][name]["properties"]
    assert {"$ref": "#/components/schemas/Steering"} in properties["steering"]["anyOf"]
    assert "cache_salt" not in properties  # the server's own


def test_the_steering_field_is_the_one_that_is_parsed() -> None:
    assert openapi()["components"]["schemas"]["Steering"]["properties"].keys() == Steering.model_fields.keys()
