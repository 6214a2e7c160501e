"""/openapi.json compared with the server: valid and invalid requests generated from the schema."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from live import Live
from serve_helpers import app_of

from nanochat.serve.api import Settings

with warnings.catch_warnings():  # of other packages
    warnings.simplefilter("ignore")
    schemathesis = pytest.importorskip("schemathesis")

OPERATIONS = [
    ("POST", path)
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/chat/completions",
        "/tokenize",
        "/detokenize",
    )
]
OPERATIONS += [
    ("GET", path)
    for path in (
        "/",
        "/v1/models",
        "/v1/models/{name}",
        "/health",
        "/health/ready",
        "/health/live",
        "/stats",
        "/metrics",
        "/tokenizer_info",
    )
]


@pytest.fixture(scope="module")
def described() -> Iterator[Any]:
    with Live(app_of(Settings(max_tokens=4))) as live:
        yield schemathesis.openapi.from_url(f"{live.url}/openapi.json")


def test_operations(described: Any) -> None:
    assert {(o.ok().method.upper(), o.ok().path) for o in described.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize("invalid", [False, True], ids=["valid", "invalid"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_responses_match_the_schema(described: Any, method: str, path: str, invalid: bool) -> None:
    """Every status and body is declared, no status is 5xx, and requests that violate the schema are refused."""
    modes, checks = schemathesis.GenerationMode, schemathesis.checks
    if invalid and method == "GET":
        pytest.skip("no parameters")
    cases = described[path][method].as_strategy(generation_mode=modes.NEGATIVE if invalid else modes.POSITIVE)

    @given(case=cases)
    @settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def answers(case: Any) -> None:
        # The schema cannot express the context length; 413 is a refusal too.
        excluded = [checks.positive_data_acceptance]
        response = case.call()
        if response.status_code == 413:
            excluded.append(checks.negative_data_rejection)
        case.validate_response(response, excluded_checks=excluded)

    answers()
