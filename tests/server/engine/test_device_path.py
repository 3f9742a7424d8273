"""What a CUDA graph will run, run on the host: the reference formula on edited rows, bit for bit nothing on the others."""

from typing import Any

import pytest
import torch

from tests.bundles import random_bundle
from trimtab.attribution.edit import delta
from trimtab.server.engine.device_path import MAX_LATENTS, DevicePath, Span
from trimtab.server.engine.tables import SlotRows, Tables
from trimtab.server.engine.work import Piece
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

CPU = torch.device("cpu")
BUNDLES = {"calm": random_bundle(layer=1), "kind": random_bundle(name="kind", layer=2, seed=1)}
D, N_ROWS = 4, 16


def edit(operation: str, bundle: str = "calm", latent: int = 7, **fields: Any) -> dict[str, Any]:
    return {"bundle": bundle, "operation": operation, "latent": latent} | fields


def plan(*edits: dict[str, Any]) -> Plan:
    return compile_plan(parse_steering({"edits": list(edits)}), BUNDLES)


PLANS = (
    plan(edit("add", amount=2.0)),
    plan(edit("clamp", target=3.0), edit("ablate", latent=8), edit("scale", "kind", factor=4.0)),
    plan(edit("project"), edit("add", "kind", 9, amount=1.0)),
)


def tables() -> Tables:
    found = Tables(CPU, 8)
    for bundle in BUNDLES.values():
        found.load(bundle)
    return found


def spans(found: Tables) -> list[Span]:
    segments = [p.segments(5)[0] for p in PLANS]
    return [Span(s.key, found.slot(s), 3 * i + 1, 3 * i + 3) for i, s in enumerate(segments)]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layer", [1, 2])
def test_edited_rows_are_the_reference_and_others_are_untouched(residual: bool, layer: int) -> None:
    path, found = DevicePath([0, 1, 2], D, 8, N_ROWS, CPU), spans(tables())
    path.write(found)
    g = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, 12, D, generator=g)
    h, before, expected = hidden + other if residual else hidden.clone(), hidden.clone(), hidden.clone()
    for span in found:
        rows = span.slot.get(layer)
        if rows is not None:
            at = slice(span.start, span.stop)
            change = torch.zeros_like(h[at]) if rows.add_D is None else rows.add_D.expand_as(h[at]).clone()
            change += 0.0 if rows.latents is None else delta(h[at], rows.latents)
            expected[at] += change
    path.apply(layer, hidden, other if residual else None)
    torch.testing.assert_close(hidden, expected)
    edited = torch.zeros(12, dtype=torch.bool)
    for span in found:
        edited[span.start : span.stop] = True
    assert torch.equal(hidden[~edited], before[~edited])


def test_a_layer_that_was_not_run_shows_in_its_ratios() -> None:
    path, found = DevicePath([0, 1, 2], D, 8, N_ROWS, CPU), spans(tables())
    path.write(found)
    path.apply(1, torch.randn(12, D), None)
    pieces = [Piece(SlotRows(None, None), span.start, span.stop) for span in found]
    ratios = path.ratios({1: pieces, 2: pieces})()
    assert (ratios[1] >= 0).all()
    assert (ratios[2] == -1).all()


def test_an_idle_step_after_a_steered_one_edits_nothing() -> None:
    path = DevicePath([0, 1, 2], D, 8, N_ROWS, CPU)
    path.write(spans(tables()))
    path.write(())
    hidden = torch.randn(12, D)
    before = hidden.clone()
    path.apply(1, hidden, None)
    assert torch.equal(hidden, before)


def test_a_slot_that_does_not_fit_is_told() -> None:
    path = DevicePath([1], D, 8, N_ROWS, CPU)
    slot = {1: SlotRows(None, None, tuple(("b", "latent", i) for i in range(MAX_LATENTS + 1)))}
    assert "at most 16" in (path.misfit(slot) or "")
