"""The arms of an experiment in this replica."""

from trimtab.server.errors import InvalidSteering, Revoked, Unavailable, UnknownBundle, Violation
from trimtab.server.experiments.definition import Experiment
from trimtab.server.experiments.errors import InvalidExperiment
from trimtab.server.plan import compile_plan
from trimtab.server.service.catalogue import Catalogue
from trimtab.server.service.rules import names

__all__ = ["plans_of"]


def plans_of(definition: Experiment, catalogue: Catalogue) -> dict[str, str]:
    """By arm, the hash of the plan that its steering compiles to here and now.

    Raises:
        InvalidExperiment: an arm's steering cannot be had, or names a bundle whose meaning may change while it runs.
    """
    violations: list[Violation] = []
    plans: dict[str, str] = {}
    for i, arm in enumerate(definition.arms):
        if arm.steering is None:
            continue
        where = f"experiment.arms[{i}].steering"
        try:
            for name in names(arm.steering):
                if (reference := catalogue.resolve(name)) != name:
                    violations.append(
                        Violation(where, f"{name!r} means another version once its default changes; name {reference}")
                    )
            plans[arm.key] = compile_plan(arm.steering, catalogue).hash
        except InvalidSteering as e:
            violations += [Violation(f"experiment.arms[{i}].{v.field}", v.message) for v in e.violations]
        except (Revoked, Unavailable, UnknownBundle) as e:
            violations.append(Violation(where, e.message))
    if violations:
        raise InvalidExperiment(violations)
    return plans
