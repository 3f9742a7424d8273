"""OpenFeature, both ways.

`ExperimentProvider`   for applications: an experiment is a flag whose variants are its arms, decided in their own process as the
                       server decides it; so is what else of the application should go with an arm
`Assigner`             for the server: LaunchDarkly, flagd, Unleash or any other OpenFeature provider decides the arms of the
                       experiments that say `"assigned_by": "openfeature"`: the flag is the experiment's key, its value an arm's
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openfeature import api
from openfeature.client import OpenFeatureClient
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import ErrorCode
from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType, Reason
from openfeature.provider import AbstractProvider, FeatureProvider, Metadata

from trimtab.server.errors import Unsupported
from trimtab.server.experiments.assignment import assign
from trimtab.server.experiments.definition import Arm, Experiment
from trimtab.server.experiments.lifecycle import Record

__all__ = ["Assigner", "ExperimentProvider"]

_DOMAIN = "trimtab"


class ExperimentProvider(AbstractProvider):
    """Experiments as flags: strings, the key of the unit's arm. Who is not enrolled gets the default."""

    def __init__(self, records: Callable[[], Sequence[Record]], *, holdout: Callable[[], float] = lambda: 0.0) -> None:
        """Of the experiments that `records` gives whenever a flag is asked for."""
        super().__init__()
        self._records = records
        self._holdout = holdout

    def get_metadata(self) -> Metadata:
        """Its name."""
        return Metadata(name="trimtab")

    def resolve_string_details(
        self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[str]:
        """The arm of the unit that the context names, by its targeting key or by an attribute such as `user`."""
        record = next((record for record in self._records() if record.definition.key == flag_key), None)
        if record is None:
            return FlagResolutionDetails(
                default_value, ErrorCode.FLAG_NOT_FOUND, f"there is no experiment {flag_key!r}"
            )
        context = evaluation_context or EvaluationContext()
        attributes = dict(context.attributes)
        if context.targeting_key:
            attributes.setdefault(record.definition.unit, context.targeting_key)
        found = assign(record, attributes, holdout=self._holdout())
        told = {"reason": found.reason, "revision": found.revision}
        if found.reason in ("missing_unit", "malformed_unit"):
            code, unit = ErrorCode.TARGETING_KEY_MISSING, record.definition.unit
            return FlagResolutionDetails(default_value, code, f"the context names no {unit}", flag_metadata=told)
        if found.arm is None:
            reason = Reason.DISABLED if found.reason == "not_running" else Reason.DEFAULT
            return FlagResolutionDetails(default_value, reason=reason, flag_metadata=told)
        key = found.arm.key
        return FlagResolutionDetails(key, reason=Reason.SPLIT, variant=key, flag_metadata=told)

    def resolve_boolean_details(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        """No experiment is a boolean."""
        return _mismatch(flag_key, default_value)

    def resolve_integer_details(
        self, flag_key: str, default_value: int, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[int]:
        """Nor an integer."""
        return _mismatch(flag_key, default_value)

    def resolve_float_details(
        self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[float]:
        """Nor a float."""
        return _mismatch(flag_key, default_value)

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        """Nor an object."""
        return _mismatch(flag_key, default_value)


def _mismatch(flag_key: str, default: Any) -> FlagResolutionDetails[Any]:
    return FlagResolutionDetails(
        default, ErrorCode.TYPE_MISMATCH, f"experiment {flag_key!r} is a string, the key of an arm"
    )


class Assigner:
    """An OpenFeature provider that decides arms; it must decide in process, without waiting, as flag SDKs do."""

    def __init__(self, provider: FeatureProvider) -> None:
        api.set_provider_and_wait(provider, _DOMAIN)
        self._client: OpenFeatureClient = api.get_client(_DOMAIN)

    @classmethod
    def load(cls, source: str) -> "Assigner":
        """The provider that the Python function `module:function` makes.

        Raises:
            Unsupported: there is no such function, or what it makes is no provider that is ready.
        """
        module, _, function = source.partition(":")
        try:
            provider = getattr(importlib.import_module(module), function)()
            return cls(provider)
        except Exception as e:
            raise Unsupported(f"openfeature_provider {source!r}: {e!r}; give module:function that makes one") from e

    def decide(self, experiment: Experiment, unit: str, attributes: Mapping[str, Any]) -> Arm | None:
        """The arm that the provider gives to the unit; None for its default, for an error, and for what is no arm."""
        context = EvaluationContext(unit, {key: value for key, value in attributes.items() if value is not None})
        found = self._client.get_string_details(experiment.key, "", context)
        return experiment.arm(found.value) if found.error_code is None else None
