"""The OpenAPI schema: it is one, it says what the routes take, and requests made up from it find no 500."""

from __future__ import annotations

import pytest
from live import live

from fastigpt.server.parameters import Edit, Generation


def test_the_schema_names_every_parameter():
    with live() as server:
        schema = server.get("/openapi.json").json()
    paths = schema["paths"]
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/models", "/readyz", "/metrics"} <= paths.keys()
    bodies = paths["/v1/images/edits"]["post"]["requestBody"]["content"]
    form, as_json = (bodies[kind]["schema"] for kind in ("multipart/form-data", "application/json"))
    assert form["properties"].keys() == Edit.model_fields.keys() | {"image", "mask"}
    assert as_json["properties"].keys() == Edit.model_fields.keys() | {"images", "mask"}
    (generation,) = paths["/v1/images/generations"]["post"]["requestBody"]["content"].values()
    assert generation["schema"]["properties"].keys() == Generation.model_fields.keys()
    assert generation["schema"]["additionalProperties"] is False and generation["schema"]["required"] == ["prompt"]
    assert all("422" not in route["responses"] for path in paths.values() for route in path.values())


@pytest.mark.slow
def test_requests_made_up_from_the_schema_are_answered_as_it_says():
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    with live() as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        for operation in schema.get_all_operations():
            strategy = operation.ok().as_strategy()

            @settings(max_examples=60, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
            @given(case=strategy)
            def one(case):
                answer = case.call(base_url=server.url)
                case.validate_response(
                    answer, checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
                )

            one()
