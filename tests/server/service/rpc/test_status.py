"""An error says over gRPC what it says over HTTP."""

import grpc
import pytest
from google.rpc import error_details_pb2 as details

from trimtab.server.errors import Conflict, Forbidden, InvalidSteering, NotApplied, Overloaded, UnknownBundle, Violation
from trimtab.server.service.problem import Problem, of_error
from trimtab.server.service.rpc.requests import path
from trimtab.server.service.rpc.status import code_of, status_of


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidSteering([Violation("steering", "no")]), grpc.StatusCode.INVALID_ARGUMENT),
        (UnknownBundle("no"), grpc.StatusCode.NOT_FOUND),
        (Forbidden("no"), grpc.StatusCode.PERMISSION_DENIED),
        (Conflict("no"), grpc.StatusCode.FAILED_PRECONDITION),
        (Overloaded("no"), grpc.StatusCode.UNAVAILABLE),
        (NotApplied("no"), grpc.StatusCode.INTERNAL),
    ],
)
def test_each_error_has_its_code(error, code) -> None:  # type: ignore[no-untyped-def]
    assert code_of(of_error(error)) == code
    assert status_of(of_error(error)).code == code.value[0]


def test_violations_are_told_with_their_paths_in_the_message() -> None:
    found = [Violation("steering.edits[0].latent", "is not there"), Violation("temperature", "is too hot")]
    status = status_of(of_error(InvalidSteering(found)), path)
    info, bad = details.ErrorInfo(), details.BadRequest()
    assert [detail.Unpack(message) for detail, message in zip(status.details, (info, bad), strict=True)] == [True, True]
    assert (info.reason, info.domain) == ("INVALID_STEERING", "trimtab")
    told = [(violation.field, violation.description) for violation in bad.field_violations]
    assert told == [("steering.free_form.edits[0].latent", "is not there"), ("sampling.temperature", "is too hot")]


def test_what_can_be_asked_again_says_when() -> None:
    retry = details.RetryInfo()
    status = status_of(Problem(503, "overloaded", "full"))
    assert status.details[-1].Unpack(retry)
    assert retry.retry_delay.seconds == 5
