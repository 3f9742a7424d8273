"""The sequences as units came in."""

import numpy as np
import pytest

from tests.server.experiments.examples import experiment
from trimtab.server.experiments.looks import looks
from trimtab.server.experiments.sample import Units


def sample(n: int) -> tuple[Units, list[str]]:
    rng = np.random.default_rng(0)
    arm_U = rng.choice(3, n, p=[0.4, 0.4, 0.2])
    harm = (rng.random(n) < np.array([0.4, 0.2, 0.4])[arm_U]).astype(float)
    all_U = np.ones(n, bool)
    return Units(arm_U, all_U, all_U, {"harm": harm}), [f"2026-11-25T12:{i // 60:02}:{i % 60:02}Z" for i in range(n)]


def test_a_sequence_begins_with_enough_units_narrows_and_ends_with_the_results() -> None:
    units, at = sample(2000)
    found = looks(experiment(), units, at, 20)
    widths = [look.effects[0].high - look.effects[0].low for look in found]
    assert np.isinf(widths[0])
    finite = [width for width in widths if np.isfinite(width)]
    assert finite == sorted(finite, reverse=True)
    assert (found[-1].n_units, found[-1].at) == (units.counts(3), at[-1])
    assert [sum(look.n_units) for look in found] == [100 * (k + 1) for k in range(20)]


def test_units_are_taken_in_the_order_of_their_enrolment_whatever_that_of_the_rows() -> None:
    units, at = sample(300)
    order = np.random.default_rng(1).permutation(300)
    shuffled = Units(
        units.arm_U[order], units.triggered_U[order], units.complied_U[order], {"harm": units.outcomes["harm"][order]}
    )
    found, sorted_ = looks(experiment(), shuffled, [at[i] for i in order], 7), looks(experiment(), units, at, 7)
    assert [look[:2] for look in found] == [look[:2] for look in sorted_]
    assert [look.effects[0].estimate for look in found] == pytest.approx([look.effects[0].estimate for look in sorted_])


def test_fewer_units_than_looks_are_as_many_looks_and_nobody_is_none() -> None:
    units, at = sample(5)
    assert len(looks(experiment(), units, at, 30)) == 5
    assert looks(experiment(), *sample(0), 30) == ()
