"""The operator is one opaque node that edits a layer's output in place, in eager mode and in a compiled graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.bundles import random_bundle
from trimtab.server.engine import op, probe
from trimtab.server.engine.edit_state import EditState
from trimtab.server.engine.kinds import Kind
from trimtab.server.engine.layers import HookPoint
from trimtab.server.engine.tables import Tables
from trimtab.server.plan import compile_plan
from trimtab.server.steering import parse_steering

pytestmark = pytest.mark.filterwarnings("ignore")
BUNDLE = random_bundle(layer=1)
D = BUNDLE.header.model.d_model
EDIT = {"bundle": "calm", "operation": "add", "latent": 7, "amount": 3.0}
PLAN = compile_plan(parse_steering({"edits": [EDIT]}), {"calm": BUNDLE})
CHANGE = 3.0 * torch.from_numpy(BUNDLE.decoder[0])


class Pair(nn.Module):
    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden * 2, residual + hidden


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pair(), Pair()])

    def forward(self, x: Tensor) -> Tensor:
        hidden, residual = x, torch.zeros_like(x)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual


@pytest.fixture
def state() -> Iterator[EditState]:
    op.define()
    tables = Tables(torch.device("cpu"), 3)
    tables.load(BUNDLE)
    found = EditState([0, 1], tables)
    op.bind(found)
    yield found
    op.bind(None)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_last_layer_is_edited_and_nothing_breaks_the_graph(state: EditState, compiled: bool) -> None:
    model = Model()
    x = torch.randn(5, D)
    plain = model(x)
    for layer, module in enumerate(model.layers):
        op.attach(HookPoint(layer, "pair", module))
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    torch.testing.assert_close(run(x), plain)
    state.arrive("r", PLAN.wire(), 3)
    state.prepare(["other", "r"], [0, 0], [2, 3])
    torch.testing.assert_close(run(x), plain + torch.tensor([0.0, 0, 0, 1, 1]).unsqueeze(1) * CHANGE)
    assert state.layers[0].calls == state.layers[1].calls == 2


@pytest.mark.parametrize(
    ("kind", "output"), [("single", "tensor"), ("decoy", "pair"), ("alone", "pair"), ("batched", "batch")]
)
def test_each_kind_of_layer_is_edited_in_its_stream(state: EditState, kind: Kind, output: str) -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"tensor": x.clone(), "pair": (x.clone(), None), "batch": x.clone()[None]}[output]

    layer = Layer()
    op.attach(HookPoint(1, kind, layer))
    state.arrive("r", PLAN.wire(), 3)
    state.prepare(["r"], [0], [3])
    x = torch.randn(3, D)
    edited = layer(x)
    h = edited if output == "tensor" else edited[0]  # The first of a pair, or of a batch of one.
    torch.testing.assert_close(h, x + torch.tensor([0.0, 1, 1]).unsqueeze(1) * CHANGE)


def test_a_decoy_does_not_read_its_stale_second(state: EditState) -> None:
    """Reading hidden + residual of such a layer would steer by another stream."""

    class Stale(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.clone(), torch.full_like(x, torch.nan)

    layer = Stale()
    op.attach(HookPoint(1, "decoy", layer))
    state.arrive("r", PLAN.wire(), 3)
    state.prepare(["r"], [0], [3])
    layer(torch.randn(3, D))
    assert state.collect()()["r"].failure is None


def test_where_python_runs_only_the_layers_of_a_step_have_hooks(state: EditState) -> None:
    model = Model()
    state.hooks = op.Hooks([HookPoint(layer, "pair", module) for layer, module in enumerate(model.layers)])

    def hooked() -> list[bool]:
        return [bool(module._forward_hooks) for module in model.layers]

    assert hooked() == [True, True]  # warming up, and the handshake, call them all
    state.prepare(["other"], [0], [2])
    assert hooked() == [False, False]
    state.arrive("r", PLAN.wire(), 3)
    x = torch.randn(5, D)
    for start in (0, 3):
        state.prepare(["other", "r"], [start, start], [2, 3])
        assert hooked() == [False, True]
        edited = model(x)
        assert state.collect()()["r"].failure is None
    state.finish(["r"])
    state.prepare(["other"], [5], [5])
    torch.testing.assert_close(model(x) - edited, torch.tensor([0.0, 0, -1, -1, -1]).unsqueeze(1) * CHANGE)
    state.idle()
    assert hooked() == [True, True]


def test_a_worker_rests_only_when_a_step_has_cleared_what_was(state: EditState) -> None:
    def prepared(*request_ids: str) -> bool:
        state.prepare(request_ids, [0] * len(request_ids), [3] * len(request_ids))
        state.collect()
        return state.rests

    assert not state.rests  # its hooks are everywhere yet
    assert prepared("other")
    state.arrive("r", PLAN.wire(), 3)
    assert not state.rests
    assert not prepared("other", "r")
    state.finish(["r"])
    assert not state.rests  # the layers still have the last step's work
    assert prepared("other")
    state.probes.arrive("probed", probe.wire("none", 1, 4)[1], 3)
    assert not state.rests
    state.finish(["probed"])
    assert prepared("other")
    state.idle()
    assert not state.rests
