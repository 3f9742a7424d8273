"""Writes golden.json: one small data set, and what published implementations say of it. None can stand beside this project's
NumPy, so each is read from a folder of its own. GrowthBook's engine is newer in its repository than on PyPI: one-sided sequences
and power are there alone.

    pip install --target A gbstats==0.8.0 ssrm-test==0.1.5 && rm A/typing.py
    pip install --target B tea-tasting==1.14.0
    git clone https://github.com/growthbook/growthbook C && git -C C checkout 8f1db4456915a8e7b7faf23d5632ca7219d2f469
    PYTHONPATH=A python tests/server/experiments/golden/write.py growthbook && \
    PYTHONPATH=B python tests/server/experiments/golden/write.py tea-tasting && \
    PYTHONPATH=C/packages/stats:A python tests/server/experiments/golden/write.py growthbook-repository
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("golden.json")


def data() -> dict[str, list[list[float]]]:
    """Two arms: a covariate x, an outcome y, a numerator and a denominator."""
    rng, out = np.random.default_rng(20261124), dict[str, list[list[float]]](x=[], y=[], num=[], den=[])
    for arm, n in enumerate((60, 70)):
        x, den = rng.gamma(2.0, 1.5, n), 1.0 + rng.poisson(3.0, n)
        y = 0.8 * x + rng.normal(0.4 * arm, 1.0, n)
        num = rng.binomial(den.astype(int), 0.3 + 0.1 * arm)
        for key, values in (("x", x.round(4)), ("y", y.round(4)), ("num", num), ("den", den)):
            out[key].append([float(value) for value in values])
    return out


def growthbook(d: dict[str, list[list[float]]]) -> dict[str, Any]:
    """GrowthBook's engine (eq. 9 and its p-value) and Optimizely's sample-ratio test."""
    np.Inf = np.inf  # type: ignore[attr-defined]  # ssrm-test was written for NumPy 1
    from gbstats.frequentist.tests import (
        SequentialConfig,
        SequentialTwoSidedTTest,
    )
    from gbstats.models.statistics import (
        RatioStatistic,
        RegressionAdjustedStatistic,
        SampleMeanStatistic,
    )
    from ssrm_test.ssrm_test import sequential_p_values

    def mean(v: Any) -> Any:
        v = np.asarray(v)
        return SampleMeanStatistic(n=len(v), sum=float(v.sum()), sum_squares=float(v @ v))

    def ratio(i: int) -> Any:
        products = float(np.dot(d["num"][i], d["den"][i]))
        return RatioStatistic(
            n=len(d["num"][i]),
            m_statistic=mean(d["num"][i]),
            d_statistic=mean(d["den"][i]),
            m_d_sum_of_products=products,
        )

    def adjusted(i: int) -> Any:
        y, x = d["y"][i], d["x"][i]
        return RegressionAdjustedStatistic(
            n=len(y),
            post_statistic=mean(y),
            pre_statistic=mean(x),
            post_pre_sum_of_products=float(np.dot(y, x)),
            theta=0.0,  # the test takes its own, over both arms
        )

    def compared(of: Any) -> dict[str, float]:
        test = SequentialTwoSidedTTest(
            of(0), of(1), SequentialConfig(difference_type="absolute", traffic_proportion_b=1, phase_length_days=1)
        )
        found = test.compute_result()
        low, high = (float(end) for end in found.ci)
        return {"estimate": float(found.expected), "low": low, "high": high, "p": float(found.p_value)}

    counts = [[530, 470], [510, 490], [560, 440], [540, 460]]
    return {
        "mean": compared(lambda i: mean(d["y"][i])),
        "ratio": compared(ratio),
        "adjusted": compared(adjusted),
        "sample_ratio": {
            "counts": counts,
            "p": [float(p) for p in sequential_p_values(np.array(counts), np.array([0.5, 0.5]))],
        },
    }


def growthbook_repository(d: dict[str, list[list[float]]]) -> dict[str, Any]:
    """The bounds of one-sided sequences, each way; the power for an effect of 0.5, at these units and at ten times as many."""
    from gbstats.frequentist.tests import (
        FrequentistTestResult,
        SequentialConfig,
        SequentialOneSidedTreatmentGreaterTTest,
        SequentialOneSidedTreatmentLesserTTest,
        SequentialTwoSidedTTest,
    )
    from gbstats.models.statistics import SampleMeanStatistic
    from gbstats.power.midexperimentpower import MidExperimentPower, MidExperimentPowerConfig

    arms = []
    for values in d["y"]:
        v = np.array(values)
        arms.append(SampleMeanStatistic(n=len(v), sum=float(v.sum()), sum_squares=float(v @ v)))
    config = SequentialConfig(difference_type="absolute")
    greater = SequentialOneSidedTreatmentGreaterTTest([tuple(arms)], config)
    lesser = SequentialOneSidedTreatmentLesserTTest([tuple(arms)], config)
    both = SequentialTwoSidedTTest([tuple(arms)], config)
    found: FrequentistTestResult = both.compute_result()
    power = MidExperimentPower(
        both.moments_result, found, config, MidExperimentPowerConfig(target_mde=0.5, prior_effect=None, sequential=True)
    )
    return {
        "low": float(greater.confidence_interval[0]),
        "high": float(lesser.confidence_interval[1]),
        "power": [power.power(0), power.power(9)],
    }


def tea_tasting(d: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Fixed-horizon means, ratios and CUPED of tea-tasting: estimates and standard errors."""
    import pyarrow as pa
    import tea_tasting as tt

    table = pa.table({"variant": [0] * 60 + [1] * 70, **{key: arms[0] + arms[1] for key, arms in d.items()}})
    metrics = {"mean": tt.Mean("y"), "ratio": tt.RatioOfMeans("num", "den"), "adjusted": tt.Mean("y", "x")}
    results = tt.Experiment(metrics).analyze(table)
    family = {f"m{i}": tt.Mean(key) for i, key in enumerate(d)}
    corrected = tt.adjust_fwer(tt.Experiment(family).analyze(table), arbitrary_dependence=True, method="bonferroni")
    return {
        key: {
            "estimate": float(results[key].effect_size),
            "error": float(results[key].effect_size / results[key].statistic),
        }
        for key in metrics
    } | {
        "holm": [[float(row[name]) for row in corrected.to_dicts()] for name in ("pvalue", "pvalue_adj")],
    }


if __name__ == "__main__":
    golden = json.loads(FILE.read_text()) if FILE.exists() else {"data": data()}
    match sys.argv[1]:
        case "growthbook":
            golden["growthbook"] = growthbook(golden["data"])
        case "tea-tasting":
            golden["tea_tasting"] = tea_tasting(golden["data"])
        case "growthbook-repository":
            golden["growthbook_repository"] = growthbook_repository(golden["data"])
    FILE.write_text(json.dumps(golden) + "\n")
