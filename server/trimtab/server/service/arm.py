"""An arm in admission: its own edits, beside gates of the other arms that are read and open nothing.

Where every edit of an experiment is gated, its units can be analysed that were, or would have been, altered: in every arm all
gates are evaluated on every token, those of the other arms with edits of such a strength that no number of the stream changes. Up
to the first token on which any gate opens all arms are alike, so whether one opens at all is the same question in each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trimtab.attribution.bundle import Bundle
from trimtab.server.errors import InvalidSteering, Revoked, TrimtabError, Unavailable, UnknownBundle
from trimtab.server.experiments.definition import Arm, Experiment
from trimtab.server.experiments.errors import ArmFailed
from trimtab.server.plan import Plan, PlanRow, compile_plan
from trimtab.server.service.rules import Rules, names
from trimtab.server.steering import Steering

__all__ = ["NOTHING", "ArmRule", "is_gated"]

NOTHING = 1e-30
"""A strength that does nothing: what it adds is far below the precision of anything in the residual stream, and a row of it is a
row."""


def is_gated(definition: Experiment) -> bool:
    """Whether all that the arms do is gated, so that in each it can be told whether anything was, or would have been, altered."""
    steered = [arm.steering for arm in definition.arms if arm.steering is not None]
    prompted = any(arm.system_prompt is not None for arm in definition.arms)
    return (
        bool(steered)
        and not prompted
        and all(
            steering.edits is not None and all(edit.gate is not None for edit in steering.edits) for steering in steered
        )
    )


@dataclass(frozen=True)
class ArmRule:
    """The arm that one request is of."""

    experiment: str
    arm: Arm
    plan: str | None
    """The hash that its steering compiled to when the experiment was started."""
    watched: tuple[Steering, ...]
    """Of the other arms, where all are gated."""
    on_failure: Literal["closed", "open"]

    @classmethod
    def of(cls, definition: Experiment, arm: Arm, plans: Mapping[str, str]) -> "ArmRule":
        """The rule of an experiment's arm."""
        others = (other.steering for other in definition.arms if other.key != arm.key and other.steering is not None)
        watched = tuple(others) if is_gated(definition) else ()
        return cls(definition.key, arm, plans.get(arm.key), watched, definition.on_failure)

    def compiled(self, rules: Rules, bundles: Mapping[str, Bundle]) -> tuple[Plan | None, tuple[PlanRow, ...]]:
        """The plan of the arm's own steering, and the rows that only watch.

        Raises:
            ArmFailed: what the arm gives cannot be had here.
        """
        try:
            own = None if self.arm.steering is None else _compiled(self.arm.steering, rules, bundles)
            if own is not None and own.hash != self.plan:
                raise Unavailable(
                    f"its steering is plan {own.hash} here, and was {self.plan} when the experiment was started"
                )
            watched = [_compiled(steering, rules, bundles) for steering in self.watched]
        except (InvalidSteering, Revoked, Unavailable, UnknownBundle) as e:
            raise self.failed(e) from e
        rows = (row for plan in watched for row in plan.rows)
        return own, tuple(row._replace(alpha=row.alpha * NOTHING, beta=row.beta * NOTHING) for row in rows)

    def failed(self, error: TrimtabError) -> ArmFailed:
        """The error of a request that cannot get what this arm gives."""
        return ArmFailed(f"arm {self.arm.key!r} of experiment {self.experiment!r} cannot be had: {error.message}")


def _compiled(steering: Steering, rules: Rules, bundles: Mapping[str, Bundle]) -> Plan:
    rules.require_fresh()
    for name in names(steering):
        rules.resolve(name)
    return compile_plan(steering, bundles)
