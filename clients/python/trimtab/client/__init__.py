"""The Trimtab client: ask a Trimtab server for a steered reply, and hold the proof that it was steered.

    client = Trimtab("http://127.0.0.1:8000")
    calm = Steering(edits=[Latent("calm", 5120).clamp(0.0).during("completion")])
    reply = client.chat.completions.create(model="smollm2-135m-instruct", messages=[...], steering=calm)
    reply.steering.max_relative_norm

Any OpenAI client does as well: `stock.chat.completions.create(model=..., messages=[...], **calm.openai())`, then
`require_applied(reply)`. Nothing here imports torch or vllm, and the `openai` SDK only when it is first needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.client.aio import AsyncTrimtab as AsyncTrimtab
    from trimtab.client.bundles import BundleLatent as BundleLatent
    from trimtab.client.bundles import BundleSummary as BundleSummary
    from trimtab.client.bundles import Validation as Validation
    from trimtab.client.comparison import Arm as Arm
    from trimtab.client.comparison import ArmReply as ArmReply
    from trimtab.client.comparison import Comparison as Comparison
    from trimtab.client.errors import CallError as CallError
    from trimtab.client.errors import ConflictError as ConflictError
    from trimtab.client.errors import ExperimentStateError as ExperimentStateError
    from trimtab.client.errors import InvalidBundleError as InvalidBundleError
    from trimtab.client.errors import InvalidExperimentError as InvalidExperimentError
    from trimtab.client.errors import InvalidSteeringError as InvalidSteeringError
    from trimtab.client.errors import NotAppliedError as NotAppliedError
    from trimtab.client.errors import StaleRevisionError as StaleRevisionError
    from trimtab.client.errors import TrimtabError as TrimtabError
    from trimtab.client.errors import UnknownBundleError as UnknownBundleError
    from trimtab.client.errors import UnknownExperimentError as UnknownExperimentError
    from trimtab.client.errors import UnsupportedError as UnsupportedError
    from trimtab.client.errors import Violation as Violation
    from trimtab.client.experiments import ArmHealth as ArmHealth
    from trimtab.client.experiments import Change as Change
    from trimtab.client.experiments import Effect as Effect
    from trimtab.client.experiments import Experiment as Experiment
    from trimtab.client.experiments import ExperimentHealth as ExperimentHealth
    from trimtab.client.experiments import ExperimentResults as ExperimentResults
    from trimtab.client.experiments import GuardrailResult as GuardrailResult
    from trimtab.client.experiments import Look as Look
    from trimtab.client.experiments import NextStep as NextStep
    from trimtab.client.experiments import Outcome as Outcome
    from trimtab.client.experiments import Recorded as Recorded
    from trimtab.client.http import Trimtab as Trimtab
    from trimtab.client.inspection import InspectedToken as InspectedToken
    from trimtab.client.inspection import Inspection as Inspection
    from trimtab.client.inspection import LatentActivation as LatentActivation
    from trimtab.client.proof import Applied as Applied
    from trimtab.client.proof import Enrolled as Enrolled
    from trimtab.client.proof import HookPoint as HookPoint
    from trimtab.client.proof import require_applied as require_applied
    from trimtab.client.spec import Edit as Edit
    from trimtab.client.spec import Latent as Latent
    from trimtab.client.spec import Steering as Steering
    from trimtab.client.spec import Vector as Vector

_HOME = {
    "Applied": "proof",
    "Arm": "comparison",
    "ArmHealth": "experiments",
    "ArmReply": "comparison",
    "AsyncTrimtab": "aio",
    "BundleLatent": "bundles",
    "BundleSummary": "bundles",
    "CallError": "errors",
    "Change": "experiments",
    "Comparison": "comparison",
    "ConflictError": "errors",
    "Edit": "spec",
    "Effect": "experiments",
    "Enrolled": "proof",
    "Experiment": "experiments",
    "ExperimentHealth": "experiments",
    "ExperimentResults": "experiments",
    "ExperimentStateError": "errors",
    "GuardrailResult": "experiments",
    "HookPoint": "proof",
    "InspectedToken": "inspection",
    "Inspection": "inspection",
    "InvalidBundleError": "errors",
    "InvalidExperimentError": "errors",
    "InvalidSteeringError": "errors",
    "Latent": "spec",
    "LatentActivation": "inspection",
    "Look": "experiments",
    "NextStep": "experiments",
    "NotAppliedError": "errors",
    "Outcome": "experiments",
    "Recorded": "experiments",
    "StaleRevisionError": "errors",
    "Steering": "spec",
    "Trimtab": "http",
    "TrimtabError": "errors",
    "UnknownBundleError": "errors",
    "UnknownExperimentError": "errors",
    "UnsupportedError": "errors",
    "Validation": "bundles",
    "Vector": "spec",
    "Violation": "errors",
    "require_applied": "proof",
}

__all__ = [
    "Applied",
    "Arm",
    "ArmHealth",
    "ArmReply",
    "AsyncTrimtab",
    "BundleLatent",
    "BundleSummary",
    "CallError",
    "Change",
    "Comparison",
    "ConflictError",
    "Edit",
    "Effect",
    "Enrolled",
    "Experiment",
    "ExperimentHealth",
    "ExperimentResults",
    "ExperimentStateError",
    "GuardrailResult",
    "HookPoint",
    "InspectedToken",
    "Inspection",
    "InvalidBundleError",
    "InvalidExperimentError",
    "InvalidSteeringError",
    "Latent",
    "LatentActivation",
    "Look",
    "NextStep",
    "NotAppliedError",
    "Outcome",
    "Recorded",
    "StaleRevisionError",
    "Steering",
    "Trimtab",
    "TrimtabError",
    "UnknownBundleError",
    "UnknownExperimentError",
    "UnsupportedError",
    "Validation",
    "Vector",
    "Violation",
    "require_applied",
]


def __getattr__(name: str) -> Any:
    # The SDK takes most of a second to import, and the CLI's `--help` does not need it.
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
