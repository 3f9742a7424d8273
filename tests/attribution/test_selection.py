"""Selection: live latents, no near-duplicates, a matched control."""

import pytest
import torch

from trimtab.attribution.errors import SelectionError
from trimtab.attribution.selection import leading, random_live

D = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]])
SCORE = torch.tensor([5.0, 4.0, 3.0, 2.0, -1.0])


def test_duplicates_and_dead_latents_are_passed_over() -> None:
    live = torch.tensor([True, True, False, True, True])
    assert leading(SCORE, live, D, 2) == [0, 3]


def test_fewer_live_latents_than_asked_are_all_there_is() -> None:
    assert leading(SCORE, torch.tensor([False, False, True, True, False]), D, 10) == [2, 3]


def test_opposite_directions_are_no_duplicates() -> None:
    assert leading(SCORE, torch.ones(5, dtype=torch.bool), D, 3, max_cosine=0.9) == [0, 2, 3]


def test_no_live_latent_is_an_error() -> None:
    with pytest.raises(SelectionError, match="no latent fires"):
        leading(SCORE, torch.zeros(5, dtype=torch.bool), D, 3)


def test_the_control_is_live_matched_in_activity_and_not_the_chosen() -> None:
    live = torch.ones(100, dtype=torch.bool)
    live[50:] = False
    activity = torch.arange(100.0)
    control = random_live(live, [40, 41], activity, 10)
    assert len(set(control)) == 10
    assert {40, 41}.isdisjoint(control)
    assert all(20 <= latent < 50 for latent in control)
    assert control == random_live(live, [40, 41], activity, 10)
