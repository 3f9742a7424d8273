"""The kernel, compiled: the reference formula, inside a real CUDA graph too, and what it costs beside the torch operator."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.server.engine.kernel_cases import CASES, run
from trimtab.attribution.edit import Rows
from trimtab.server.engine import kernel, kernel_torch
from trimtab.server.engine.device_path import DevicePath
from trimtab.server.engine.device_slots import Span
from trimtab.server.engine.tables import SlotRows
from trimtab.server.plan import PlanRow
from trimtab.server.window import EVERYWHERE

OUT = Path("build/gpu/kernel.json")
SHAPES = [(d_model, n_rows) for d_model in (576, 4096, 8192) for n_rows in (1, 16, 64, 256, 2048)]
N_LATENTS = 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_edited_rows_are_the_reference_and_others_are_untouched(case: Any) -> None:
    found = run(case, "cuda")
    allowed = 32 if case.dtype == "float32" else 1.01
    assert max(found["reference"], found["torch"]) <= allowed
    assert max(found["ratio"], found["ratio_of_torch"]) <= 1e-5
    assert found["untouched"]
    assert found["beyond"]
    assert found["edited"]
    assert found["flags"]
    assert found["opened"]


def fixture(d_model: int, n_rows: int, *, edited: bool) -> tuple[DevicePath, Tensor, Tensor]:
    """A path whose rows, if any, each read and write `N_LATENTS` latents, and a bf16 stream."""
    cuda = torch.device("cuda")
    e_PD, d_PD = torch.randn(2, 64, d_model, device=cuda)
    zero = torch.zeros(1, device=cuda)
    path = DevicePath(
        [0],
        d_model,
        n_rows,
        n_rows,
        lambda row: Rows(zero, zero, e_PD[row.row][None], zero, zero, d_PD[row.row][None]),
        torch.zeros(n_rows, dtype=torch.int32, device=cuda),
        dtype=torch.bfloat16,
    )
    rows = [
        tuple(PlanRow(0, EVERYWHERE, "b", "latent", (t + k) % 64, 1.0, -1.0, False, None) for k in range(N_LATENTS))
        for t in range(n_rows)
    ]
    path.write([Span(str(t), {0: SlotRows(None, None, rows[t])}, t, t + 1) for t in range(n_rows)] if edited else [])
    hidden, residual = torch.randn(2, n_rows, d_model, device=cuda, dtype=torch.bfloat16)
    return path, hidden, residual


def test_a_captured_graph_edits_the_rows_of_each_replay() -> None:
    path, hidden, residual = fixture(576, 16, edited=True)
    before = hidden.clone()
    path.capturing = True
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        path.apply(0, hidden, residual)
    path.capturing = None
    path.write([])
    hidden.copy_(before)
    graph.replay()
    assert torch.equal(hidden, before)
    one = (PlanRow(0, EVERYWHERE, "b", "latent", 3, 1.0, 0.0, False, None),)
    path.write([Span("one", {0: SlotRows(None, None, one)}, 5, 6)])
    graph.replay()
    assert (hidden != before).any(dim=1).nonzero().flatten().tolist() == [5]
    assert (path.buffers.ratio_LT[0] >= 0).nonzero().flatten().tolist() == [5]


def test_what_the_kernel_costs() -> None:
    """Writes microseconds a launch to build/gpu/kernel.json: all rows edited, and none; the torch operator beside it."""
    from triton.testing import do_bench

    table = []
    for d_model, n_rows in SHAPES:
        line: dict[str, Any] = {"d_model": d_model, "rows": n_rows}
        for edited in (True, False):
            path, hidden, residual = fixture(d_model, n_rows, edited=edited)
            path.capturing = True
            ways: dict[str, Callable[..., None]] = {"triton": kernel.launch}
            if edited:
                ways["torch"] = kernel_torch.launch
            for name, way in ways.items():
                line[f"{name}_{'edited' if edited else 'unedited'}_us"] = 1000 * do_bench(
                    lambda way=way, path=path, hidden=hidden, residual=residual: way(path.buffers, 0, hidden, residual),
                    return_mode="median",
                )
        table.append(line)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "latents": N_LATENTS, "launches": table}, indent=2))
    assert all(line["triton_edited_us"] < line["torch_edited_us"] for line in table)
