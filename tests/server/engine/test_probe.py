"""A probe reads what it is asked for, all of it, and says when it could not."""

import json
from typing import Any

import pytest
import torch

from tests.bundles import random_bundle
from trimtab.server.engine.edit_state import EditState
from trimtab.server.engine.probe import MAX_KEPT, wire
from trimtab.server.engine.tables import Tables

BUNDLE = random_bundle()
LAYER = BUNDLE.header.layer


@pytest.fixture
def state() -> EditState:
    tables = Tables(torch.device("cpu"), 8)
    tables.load(BUNDLE)
    return EditState([0, LAYER], tables)


def stream(n: int) -> Any:
    return torch.randn(n, BUNDLE.header.model.d_model, generator=torch.Generator().manual_seed(0))


def test_a_prompt_in_chunks_is_read_as_a_whole(state: EditState) -> None:
    h_PD = stream(5)
    probe_id, text = wire(BUNDLE.content_hash, LAYER, 2)
    state.probes.arrive("r", text, 5)
    for first, last in ((0, 3), (3, 5), (5, 6)):  # the last step runs a token of the completion
        state.prepare(["other", "r"], [7, first], [2, last - first])
        rows = torch.cat([torch.ones(2, h_PD.shape[1]), stream(6)[first:last] if last > 5 else h_PD[first:last]])
        half = rows / 2
        state.run(LAYER, half, half.clone())
        state.run(0, rows, None)
    found: Any = state.probes.take(probe_id)
    wanted = torch.relu(h_PD @ torch.from_numpy(BUNDLE.encoder).T)
    values, indices = torch.topk(wanted, 2)
    assert torch.allclose(torch.tensor(found["activations"]), values, atol=1e-6)
    assert found["rows"] == torch.where(values > 0, indices, -1).tolist()
    assert state.probes.take(probe_id) is None


def test_a_position_that_was_not_run_is_told(state: EditState) -> None:
    probe_id, text = wire(BUNDLE.content_hash, LAYER, 2)
    state.probes.arrive("r", text, 4)
    state.prepare(["r"], [2], [2])
    state.run(LAYER, stream(2), None)
    assert state.probes.take(probe_id) == "2 of 4 positions were not run"


@pytest.mark.parametrize(
    ("bundle", "layer", "said"), [("sha256:0", LAYER, "not loaded"), (BUNDLE.content_hash, 2, "not hooked")]
)
def test_what_cannot_be_read_is_told(state: EditState, bundle: str, layer: int, said: str) -> None:
    probe_id, text = wire(bundle, layer, 2)
    state.probes.arrive("r", text, 1)
    state.prepare(["r"], [0], [1])
    assert state.probes.step == {}
    assert said in str(state.probes.take(probe_id))


def test_what_a_probe_raises_is_told_and_stays_out_of_the_engine(state: EditState) -> None:
    probe_id, text = wire(BUNDLE.content_hash, LAYER, 2)
    state.probes.arrive("r", text, 1)
    state.prepare(["r"], [0], [1])
    state.run(LAYER, torch.zeros(1, 99), None)
    assert "raised" in str(state.probes.take(probe_id))


def test_a_step_without_probes_reads_nothing(state: EditState) -> None:
    state.probes.arrive("r", wire(BUNDLE.content_hash, LAYER, 2)[1], 3)
    state.prepare(["other"], [0], [3])
    assert state.probes.step == {}
    state.prepare(["r"], [0], [3])
    assert list(state.probes.step) == [LAYER]
    state.finish(["r"])
    state.prepare(["r"], [0], [3])
    assert state.probes.step == {}
    state.prepare(["r"], [0], [3])
    state.idle()
    assert state.probes.step == {}


def test_readings_that_nobody_takes_are_bounded(state: EditState) -> None:
    ids = []
    for i in range(MAX_KEPT + 1):
        probe_id, text = wire(BUNDLE.content_hash, LAYER, 1)
        assert json.loads(text)["id"] == probe_id
        ids.append(probe_id)
        state.probes.arrive(str(i), text, 1)
    assert state.probes.take(ids[0]) is None
    assert state.probes.take(ids[1]) is not None
