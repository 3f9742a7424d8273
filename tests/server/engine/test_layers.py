"""Only layers whose return value was verified are hooked."""

from typing import Any

import pytest
import torch
from torch import nn

from trimtab.server.engine import layers
from trimtab.server.engine.kinds import KINDS, NOT_ONE_STREAM
from trimtab.server.engine.layers import decoder_layers, elsewhere, find, unlisted
from trimtab.server.errors import Unsupported

KNOWN = f"{__name__}.Known"


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
    monkeypatch.setitem(KINDS, KNOWN, "pair")


def test_hook_points_carry_the_global_index_of_the_layers_that_this_rank_owns() -> None:
    model = stack(PPMissingLayer(), Known(), Known())
    assert [(point.layer, point.kind) for point in find(model)] == [(1, "pair"), (2, "pair")]
    assert elsewhere(model) == [0]


def test_a_pipeline_stage_may_own_none_of_the_steerable_layers() -> None:
    assert find(stack(PPMissingLayer(), Known()), [0]) == []


def test_steerable_layers_can_be_restricted() -> None:
    assert [point.layer for point in find(stack(Known(), Known(), Known()), [2])] == [2]


def test_an_unknown_class_is_refused_with_the_way_to_add_it() -> None:
    with pytest.raises(Unsupported, match=r"torch\.nn\.modules\.linear\.Linear.*docs/architectures\.md"):
        find(stack(nn.Linear(1, 1)))
    assert unlisted(stack(Known(), nn.Linear(1, 1))) == ["torch.nn.modules.linear.Linear"]


def test_a_declared_class_is_hooked_as_declared_and_a_listed_one_as_listed() -> None:
    declared: dict[str, Any] = {"torch.nn.modules.linear.Linear": "single", KNOWN: "single"}
    points = find(stack(Known(), nn.Linear(1, 1)), declared=declared)
    assert [point.kind for point in points] == ["pair", "single"]


def test_a_kind_that_does_not_exist_is_refused() -> None:
    declared: dict[str, Any] = {"torch.nn.modules.linear.Linear": "pears"}
    with pytest.raises(Unsupported, match=r"'pears'.*is none of pair, single, decoy, alone, batched"):
        find(stack(nn.Linear(1, 1)), declared=declared)


def test_layers_of_several_streams_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KINDS, KNOWN)
    monkeypatch.setitem(NOT_ONE_STREAM, KNOWN, "it has two")
    with pytest.raises(Unsupported, match="cannot be steered: it has two"):
        find(stack(Known()))


def test_a_stream_that_is_scaled_in_fp16_is_refused_in_fp16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SCALED_IN_FP16", {KNOWN})
    with pytest.raises(Unsupported, match="--dtype bfloat16"):
        find(stack(Known()), dtype=torch.float16)
    assert len(find(stack(Known()), dtype=torch.bfloat16)) == 1


@pytest.mark.parametrize("mark", ["use_sequence_parallel_moe", "use_attn_reduce_scatter_for_moe"])
def test_a_stream_that_is_scattered_over_the_ranks_is_refused(mark: str) -> None:
    layer: Any = Known()
    setattr(layer, mark, False)
    assert len(find(stack(layer))) == 1
    setattr(layer, mark, True)
    with pytest.raises(Unsupported, match="--enable-expert-parallel"):
        find(stack(layer))


def test_the_layers_of_a_multimodal_model_are_those_of_its_language_model() -> None:
    model: Any = nn.Module()
    model.vision, model.language = stack(nn.Linear(1, 1)), stack(Known(), Known())
    model.get_language_model = lambda: model.language
    assert [layer for layer, _ in decoder_layers(model)] == [0, 1]
    assert unlisted(model) == []


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(Unsupported, match="no single stack"):
        find(nn.Linear(1, 1))


def test_layers_outside_the_model_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"\[9\]"):
        find(stack(Known()), [9])
