from typing import Any

import pytest

from tests.bundles import random_bundle
from trimtab.server.errors import InvalidRequest, InvalidSteering, UnknownBundle
from trimtab.server.plan import Plan
from trimtab.server.service.admission import Admission, OnFailure, admit

FIELDS = frozenset(
    {"model", "messages", "prompt", "stream", "stop", "seed", "n", "use_beam_search", "vllm_xargs", "cache_salt"}
)
BUNDLES = {"calm": random_bundle()}
ADD = {"bundle": "calm", "latent": 7, "operation": "add", "amount": 1.0}


def ask(on_failure: OnFailure = "closed", **fields: Any) -> Admission:
    document = {"model": "smollm", "prompt": "hi", **fields}
    return admit(document, fields=FIELDS, models=("smollm",), bundles=BUNDLES, on_failure=on_failure)


def fields_at_fault(error: pytest.ExceptionInfo[Any]) -> list[str]:
    return [violation.field for violation in error.value.violations]


def test_a_request_without_steering_is_left_as_it_is() -> None:
    assert ask(stream=True) == Admission({"model": "smollm", "prompt": "hi", "stream": True}, None)


def test_steering_becomes_a_plan_where_the_engine_looks_for_it() -> None:
    admission = ask(steering={"edits": [ADD]}, vllm_xargs={"other": 1})
    assert admission.steered is not None
    assert "steering" not in admission.body
    assert admission.body["vllm_xargs"].keys() == {"other", "trimtab"}
    assert Plan.from_wire(admission.body["vllm_xargs"]["trimtab"]) == admission.steered.plan
    assert admission.steered.bundles == ("calm",)


def test_strength_zero_is_steered_and_runs_as_plain() -> None:
    admission = ask(steering={"bundle": "calm", "strength": 0.0})
    assert admission.steered is not None
    assert admission.steered.plan.rows == ()
    assert "vllm_xargs" not in admission.body


@pytest.mark.parametrize(
    "name", ["steer", "sterring", "steering_", "Steering", "steered", "steering_vector", "STEERING", "steerign"]
)
def test_a_misspelt_steering_is_refused(name: str) -> None:
    with pytest.raises(InvalidSteering, match="did you mean `steering`") as error:
        ask("closed", **{name: {"bundle": "calm"}})
    assert fields_at_fault(error) == [name]


@pytest.mark.parametrize("name", ["stream", "stop", "seed", "metadata", "store", "user", "string_id"])
def test_other_fields_are_not_taken_for_a_misspelling(name: str) -> None:
    ask("closed", **{name: "x"})


def test_a_client_cannot_set_what_the_server_derives() -> None:
    with pytest.raises(InvalidRequest) as error:
        ask(cache_salt="a", kv_transfer_params={}, ec_transfer_params={}, extra_body={"steering": {}})
    assert fields_at_fault(error) == ["cache_salt", "kv_transfer_params", "ec_transfer_params", "extra_body"]


def test_a_client_cannot_bring_a_plan() -> None:
    with pytest.raises(InvalidSteering) as error:
        ask(vllm_xargs={"trimtab": "{}", "steering": "{}"})
    assert fields_at_fault(error) == ["vllm_xargs.trimtab", "vllm_xargs.steering"]


@pytest.mark.parametrize("xargs", [[1], "x", 1, True])
def test_extra_arguments_that_are_no_object_are_refused(xargs: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        ask(steering={"bundle": "calm"}, vllm_xargs=xargs)
    assert fields_at_fault(error) == ["vllm_xargs"]


def test_extra_arguments_may_be_null() -> None:
    assert ask(steering={"bundle": "calm"}, vllm_xargs=None).body["vllm_xargs"].keys() == {"trimtab"}


def test_all_violations_come_at_once() -> None:
    edits = [{**ADD, "latent": -1, "amout": 2}, {**ADD, "operation": "smooth"}]
    with pytest.raises(InvalidSteering) as error:
        ask(steering={"edits": edits, "strenght": 1}, cache_salt="x", use_beam_search=True, streering=1)
    found = fields_at_fault(error)
    expected = {
        "steering.edits[0].latent",
        "steering.edits[0].amout",
        "steering.edits[1].operation",
        "steering.strenght",
    }
    assert expected | {"cache_salt", "use_beam_search", "streering"} == set(found)


def test_steering_that_is_null_is_no_unsteered_request() -> None:
    with pytest.raises(InvalidSteering):
        ask(steering=None)


def test_beam_search_without_steering_is_vllms_own_business() -> None:
    assert ask(use_beam_search=True).steered is None


def test_an_unknown_bundle_says_which_are_loaded() -> None:
    with pytest.raises(UnknownBundle, match=r"'clam' is not loaded \(loaded: calm\)") as error:
        ask(steering={"bundle": "clam"})
    assert error.value.field == "steering.bundle"


def test_an_alias_is_the_bundle_at_its_strength() -> None:
    by_alias, by_field = ask(model="smollm@calm:0.5"), ask(steering={"bundle": "calm", "strength": 0.5})
    assert by_alias == by_field
    assert ask(model="smollm@calm") == ask(steering={"bundle": "calm"})


@pytest.mark.parametrize("model", ["smollm@calm:nan", "smollm@calm:", "smollm@", "other@calm", "smollm@calm:1e9"])
def test_what_is_no_alias_is_a_model_that_nobody_serves(model: str) -> None:
    """vLLM's serving code answers 404 to it; the name is not touched."""
    assert ask(model=model) == Admission({"model": model, "prompt": "hi"}, None)


def test_an_alias_out_of_range_blames_the_model_field() -> None:
    with pytest.raises(InvalidSteering) as error:
        ask(model="smollm@calm:1000")
    assert fields_at_fault(error) == ["model"]


def test_an_alias_of_an_unknown_bundle_blames_the_model_field() -> None:
    with pytest.raises(UnknownBundle) as error:
        ask(model="smollm@clam")
    assert error.value.field == "model"


def test_an_alias_and_steering_together_are_refused() -> None:
    with pytest.raises(InvalidSteering, match="use one of the two"):
        ask(model="smollm@calm", steering={"bundle": "calm"})


def test_on_failure_is_the_requests_own_or_else_the_servers() -> None:
    def policy(server: OnFailure, **steering: Any) -> str:
        steered = ask(server, steering={"bundle": "calm", **steering}).steered
        assert steered is not None
        return steered.on_failure

    assert policy("closed") == "closed"
    assert policy("open") == "open"
    assert policy("open", on_failure="closed") == "closed"
    assert policy("closed", on_failure="open") == "open"
