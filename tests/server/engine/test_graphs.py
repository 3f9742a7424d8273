"""Each CUDA graph exists with the edit and without, vLLM's own dispatchers pick by the step, and the wrong graph fails closed."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.bundles import random_bundle
from tests.server.engine.fake_graph import FakeGraph
from trimtab.server.engine import op, proof
from trimtab.server.engine.device_path import DevicePath
from trimtab.server.engine.edit_state import EditState
from trimtab.server.engine.layers import HookPoint
from trimtab.server.engine.tables import Tables
from trimtab.server.engine.wire import END
from trimtab.server.plan import compile_plan
from trimtab.server.steering import parse_steering

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
BUNDLE = random_bundle(layer=1)
D = BUNDLE.header.model.d_model
SIZES = [1, 2, 4, 8, 16, 24, 32]
PLAN = compile_plan(
    parse_steering({"edits": [{"bundle": "calm", "operation": "add", "latent": 7, "amount": 3.0}]}), {"calm": BUNDLE}
)
CHANGE = 3.0 * torch.from_numpy(BUNDLE.decoder[0])
MODES = ("FULL", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
LORAS = (
    None,
    SimpleNamespace(max_loras=4, specialize_active_lora=True),
    SimpleNamespace(max_loras=4, specialize_active_lora=False),
)


def config(lora: Any) -> Any:
    """What vLLM's dispatchers read of a `VllmConfig`."""
    from vllm.config import CUDAGraphMode

    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL,
        is_attention_compiled_piecewise=lambda: True,
        max_cudagraph_capture_size=SIZES[-1],
        cudagraph_capture_sizes=SIZES,
        compile_sizes=[8],
        cudagraph_specialize_lora=True,
        splitting_ops=[],
        mode=3,
    )
    return SimpleNamespace(
        compilation_config=compilation,
        num_speculative_tokens=0,
        speculative_config=None,
        lora_config=lora,
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )


def state() -> EditState:
    tables = Tables(CPU, 8, fold=False)
    tables.load(BUNDLE)
    return EditState([0, 1], tables, DevicePath([0, 1], D, 8, 64, tables.row, torch.zeros(64, dtype=torch.int32)))


def steps(found: EditState) -> Iterator[bool]:
    """An idle step, a steered one, and an idle one again."""
    found.idle()
    yield False
    found.arrive("r", PLAN.wire(), 3)
    found.prepare(["r"], [0], [3])
    yield True
    found.prepare(["other"], [0], [3])
    yield False


def v1(mode: str, lora: Any, path: DevicePath) -> Any:
    from vllm.config import CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    from trimtab.server.engine.graphs import fork_dispatcher

    dispatcher = CudagraphDispatcher(config(lora))
    fork_dispatcher(dispatcher, path)
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode[mode])
    return dispatcher


@pytest.mark.parametrize("lora", LORAS, ids=("plain", "lora", "lora_one_case"))
@pytest.mark.parametrize("mode", MODES)
def test_v1_picks_a_captured_graph_of_the_steps_variant(mode: str, lora: Any) -> None:
    from vllm.config import CUDAGraphMode

    from trimtab.server.engine.graphs import SteeredBatch

    found = state()
    assert found.path is not None
    dispatcher = v1(mode, lora, found.path)
    captured = dict(dispatcher.get_capture_descs())
    for descs in captured.values():
        steered = [d for d in descs if isinstance(d, SteeredBatch)]
        assert len(descs) == 2 * len(steered)
        assert {_fields(d) for d in steered} == {_fields(d) for d in descs if not isinstance(d, SteeredBatch)}
    picked: dict[bool, list[Any]] = {}
    for wanted in steps(found):
        for n in range(1, SIZES[-1] + 4):
            for n_loras in range(5 if lora else 1):
                for uniform in (False, True):
                    mode_picked, desc = dispatcher.dispatch(n, uniform, n_loras > 0, n_loras)
                    picked.setdefault(wanted, []).append((mode_picked, _fields(desc)))
                    if mode_picked == CUDAGraphMode.NONE:
                        assert not isinstance(desc, SteeredBatch)
                    else:
                        assert desc in captured[mode_picked]
                        assert isinstance(desc, SteeredBatch) == wanted
    assert picked[False] == 2 * picked[True]  # the same graphs, but for the variant; the idle step was seen twice
    assert any(mode_picked != CUDAGraphMode.NONE for mode_picked, _ in picked[True])


