"""The wire contract and the JSON say the same: the same words, the same fields."""

from dataclasses import fields
from typing import Any, get_args

import pytest

from trimtab.attribution.bundle import RecommendedEdit
from trimtab.attribution.edit import OPERATIONS
from trimtab.client import Applied, BundleSummary, HookPoint, Validation
from trimtab.server.steering import Edit, Gate, GateMode, Origin, PositionWindow, Scope, ScopeTokens, Steering
from trimtab.v1 import steering_pb2 as v1


def words(enum: Any, prefix: str) -> set[str]:
    return {name.removeprefix(prefix).lower() for name in enum.keys()} - {"unspecified"}  # noqa: SIM118 — no mapping


def names(message: Any) -> set[str]:
    return {field.name for field in message.DESCRIPTOR.fields}


def python_names(kind: Any) -> set[str]:
    """The names of a dataclass in the contract's spelling: `prompt_tokens`, `gate_firings`, `n_latents` are counts there."""
    spelt = set()
    for field in fields(kind):
        name = field.name
        if name.startswith("n_"):
            name = name.removeprefix("n_").removesuffix("s") + "_count"
        elif name.endswith(("_tokens", "_firings")):
            name = name.removesuffix("s") + "_count"
        spelt.add(name)
    return spelt


def test_enums_have_the_words_of_the_json() -> None:
    assert words(v1.Operation, "OPERATION_") == set(OPERATIONS)
    assert words(v1.Unit, "UNIT_") == set(get_args(Edit.model_fields["unit"].annotation))
    assert words(v1.ScopeTokens, "SCOPE_TOKENS_") == set(get_args(ScopeTokens))
    assert words(v1.Origin, "ORIGIN_") == set(get_args(Origin))
    assert words(v1.GateMode, "GATE_MODE_") == set(get_args(GateMode))
    assert words(v1.OnFailure, "ON_FAILURE_") == set(get_args(Steering.model_fields["on_failure"].annotation))
    assert words(v1.Status, "STATUS_") == {
        *("applied", "not_requested", "failed_open", "requested", "killed", "blinded"),
    }


def test_requests_have_the_fields_of_the_json() -> None:
    assert names(v1.Scope) == set(Scope.model_fields)
    assert names(v1.PositionWindow) == set(PositionWindow.model_fields)
    assert names(v1.Gate) == set(Gate.model_fields)
    assert names(v1.Edit) == set(Edit.model_fields)
    assert names(v1.Steering) - {"free_form"} | {"edits"} == set(Steering.model_fields)
    assert names(v1.RecommendedEdit) == set(RecommendedEdit.model_fields)


@pytest.mark.parametrize(
    ("message", "kind"), [(v1.Applied, Applied), (v1.BundleSummary, BundleSummary), (v1.Validation, Validation)]
)
def test_replies_have_the_fields_of_the_client(message: Any, kind: Any) -> None:
    assert names(message) == python_names(kind)


def test_a_hook_points_proof_is_named_where_json_has_a_key() -> None:
    assert names(v1.HookPointProof) - {"hook_point"} == python_names(HookPoint)
