"""What a CUDA graph will run, run on the host: the reference formula on edited rows, bit for bit nothing on the others."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.bundles import random_bundle
from trimtab.attribution.edit import Rows, delta
from trimtab.server.engine import buffers, kernel_torch
from trimtab.server.engine.buffers import MAX_ROWS
from trimtab.server.engine.device_path import DevicePath
from trimtab.server.engine.device_slots import Span
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
    found = Tables(CPU, 8, fold=False)
    for bundle in BUNDLES.values():
        found.load(bundle)
    return found


def fresh(layers: Sequence[int] = (0, 1, 2), n_slots: int = 8) -> DevicePath:
    return DevicePath(layers, D, n_slots, N_ROWS, TABLES.row, torch.zeros(N_ROWS, dtype=torch.int32))


def spans(found: Tables) -> list[Span]:
    segments = [p.segments(5)[0] for p in PLANS]
    return [Span(s.key, found.slot(s), 3 * i + 1, 3 * i + 3) for i, s in enumerate(segments)]


TABLES = tables()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layer", [1, 2])
def test_edited_rows_are_the_reference_and_others_are_untouched(residual: bool, layer: int) -> None:
    path, found = fresh(), spans(TABLES)
    path.write(found)
    g = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, 12, D, generator=g)
    h, before, expected = hidden + other if residual else hidden.clone(), hidden.clone(), hidden.clone()
    for span in found:
        rows = span.slot.get(layer)
        if rows is not None:
            at = slice(span.start, span.stop)
            expected[at] += delta(h[at], Rows.concat([TABLES.row(row) for row in rows.rows]))
    path.apply(layer, hidden, other if residual else None)
    torch.testing.assert_close(hidden, expected)
    edited = torch.zeros(12, dtype=torch.bool)
    for span in found:
        edited[span.start : span.stop] = True
    assert torch.equal(hidden[~edited], before[~edited])


def test_a_layer_that_was_not_run_shows_in_its_ratios() -> None:
    path, found = fresh(), spans(TABLES)
    path.write(found)
    path.apply(1, torch.randn(12, D), None)
    pieces = [Piece(SlotRows(None, None), span.start, span.stop) for span in found]
    ratios = path.found({1: pieces, 2: pieces}, flags=False)().ratios
    assert (np.asarray(ratios[1]) >= 0).all()
    assert (np.asarray(ratios[2]) == -1).all()


def test_an_idle_step_after_a_steered_one_edits_nothing() -> None:
    path = fresh()
    path.write(spans(TABLES))
    path.write(())
    hidden = torch.randn(12, D)
    before = hidden.clone()
    path.apply(1, hidden, None)
    assert torch.equal(hidden, before)


def test_a_step_without_edits_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = fresh()
    launched: list[int] = []
    monkeypatch.setattr(kernel_torch, "launch", lambda buffers, i, hidden, residual: launched.append(i))
    hidden = torch.randn(12, D)
    path.write(())
    path.apply(1, hidden, None)
    assert (path.armed, launched) == (False, [])
    path.write(spans(TABLES))
    for layer in (0, 1, 2):
        path.apply(layer, hidden, None)
    assert (path.armed, launched) == (True, [1, 2])  # no plan edits layer 0


def test_a_capture_launches_at_every_layer_or_at_none(monkeypatch: pytest.MonkeyPatch) -> None:
    path = fresh()
    launched: list[int] = []
    monkeypatch.setattr(kernel_torch, "launch", lambda buffers, i, hidden, residual: launched.append(i))
    hidden = torch.randn(12, D)
    path.capturing = True
    for layer in (0, 1, 2):
        path.apply(layer, hidden, None)
    assert launched == [0, 1, 2]
    path.write(spans(TABLES))
    path.capturing = False
    path.apply(1, hidden, None)
    assert launched == [0, 1, 2]


@pytest.mark.parametrize("shape", [(12, D + 1), (N_ROWS + 1, D)])
def test_a_stream_of_another_shape_is_an_error(shape: tuple[int, int]) -> None:
    path = fresh()
    path.write(spans(TABLES))
    with pytest.raises(ValueError, match="not what was hooked"):
        path.apply(1, torch.randn(shape), None)


def test_a_slot_that_does_not_fit_is_told() -> None:
    row = PLANS[0].rows[0]
    many = {1: SlotRows(None, None, tuple(row._replace(alpha=float(i + 1)) for i in range(MAX_ROWS + 1)))}
    assert "at most 64 fit" in (fresh().slots.misfit(Span("s", many, 0, 1)) or "")
    slots = fresh(n_slots=2).slots
    one = {1: SlotRows(None, None, (row,))}
    fits = [slots.misfit(Span(key, one, 0, 1)) is None for key in ("a", "b", "a", "c")]
    assert fits == [True, True, True, False]


def test_a_full_pool_is_begun_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the formula come and go with requests; the pool holds those of one step at least."""
    monkeypatch.setattr(buffers, "POOL", 4)
    path = fresh()
    for latent in (7, 8, 9, 7):
        for layer, name in ((1, "calm"), (2, "kind")):
            segment = plan(edit("add", name, latent, amount=1.0)).segments(5)[0]
            slot = TABLES.slot(segment)
            span = Span(segment.key, slot, 0, 2)
            assert path.slots.misfit(span) is None
            path.write([span])
            hidden = torch.zeros(2, D)
            path.apply(layer, hidden, None)
            row = BUNDLES[name].decoder[BUNDLES[name].row_of[latent]]
            torch.testing.assert_close(hidden[0], torch.from_numpy(row))
