"""OpenFeature's own SDK asks for arms, and decides them."""

from typing import Any

import pytest
from openfeature import api
from openfeature.client import OpenFeatureClient
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import ErrorCode
from openfeature.flag_evaluation import FlagResolutionDetails, Reason
from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider

from tests.server.experiments.examples import running
from trimtab.server.errors import Unsupported
from trimtab.server.experiments.assignment import assign, shares
from trimtab.server.experiments.feature_flags import Assigner, ExperimentProvider

KEY = "calm-replies"


@pytest.fixture
def flags() -> OpenFeatureClient:
    """An application's client."""
    api.set_provider_and_wait(ExperimentProvider(lambda: [running(0.5)]), "test")
    return api.get_client("test")


def test_an_application_is_told_the_arm_that_the_server_gives(flags: OpenFeatureClient) -> None:
    record = running(0.5)
    for user in map(str, range(200)):
        ours = assign(record, {"user": user})
        for context in (EvaluationContext(user), EvaluationContext(attributes={"user": user})):
            theirs = flags.get_string_details(KEY, "nothing", context)
            if ours.arm is None:
                assert (theirs.value, theirs.variant, theirs.reason) == ("nothing", None, Reason.DEFAULT)
            else:
                assert (theirs.value, theirs.variant, theirs.reason) == (ours.arm.key, ours.arm.key, Reason.SPLIT)
            assert theirs.flag_metadata["reason"] == ours.reason


def test_what_cannot_be_told_is_the_default_with_its_code(flags: OpenFeatureClient) -> None:
    assert flags.get_string_details("nowhere", "x").error_code == ErrorCode.FLAG_NOT_FOUND
    assert flags.get_string_details(KEY, "x").error_code == ErrorCode.TARGETING_KEY_MISSING
    assert flags.get_boolean_details(KEY, True).error_code == ErrorCode.TYPE_MISMATCH
    assert flags.get_string_value("nowhere", "x") == "x"


def test_another_provider_decides_the_arms_of_who_takes_part() -> None:
    def by_hand(flag: Any, context: EvaluationContext) -> FlagResolutionDetails[str]:
        even = int(context.targeting_key or "0") % 2 == 0
        return FlagResolutionDetails("calm" if even else "nobody knows", variant="on" if even else "off")

    flag = InMemoryFlag("on", {"on": "calm", "off": "nobody knows"}, context_evaluator=by_hand)
    assigner = Assigner(InMemoryProvider({KEY: flag}))
    record = running(0.5, assigned_by="openfeature")
    given = [assign(record, {"user": str(n)}, decide=assigner.decide) for n in range(2000)]
    assert {one.arm.key for one in given if one.arm is not None} == {"calm"}
    assert {one.reason for one in given} == {"assigned", "coverage"}
    assert sum(one.arm is not None for one in given) == pytest.approx(500, abs=60)
    assert all(one.arm is None for one in given[1::2])
    assert assign(record, {}, decide=assigner.decide).reason == "missing_unit"
    assert assign(record, {"user": "2"}).arm is None
    assert shares(record.definition, 0.5) == (0.4, 0.4, 0.2)
    unknown = running(1.0, assigned_by="openfeature", key="no-such-flag")
    assert assign(unknown, {"user": "2"}, decide=assigner.decide).arm is None


def test_the_provider_of_a_setting_is_loaded_or_said_not_to_be() -> None:
    assert Assigner.load("openfeature.provider.no_op_provider:NoOpProvider")
    for source in ("nowhere:make", "json:dumps", "json"):
        with pytest.raises(Unsupported, match="give module:function"):
            Assigner.load(source)
