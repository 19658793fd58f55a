"""/openapi.json is true: schemathesis sends what it allows, and what it forbids, and nothing breaks or hangs."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from karakoram.chat import ChatFormat
from karakoram.engine.request import Request
from karakoram.serve.app import create_app
from karakoram.serve.service import Service
from tests.serve.conftest import WAIT_S, Running, Words, running

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
DOCUMENT = create_app(Service(["nano"])).openapi()
OPERATIONS = [(path, method) for path, item in DOCUMENT["paths"].items() for method in item]


@pytest.fixture(scope="module")
def server(fmt: ChatFormat, words: Words) -> Iterator[Running]:
    """Answers whatever it is asked in few tokens."""

    def script(request: Request) -> Iterator[int]:
        for token in words.script(request):
            if request.constraint is None:
                yield token
            else:  # what a constraint allows is not this script's business: the engine says what went wrong
                return

    with running(fmt, script) as started:
        yield started


def fuzz(server: Running, path: str, method: str, examples: int, checks: list[Any]) -> None:
    schema: Any = schemathesis.openapi.from_dict(json.loads(json.dumps(DOCUMENT)))
    operation = schema[path][method.upper()]
    modes = [schemathesis.GenerationMode.POSITIVE]
    if "requestBody" in DOCUMENT["paths"][path][method]:  # what has no body has nothing to be wrong in
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    for mode in modes:

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            response = case.call(base_url=server.url, timeout=WAIT_S)
            case.validate_response(response, checks=checks)

        send()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_nothing_breaks(server: Running, path: str, method: str) -> None:
    fuzz(server, path, method, 12, [*CHECKS, negative_data_rejection])
    server.still_answers()
    assert server.idle()


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_nothing_breaks_in_a_long_run(server: Running, path: str, method: str) -> None:
    # Without the check that what is forbidden is refused: now and then it takes one role of messages for another.
    fuzz(server, path, method, 150, CHECKS)
    server.still_answers()


def test_the_document_is_whole(server: Running) -> None:
    document = server.http.get("/openapi.json").json()
    assert document["paths"].keys() == DOCUMENT["paths"].keys()
    text = json.dumps(document)
    named = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(re.findall(r'"\$ref": "([^"]*)"', text)) <= named
    assert "$defs" not in text and "422" not in text
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["summary"]
            if path != "/health":
                assert "503" in operation["responses"]


def test_a_key_is_in_the_document_when_one_is_needed() -> None:
    document = create_app(Service(["nano"], ["key"])).openapi()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "key"}
    for path, item in document["paths"].items():
        for operation in item.values():
            assert ("401" in operation["responses"]) == ("security" in operation) == (path != "/health")
