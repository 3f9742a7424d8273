"""Only layers whose return value was verified are hooked."""

import pytest
from torch import nn

from trimtab.server.engine.layers import KINDS, elsewhere, find
from trimtab.server.errors import Unsupported


def stack(*layers: nn.Module) -> nn.Module:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(layers)
    return model


class Known(nn.Module):
    pass


class PPMissingLayer(nn.Module):
    pass


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, f"{__name__}.Known", "pair")


def test_hook_points_carry_the_global_index_of_the_layers_that_this_rank_owns() -> None:
    model = stack(PPMissingLayer(), Known(), Known())
    assert [(point.layer, point.kind) for point in find(model)] == [(1, "pair"), (2, "pair")]
    assert elsewhere(model) == [0]


def test_a_pipeline_stage_may_own_none_of_the_steerable_layers() -> None:
    assert find(stack(PPMissingLayer(), Known()), [0]) == []


def test_steerable_layers_can_be_restricted() -> None:
    assert [point.layer for point in find(stack(Known(), Known(), Known()), [2])] == [2]


def test_an_unknown_class_is_refused_with_the_way_to_add_it() -> None:
    with pytest.raises(Unsupported, match=r"torch\.nn\.modules\.linear\.Linear.*engine/layers\.py"):
        find(stack(nn.Linear(1, 1)))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(Unsupported, match="no single stack"):
        find(nn.Linear(1, 1))


def test_layers_outside_the_model_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"\[9\]"):
        find(stack(Known()), [9])
