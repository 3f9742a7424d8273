"""Whole experiments through `analyse` itself: three arms, five metrics, a gate, a covariate, 40 looks at each.

In an A/A every conclusion is an error. The guardrail's harm is put exactly on its margin, where both of its conclusions err most.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.monte_carlo.watched import LOOKS
from trimtab.server.experiments.analysis import Results, analyse
from trimtab.server.experiments.definition import Experiment, parse_experiment
from trimtab.server.experiments.sample import Units

__all__ = ["ERRORS", "errors"]

PER_LOOK = 150
"""New units between two looks, all arms together."""
MARGIN = 0.05
SECONDARY = ("length", "turns", "calls")

ERRORS = {
    "verdict": "a verdict on the primary metric, in either arm",
    "triggered": "the same among the triggered units alone",
    "secondary": "any of three secondary metrics, in either arm, by Holm's p",
    "breached": "a guardrail breached whose harm is its margin",
    "safe": "a guardrail safe whose harm is its margin",
    "sample_ratio": "a sample-ratio mismatch",
    "triggered_ratio": "a mismatch of the triggered units, in either arm",
    "uneven": "an outcome said to be reported unevenly",
}


def errors(n_runs: int, *, seed: int = 0) -> Iterator[Counter[str]]:
    """After each run, how many of the runs so far have ever erred, by kind of error."""
    found: Counter[str] = Counter()
    for run in range(n_runs):
        found.update(_ever(_experiment(), np.random.default_rng((seed, run))))
        yield found


def _experiment() -> Experiment:
    calm = {"bundle": "calm"}
    metrics = {key: {"key": key, "outcome": key} for key in SECONDARY}
    metrics["turns"] |= {"kind": "ratio", "denominator": "calls"}
    return parse_experiment(
        {
            "key": "aa",
            "hypothesis": "Nothing differs.",
            "arms": [{"key": key, "weight": w, "steering": calm} for key, w in (("a", 0.4), ("b", 0.4), ("c", 0.2))],
            "aa": True,
            "primary": {"key": "harm", "outcome": "harm", "kind": "proportion", "covariate": "harm"},
            "secondary": list(metrics.values()),
            "guardrails": [
                {"metric": {"key": "rude", "outcome": "rude", "direction": "decrease"}, "margin": MARGIN},
            ],
            "minimum_effect": 0.001,
        }
    )


def _ever(experiment: Experiment, rng: np.random.Generator) -> set[str]:
    n, weights = PER_LOOK * LOOKS, np.array([arm.weight for arm in experiment.arms])
    arm_U = rng.choice(3, n, p=weights)
    habit_U = rng.beta(2, 4, n)
    reported_U = rng.random(n) < 0.9

    def known(values: Any) -> Any:
        return np.where(reported_U, values, np.nan)

    units = Units(
        arm_U,
        rng.random(n) < 0.5,
        np.ones(n, bool),
        {
            "harm": known(rng.random(n) < habit_U),
            "rude": known(rng.random(n) < 0.1 + MARGIN * (arm_U > 0) / 0.9),
            "length": known(rng.lognormal(0, 1, n)),
            "turns": known(rng.poisson(2, n)),
            "calls": known(1.0 + rng.poisson(2, n)),
        },
        {"harm": np.where(rng.random(n) < 0.7, rng.random(n) < habit_U, np.nan)},
    )
    ever: set[str] = set()
    for look in range(PER_LOOK, n + 1, PER_LOOK):
        so_far = units.of(np.arange(n) < look)
        counts = [so_far.counts(3)]
        ever |= _wrong(experiment, analyse(experiment, so_far, counts_EK=counts, shares_EK=[weights]))
    return ever


def _wrong(experiment: Experiment, found: Results) -> set[str]:
    """What is concluded, all of it wrongly."""
    wrong = {
        "verdict": any(
            one.low > 0 or one.high < 0
            for one in found.effects
            if one.metric == "harm" and one.population == "intent_to_treat"
        ),
        "triggered": any(
            one.low > 0 or one.high < 0
            for one in found.effects
            if one.metric == "harm" and one.population == "triggered"
        ),
        "secondary": any(
            one.p <= experiment.alpha
            for one in found.effects
            if one.metric in SECONDARY and one.population == "intent_to_treat"
        ),
        "breached": found.guardrails[0].state == "breached",
        "safe": found.guardrails[0].state == "safe",
        "sample_ratio": found.sample_ratio_p <= 0.01,
        "triggered_ratio": any(p <= 0.01 for p in found.triggered_ratio_p.values()),
        "uneven": any("is reported of" in note for note in found.notes),
    }
    return {name for name, is_so in wrong.items() if is_so}
