"""The `steering` object of a reply: what was applied, once the engine's proof has been checked against the plan. Pure."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.server.engine.proof import COUNTS, combined, merge, verify
from trimtab.server.errors import NotApplied
from trimtab.server.fleet.switch import Switch
from trimtab.server.service.admission import Steered

__all__ = ["NOT_REQUESTED", "Run", "applied", "failed_open", "requested", "unsteered"]

NOT_REQUESTED = {"status": "not_requested"}
"""The object of a reply to a request without steering."""


class Run(NamedTuple):
    """One prompt of a request, as the engine ran it."""

    n_prompt: int
    n_completions: tuple[int, ...]
    """Completion tokens of each of its n samples."""
    proof: dict[str, Any] | None


def unsteered(killed: Switch | None) -> dict[str, Any]:
    """The object of a reply that is not steered, because nothing asked for it or because the kill switch keeps it from being."""
    return dict(NOT_REQUESTED) if killed is None else _killed(killed)


def requested(steered: Steered) -> dict[str, Any]:
    """The object before the first token: what was admitted, and who asked for it if the request did not."""
    document = {"status": "requested", "plan": steered.plan.hash, "bundles": list(steered.bundles)}
    if steered.source != "request":
        document["source"] = steered.source
    return document if steered.killed is None else {**document, **_killed(steered.killed)}


def _killed(switch: Switch) -> dict[str, Any]:
    return {"status": "killed", "reason": switch.reason}


def applied(steered: Steered, runs: Sequence[Run], n_runs: int) -> dict[str, Any]:
    """The object of a reply that was steered as asked; `n_runs` prompts were started.

    Each scope covers the same positions at every hook point that has it, so the request's own counts are the largest ones.

    Raises:
        NotApplied: a prompt did not finish, or its proof is missing or differs from the plan.
    """
    plan = steered.plan
    points: dict[str, dict[str, Any]] = {}
    if plan.rows:
        if len(runs) != n_runs:
            raise NotApplied(f"{len(runs)} of {n_runs} prompts finished; ask again")
        for run in runs:
            verify(plan, run.proof, run.n_prompt, list(run.n_completions))
        proofs = [run.proof for run in runs if run.proof is not None]
        for name, point in ((name, point) for proof in proofs for name, point in proof["hook_points"].items()):
            for norm in (point["max_relative_norm"], point["mean_relative_norm"]):
                if not math.isfinite(norm):  # max() would lose a NaN.
                    raise NotApplied(f"at {name} the edit is {norm} times as long as what it edits")
        points = merge(proofs)["hook_points"]
    return {
        **requested(steered),
        **({"status": "applied"} if steered.killed is None else _killed(steered.killed)),
        **{count: max((point[count] for point in points.values()), default=0) for count in COUNTS},
        **combined(points.values()),
        "hook_points": points,
    }


def failed_open(steered: Steered, reason: str) -> dict[str, Any]:
    """The object of a reply that was not steered as asked, to a caller who wants it all the same."""
    return {**requested(steered), "status": "failed_open", "reason": reason}