def _fields(desc: Any) -> tuple[Any, ...]:
    return (desc.num_tokens, desc.num_reqs, desc.uniform, desc.has_lora, desc.num_active_loras)


def v2(mode: str, lora: Any, path: DevicePath, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int]]:
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu.lora_utils import get_lora_capture_cases

    from trimtab.server.engine.graphs import fork_manager, lora_cases

    alone = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: alone)
    monkeypatch.setattr(current_platform, "get_global_graph_pool", lambda: None, raising=False)
    found = config(lora)
    cases = get_lora_capture_cases(lora, found.compilation_config)
    manager = cudagraph_utils.CudaGraphManager(found, CPU, CUDAGraphMode[mode], 1, lora_cases(cases))
    fork_manager(manager, path, cases)
    manager._graphs_captured = True
    return manager, cases


@pytest.mark.parametrize("lora", LORAS, ids=("plain", "lora", "lora_one_case"))
@pytest.mark.parametrize("mode", MODES)
def test_v2_picks_a_captured_graph_of_the_steps_variant(mode: str, lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CUDAGraphMode

    found = state()
    assert found.path is not None
    manager, cases = v2(mode, lora, found.path, monkeypatch)
    offset = max(cases) + 1
    captured = {desc for descs in manager._capture_descs.values() for desc in descs}
    idle = {desc for desc in captured if desc.num_active_loras < offset}
    assert len(captured) == 2 * len(idle)
    picked: dict[bool, list[Any]] = {}
    for wanted in steps(found):
        for n in range(1, SIZES[-1] + 4):
            for n_loras in range(5 if lora else 1):
                for uniform in (None, 1):
                    desc = manager.dispatch(min(n, 16), n, uniform, num_active_loras=n_loras)
                    loras = desc.num_active_loras - (offset if wanted and desc.cg_mode != CUDAGraphMode.NONE else 0)
                    picked.setdefault(wanted, []).append((desc.cg_mode, desc.num_tokens, desc.num_reqs, loras))
                    assert 0 <= loras < offset
                    assert desc.cg_mode == CUDAGraphMode.NONE or desc in captured
    assert picked[False] == 2 * picked[True]
    assert any(cg_mode != CUDAGraphMode.NONE for cg_mode, *_ in picked[True])


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_gate_that_stays_open_runs_without_a_graph_where_its_request_runs_several_tokens(
    runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph holds no launch that reads all of them before any is edited. One token at a time runs in a graph."""
    from vllm.config import CUDAGraphMode

    found = state()
    assert found.path is not None
    manager = v2("FULL", None, found.path, monkeypatch)[0] if runner == "v2" else v1("FULL", None, found.path)
    edit = {"bundle": "calm", "latent": 7, "operation": "add", "amount": 1.0}
    gate = {"latent": 8, "above": 0.5, "mode": "onward"}
    onward = compile_plan(parse_steering({"edits": [edit | {"gate": gate}]}), {"calm": BUNDLE})
    found.arrive("r", onward.wire(), 3)
    for first, n, graph in ((0, 3, False), (3, 1, True), (4, 2, False), (6, 1, True)):
        found.prepare(["r"], [first], [n])
        if runner == "v2":
            desc = manager.dispatch(num_reqs=1, num_tokens=n, uniform_token_count=n, num_active_loras=0)
            assert (desc.cg_mode != CUDAGraphMode.NONE) == graph
            assert graph or (desc.num_tokens, desc.num_reqs, desc.num_active_loras) == (n, 1, 0)
        else:
            mode, batch = manager.dispatch(num_tokens=n, uniform_decode=n == 1)
            assert (mode != CUDAGraphMode.NONE) == graph
            assert graph or batch.num_tokens == n
    found.idle()
    assert not found.path.graphless


def test_v2_captures_each_variant_with_the_operator_set_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM calls the hook before each warm-up and each capture; adapters' own hook is still called, with its own counts."""
    from trimtab.server.engine.graphs import fork_manager

    found = state()
    path = found.path
    assert path is not None
    seen: list[tuple[int, bool]] = []
    counts: list[int] = []

    def capture(*, lora_capture_hook: Callable[[int, int, int], None], **kwargs: Any) -> None:
        for case in (0, 1, 5, 6, 7, 11):
            lora_capture_hook(case, 4, 4)
            seen.append((case, path.armed))

    manager = SimpleNamespace(dispatch=None, capture=capture)
    fork_manager(manager, path, [0, 1, 2, 4, 5])
    manager.capture(lora_capture_hook=lambda n, *_: counts.append(n), has_lora=True)
    assert seen == [(0, False), (1, False), (5, False), (6, True), (7, True), (11, True)]
    assert counts == [0, 1, 5, 0, 1, 5]
    assert path.capturing is None


class Pair(nn.Module):
    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden * 2, residual + hidden


class Captured:
    """Two hooked layers, captured for 8 rows in both variants, as V1's wrapper keeps graphs: by the dispatcher's key."""

    def __init__(self, found: EditState) -> None:
        assert found.path is not None
        self.state, self.path = found, found.path
        self.layers = [Pair(), Pair()]
        op.define()
        op.bind(found)
        for i, layer in enumerate(self.layers):
            op.attach(HookPoint(i, "pair", layer))
        self.x_TD = torch.zeros(8, D)
        self.graphs = {True: FakeGraph(), False: FakeGraph()}
        self.out: dict[bool, Tensor] = {}
        for active, graph in self.graphs.items():
            self.path.capturing = active
            with graph:
                self.out[active] = self._forward()
        self.path.capturing = None

    def _forward(self) -> Tensor:
        hidden, residual = self.x_TD * 1.0, self.x_TD * 0.0
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual

    def replay(self, x_TD: Tensor, *, active: bool) -> Tensor:
        """The output's first rows for this input, padded to the graph's size."""
        self.x_TD.zero_()
        self.x_TD[: len(x_TD)] = x_TD
        self.graphs[active].replay()
        return self.out[active][: len(x_TD)].clone()


@pytest.fixture
def captured() -> Iterator[Captured]:
    yield Captured(state())
    op.bind(None)


def test_the_idle_graph_holds_nothing_of_the_edit(captured: Captured) -> None:
    layers = [Pair(), Pair()]
    plain = FakeGraph()
    with plain:
        hidden, residual = captured.x_TD * 1.0, captured.x_TD * 0.0
        for layer in layers:
            hidden, residual = layer(hidden, residual)
        hidden + residual
    assert captured.graphs[False].n_launched == plain.n_launched
    assert captured.graphs[True].n_launched > plain.n_launched


def test_a_replayed_graph_edits_each_steps_own_rows(captured: Captured) -> None:
    found = captured.state
    x_TD = torch.randn(5, D)
    plain = captured.replay(x_TD, active=False)
    found.arrive("r", PLAN.wire(), 3)
    for ids, starts, lengths, edited in (
        (["other", "r"], [0, 0], [2, 3], [0, 0, 0, 1, 1]),
        (["r", "other"], [3, 2], [1, 1], [1, 0]),
        (["other", "r"], [3, 4], [1, 1], [0, 1]),
    ):
        n = sum(lengths)
        found.prepare(ids, starts, lengths)
        assert captured.path.armed
        out = captured.replay(x_TD[:n], active=captured.path.armed)
        torch.testing.assert_close(out, plain[:n] + torch.tensor(edited).unsqueeze(1) * CHANGE)
        reports = found.collect()()
    proof.verify(PLAN, proof.settled(reports["r"], END), 3, [3])
    found.prepare(["other"], [4], [1])
    assert not captured.path.armed
    torch.testing.assert_close(captured.replay(x_TD[:1], active=captured.path.armed), plain[:1])


def test_a_steered_step_through_the_idle_graph_fails_closed(captured: Captured) -> None:
    """Whatever picked it: nothing was edited, and the reply must not look as if it had been."""
    found = captured.state
    found.arrive("r", PLAN.wire(), 3)
    found.prepare(["r"], [0], [3])
    captured.replay(torch.randn(3, D), active=True)
    assert found.collect()()["r"].failure is None
    found.prepare(["r"], [3], [1])
    captured.replay(torch.randn(1, D), active=False)
    assert "not called" in (found.collect()()["r"].failure or "")


def test_an_idle_step_through_the_steered_graph_edits_nothing(captured: Captured) -> None:
    found = captured.state
    found.arrive("r", PLAN.wire(), 3)
    found.prepare(["r"], [0], [3])
    captured.replay(torch.randn(3, D), active=True)
    found.idle()
    x_TD = torch.randn(3, D)
    torch.testing.assert_close(captured.replay(x_TD, active=True), captured.replay(x_TD, active=False))
