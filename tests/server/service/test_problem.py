import pytest

from trimtab.server.errors import (
    Conflict,
    Forbidden,
    InvalidBundle,
    InvalidRequest,
    InvalidSteering,
    NotApplied,
    Overloaded,
    TrimtabError,
    UnknownBundle,
    Unsupported,
    Violation,
)
from trimtab.server.service.problem import Problem, of_error, of_vllm

WRONG = [Violation("steering.edits[0].latent", "is absent"), Violation("steering.strength", "is NaN")]


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (InvalidSteering(WRONG), 400, "invalid_steering", "invalid_request_error"),
        (InvalidRequest(WRONG), 400, "invalid_request", "invalid_request_error"),
        (Unsupported("no"), 400, "unsupported", "invalid_request_error"),
        (UnknownBundle("no", field="steering.bundle"), 404, "unknown_bundle", "invalid_request_error"),
        (InvalidBundle("no", field="body"), 400, "invalid_bundle", "invalid_request_error"),
        (Forbidden("no"), 403, "forbidden", "permission_error"),
        (Conflict("no", field="name"), 409, "conflict", "invalid_request_error"),
        (Overloaded("no"), 503, "overloaded", "server_error"),
        (NotApplied("no"), 500, "steering_not_applied", "server_error"),
    ],
)
def test_each_error_has_its_status_and_openais_shape(error: TrimtabError, status: int, code: str, kind: str) -> None:
    problem = of_error(error)
    document = problem.document["error"]
    assert (problem.status, document["code"], document["type"]) == (status, code, kind)
    assert document["param"] == error.field
    assert document["message"] == error.message


def test_violations_are_listed_with_their_fields() -> None:
    assert of_error(InvalidSteering(WRONG)).document["error"]["violations"] == [
        {"field": "steering.edits[0].latent", "message": "is absent"},
        {"field": "steering.strength", "message": "is NaN"},
    ]


def test_a_reply_that_was_not_steered_is_not_asked_for_again_by_itself() -> None:
    assert of_error(NotApplied("no")).headers == {"x-should-retry": "false"}


def test_what_may_pass_says_when_to_come_back() -> None:
    assert Problem(503, "engine_dead", "gone").headers == {"retry-after": "5", "retry-after-ms": "5000"}
    assert of_vllm(429, "too many", None).status == 503


def test_vllms_own_errors_get_stable_codes() -> None:
    assert [of_vllm(status, "m", None).code for status in (400, 404, 422, 500, 501)] == [
        "invalid_request",
        "model_not_found",
        "invalid_request",
        "internal",
        "internal",
    ]
