"""The parts of a trial that need no server: arms, doses, and the choice."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from tests.bundles import random_bundle
from trimtab.attribution.graders import Grade
from trimtab.attribution.prompts import Prompt
from trimtab.attribution.trial.arms import UNSTEERED, Arm, arms_of, chosen_arm
from trimtab.attribution.trial.cells import Cell, Outcome
from trimtab.attribution.trial.choice import choose
from trimtab.attribution.trial.doses import Dose, Estimate, Limits, doses, sign_flip_p, strength_range
from trimtab.attribution.trial.endpoint import Reply
from trimtab.attribution.trial.forced import Shift, as_given
from trimtab.client import Latent

PROMPTS = [Prompt(None, (("user", f"Question {i}?"),)) for i in range(4)]
STEERED = Arm("latent 7", (Latent("calm", 7).ablate(),), latent=7)


def outcome(
    arm: Arm, strength: float, prompt: Prompt, verdict: str, *, nats: float = 1.0, neutral: bool = False
) -> Outcome:
    ids = [1, 2, 3, 4, 5]
    grade = None if verdict == "incoherent" or neutral else Grade(verdict)  # type: ignore[arg-type]
    return Outcome(Cell(arm, strength, prompt, 0, neutral), Reply("t", [0], ids, True, 0.1, 0), grade, nats)


def dose(strength: float, safe: bool) -> Dose:
    e = Estimate(0, 0, 0, 0)
    return Dose("a", None, strength, 2, 2, 0.5, 0.5, 0.0, e, 1.0, e, 0.0, None, None, 0.1, safe)


def test_the_arms_of_a_bundle() -> None:
    bundle = random_bundle()
    arms = {arm.name: arm for arm in arms_of(bundle, [random_bundle(name="other")], "Be honest.")}
    assert list(arms) == [
        "unsteered",
        "latent 7",
        "latent 8",
        "latent 9",
        "together",
        "minus mean",
        "rival other",
        "system message",
    ]
    assert [edit.operation for edit in arms["latent 8"].edits] == ["ablate"]  # its own recommended edit
    assert [edit.operation for edit in arms["latent 9"].edits] == ["add"]  # has none: like the first
    assert len(arms["together"].edits) == 2
    assert (arms["unsteered"].steering(1.0), arms["system message"].steering(1.0)) == (None, None)
    assert [edit.latent for edit in chosen_arm(list(arms.values()), [9, 7]).edits] == [9, 7]
    assert arms["minus mean"].edits[0].value == -1.0


def test_an_arm_leaves_special_tokens_alone_where_its_edit_does() -> None:
    """They were edited: what was tried was not what the bundle recommends."""
    edits = tuple(edit.model_copy(update={"exclude_special": True}) for edit in random_bundle().header.edits)
    steered = [arm for arm in arms_of(random_bundle(edits=edits)) if arm.edits]
    assert len(steered) == 5
    assert all(edit.exclude_special for arm in steered for edit in arm.edits)


def test_a_dose_is_held_against_the_same_prompts_unsteered() -> None:
    outcomes = []
    for prompt, before, after in zip(PROMPTS, "ssls", "lsll", strict=True):
        name = {"s": "shows", "l": "lacks"}
        outcomes += [
            outcome(UNSTEERED, 0.0, prompt, name[before]),
            outcome(STEERED, 1.0, prompt, name[after], nats=1.25),
        ]
    base, steered = doses(outcomes, Limits())
    assert (base.shows, base.effect.mean, base.safe) == (0.75, 0.0, True)
    assert (steered.shows, steered.effect.mean) == (0.25, -0.5)
    assert steered.effect.se == pytest.approx(np.std([-1, 0, 0, -1], ddof=1) / 2)
    assert (steered.nats.mean, steered.safe, steered.latent) == (0.25, True, 7)
    assert steered.p == 0.5  # two prompts moved, both one way: 2 of 4 sign patterns are as extreme


def test_incoherent_replies_show_nothing_and_are_not_safe() -> None:
    outcomes = [outcome(UNSTEERED, 0.0, p, "shows") for p in PROMPTS]
    outcomes += [outcome(STEERED, 4.0, p, "incoherent") for p in PROMPTS]
    _, broken = doses(outcomes, Limits())
    assert (broken.shows, broken.incoherent, broken.safe) == (0.0, 1.0, False)


def test_side_effects_are_those_on_neutral_prompts() -> None:
    outcomes = [outcome(a, s, p, "shows") for a, s in ((UNSTEERED, 0.0), (STEERED, 1.0)) for p in PROMPTS]
    outcomes += [outcome(UNSTEERED, 0.0, PROMPTS[0], "", neutral=True)]
    outcomes += [outcome(STEERED, 1.0, PROMPTS[0], "", neutral=True, nats=3.0)]
    _, steered = doses(outcomes, Limits())
    assert (steered.neutral_changed, steered.neutral_nats, steered.safe) == (0.0, 2.0, False)


@pytest.mark.parametrize(
    ("safe", "expected"),
    [
        ({-2: True, -1: True, 1: True, 2: False, 4: True}, (-2, 1)),
        ({-1: False, 1: True}, (0, 1)),
        ({-1: False, 1: False, 2: True}, None),
    ],
)
def test_the_safe_range_stops_at_the_first_strength_that_is_not(
    safe: dict[float, bool], expected: tuple[float, float] | None
) -> None:
    assert strength_range([dose(s, is_safe) for s, is_safe in safe.items()]) == expected


def test_the_sign_flip_is_exact_for_few_prompts_and_near_it_for_many() -> None:
    values = [0.3, -0.1, 0.4, 0.2, 0.25]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((-1, 1), repeat=5)
    ]
    assert sign_flip_p(values) == sum(s >= abs(sum(values)) - 1e-12 for s in sums) / 32
    assert sign_flip_p([0.0, 0.0]) == 1.0
    many = np.random.default_rng(0).normal(0.1, 1.0, 60)
    assert sign_flip_p(many) == pytest.approx(
        float(__import__("scipy.stats").stats.ttest_1samp(many, 0).pvalue), abs=0.02
    )


def test_the_interval_over_prompts_covers_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = [abs((e := Estimate.of(rng.normal(0, 1, 12))).mean) <= e.high - e.mean for _ in range(2000)]
    assert 0.935 < float(np.mean(covered)) < 0.965


def known_effects(
    effects: dict[int, float], rng: np.random.Generator, *, redundant: tuple[int, int] | None = None
) -> object:
    """`shifts` of a world in which effects add up, but for two latents that do the same thing."""
    noise = {latent: rng.normal(0, 0.02, 20) for latent in effects}

    def shifts(sets: Sequence[tuple[int, ...]]) -> list[Shift]:
        found = []
        for latents in sets:
            counted = [x for x in latents if not (redundant and x == redundant[1] and redundant[0] in latents)]
            margin_P = sum((effects[x] + noise[x] for x in counted), np.zeros(20))
            found.append(Shift(margin_P, np.full(20, 0.1 * len(latents))))
        return found

    return shifts


def test_the_choice_takes_what_adds_and_leaves_what_repeats_or_does_nothing() -> None:
    effects = {1: -0.30, 2: -0.20, 3: -0.28, 4: 0.0, 5: 0.2}
    shifts = known_effects(effects, np.random.default_rng(0), redundant=(1, 3))
    choice = choose(list(effects), shifts, max_size=8, max_damage=1.0)  # type: ignore[arg-type]
    assert choice.latents == (1, 2)
    assert [c.latent for c in choice.candidates if c.takes_part] == [1, 2, 3]
    assert "no further edit adds more than chance" in choice.ended
    assert choice.steps[1].margin.mean == pytest.approx(-0.5, abs=0.02)


def test_the_choice_stops_at_what_honest_replies_may_cost() -> None:
    effects = dict.fromkeys(range(6), -0.3)
    choice = choose(list(effects), known_effects(effects, np.random.default_rng(0)), max_size=8, max_damage=0.25)  # type: ignore[arg-type]
    assert len(choice.steps) == 2
    assert "costs the honest completions more than 0.25" in choice.ended


def test_nothing_is_chosen_where_nothing_works() -> None:
    effects = dict.fromkeys(range(40), 0.0)
    choice = choose(list(effects), known_effects(effects, np.random.default_rng(3)), max_size=8, max_damage=1.0)  # type: ignore[arg-type]
    assert (choice.latents, choice.ended) == ((), "no candidate has an effect of its own")


@pytest.mark.parametrize(
    ("tokens", "scope"),
    [
        ("completion", {"tokens": "prompt", "window": {"origin": "start", "start": 9}}),
        ("prompt", {"tokens": "prompt", "window": {"origin": "start", "stop": 9}}),
        ("all", {"tokens": "prompt"}),
    ],
)
def test_a_given_completion_is_edited_where_a_written_one_would_be(tokens: str, scope: object) -> None:
    edit = as_given(Latent("calm", 7).ablate().during(tokens), 10)  # type: ignore[arg-type]
    assert edit.to_dict()["scope"] == scope
