"""The Triton kernel beside the reference and the torch operator, in Triton's interpreter: run as a program, prints its findings.

A process of its own, because Triton decides when it is imported whether kernels are interpreted.
"""

import json
import math
import os
import sys
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from trimtab.attribution.edit import Rows, delta
from trimtab.server.engine import kernel_torch
from trimtab.server.engine.device_path import DevicePath
from trimtab.server.engine.device_slots import Span
from trimtab.server.engine.onward import Watch
from trimtab.server.engine.proof import GATE, SPECIAL
from trimtab.server.engine.tables import SlotRows
from trimtab.server.plan import Gate, PlanRow
from trimtab.server.window import EVERYWHERE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
N_POOL = 80


class Case(NamedTuple):
    """Slots are (rows with β, rows without) at layer 3; `at` is the slot of each row of the step, 0 for none. The rows of a slot
    are successive tokens of one request."""

    name: str
    d_model: int
    dtype: str
    pair: bool
    slots: tuple[tuple[int, int], ...]
    at: tuple[int, ...]
    stride: int = 0
    """Of the rows of the stream; 0 is its width."""
    conditional: bool = False
    """Most rows of the formula are gated, half of those so that the gate stays open, and some leave special tokens alone."""


CASES = (
    Case("width_of_a_power_of_two", 64, "float32", True, ((3, 1),), (0, 1, 1, 0)),
    Case("width_576", 576, "float32", True, ((8, 0), (0, 1), (1, 0)), (1, 0, 2, 3, 3, 0, 1)),
    Case("width_576_single", 576, "float32", False, ((8, 0), (0, 3)), (2, 0, 1)),
    Case("many_slots", 96, "float32", True, tuple((i % 11, 1 + i % 4) for i in range(20)), tuple(range(20, -1, -1))),
    Case("as_many_rows_as_fit", 96, "float32", True, ((64, 0), (0, 64), (33, 31)), (1, 2, 3)),
    Case("width_8192", 8192, "float32", True, ((9, 2),), (0, 1)),
    Case("bfloat16", 576, "bfloat16", True, ((8, 2), (0, 1)), (1, 0, 2, 1)),
    Case("bfloat16_single", 576, "bfloat16", False, ((8, 2), (0, 1)), (1, 0, 2, 1)),
    Case("float16", 96, "float16", True, ((8, 2),), (1, 0)),
    Case("rows_apart", 96, "float32", True, ((3, 1),), (1, 0, 1), 128),
    Case("no_row_is_edited", 96, "float32", True, (), (0, 0, 0)),
    Case("a_slot_without_rows_here", 96, "float32", True, ((0, 0), (2, 0)), (1, 2)),
    Case("gates", 96, "float32", True, ((4, 4), (0, 3), (9, 0)), (1, 0, 2, 3), conditional=True),
    Case("gates_width_576_single", 576, "float32", False, ((1, 1), (5, 2)), (2, 1, 0), conditional=True),
    Case("as_many_gates_as_fit", 96, "float32", True, ((40, 24), (64, 0)), (1, 1, 2), conditional=True),
    Case("gates_over_many_tokens", 96, "float32", True, ((3, 2), (2, 9)), (1,) * 9 + (0,) + (2,) * 7, conditional=True),
    Case("gates_bfloat16", 576, "bfloat16", True, ((4, 4), (0, 3)), (1, 1, 1, 2, 0, 2), conditional=True),
)


def pool(d_model: int, g: torch.Generator) -> Rows:
    """Rows that fire on about half of the tokens; one is the identity, as of a projection."""
    e_PD, d_PD = torch.randn(2, N_POOL, d_model, generator=g) / math.sqrt(d_model)
    theta_P = torch.rand(N_POOL, generator=g)
    theta_P[0] = -math.inf
    return Rows(torch.zeros(N_POOL), torch.zeros(N_POOL), e_PD, torch.randn(N_POOL, generator=g), theta_P, d_PD)


def run(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Largest differences of the kernel from the reference and from torch, in units of the dtype's rounding."""
    g = torch.Generator().manual_seed(0)
    rows = pool(case.d_model, g)

    def row(plan_row: PlanRow) -> Rows:
        one = slice(plan_row.row, plan_row.row + 1)
        picked = {f: getattr(rows, f)[one] for f in ("e_KD", "b_K", "theta_K", "d_KD")}
        return Rows(torch.tensor([plan_row.alpha]), torch.tensor([plan_row.beta]), **picked)

    plans: list[list[PlanRow]] = []
    for n_reads, n_adds in case.slots:
        chosen = torch.randperm(N_POOL, generator=g)[: n_reads + n_adds].tolist()
        x = torch.randn(2, N_POOL, generator=g).tolist()
        mixed = [
            PlanRow(
                3,
                EVERYWHERE,
                "b",
                "latent",
                i,
                x[0][i] if k >= n_reads or k % 2 else 0.0,
                x[1][i] if k < n_reads else 0.0,
                case.conditional and k % 3 == 0,
                _gate(k, i) if case.conditional else None,
            )
            for k, i in enumerate(chosen)
        ]
        plans.append(sorted(mixed, key=repr))
    dtype, n = DTYPES[case.dtype], len(case.at)
    token_T, special_V = torch.arange(n + 3, dtype=torch.int32) % 5, torch.tensor([False, True, False, False])
    path = DevicePath(
        [1, 3], case.d_model, max(1, len(case.slots)), n + 3, row, token_T.to(device), special_V.to(device), dtype
    )
    entries = [
        path.onward.take(dict.fromkeys(watch for plan_row in plan if (watch := Watch.of(plan_row)))) for plan in plans
    ]
    position_T = torch.tensor([7 + case.at[:t].count(s) for t, s in enumerate(case.at)])
    opened_E = path.onward.opened_S
    opened_E[2::3] = 5  # some gates opened before the step
    before_E = opened_E.clone()
    spans = [
        Span(str(s), {3: SlotRows(None, None, tuple(plans[s - 1]))}, t, t + 1, entries[s - 1])
        for t, s in enumerate(case.at)
        if s
    ]
    several = any(case.at.count(s) > 1 for s in case.at if s)
    path.write(spans, position_T.numpy(), {3} if several and case.conditional else ())
    path.capturing = None if path.graphless else True  # as in a graph: also where no row is edited
    stride = case.stride or case.d_model
    stream = torch.randn(2, n, stride, generator=g).to(dtype)
    hidden, residual = stream[0, :, : case.d_model].clone(), stream[1, :, : case.d_model] if case.pair else None
    by_torch, before = hidden.clone(), hidden.clone()
    h_TD = before.float() if residual is None else before.float() + residual.float()
    expected_TD, expected_flags_T = torch.zeros_like(h_TD), torch.zeros(n, dtype=torch.uint8)
    opened = {(s, watch): int(before_E[e]) for s, mine in enumerate(entries, 1) for watch, e in mine.items()}
    for t, s in enumerate(case.at):
        is_special, position = bool(special_V[min(int(token_T[t]), 3)]), int(position_T[t])
        for plan_row in plans[s - 1] if s else ():
            if plan_row.exclude_special and is_special:
                expected_flags_T[t] |= SPECIAL
                continue
            if plan_row.gate is not None:
                reader = row(plan_row._replace(row=plan_row.gate.row))
                fires = float(reader.e_KD[0] @ h_TD[t] + reader.b_K) > plan_row.gate.above
                if (watch := Watch.of(plan_row)) is not None:
                    if fires:
                        opened[s, watch] = min(opened[s, watch], position)
                    fires = position >= opened[s, watch]
                if not fires:
                    continue
                expected_flags_T[t] |= GATE
            expected_TD[t] += delta(h_TD[t : t + 1], row(plan_row))[0]
    on_device = stream.to(device)[:, :, : case.d_model]
    path.apply(3, on_device[0], on_device[1] if case.pair else None)
    hidden = on_device[0].cpu()
    told = path.buffers
    ratio_LT, flags_T, opened_by_kernel_E = told.ratio_LT.cpu(), told.flags_LT[1, :n].cpu(), opened_E.cpu()
    ratio_T = ratio_LT[1, :n]
    told.ratio_LT.fill_(-1.0)
    opened_E.copy_(before_E)
    by_torch = by_torch.to(device)
    kernel_torch.launch(told, 1, by_torch, None if residual is None else residual.to(device))
    by_torch, ratio_of_torch_T, flags_of_torch_T = (
        by_torch.cpu(),
        told.ratio_LT[1, :n].cpu(),
        told.flags_LT[1, :n].cpu(),
    )
    expected_E = before_E.cpu().clone()
    for (s, watch), position in opened.items():
        expected_E[entries[s - 1][watch]] = position
    edited = torch.tensor(case.at) > 0
    wanted_T = torch.where(edited, expected_TD.norm(dim=-1) / h_TD.norm(dim=-1), -1.0)
    step = torch.finfo(dtype).eps
    return {
        "reference": worst(hidden, (before.float() + expected_TD), step),
        "torch": worst(hidden, by_torch.float(), step),
        "ratio": float((ratio_T - wanted_T).abs().max()),
        "ratio_of_torch": float((ratio_of_torch_T - wanted_T).abs().max()),
        "untouched": torch.equal(hidden[~edited], before[~edited]),
        "edited": torch.equal((hidden != before).any(dim=-1), (expected_TD != 0).any(dim=-1)),
        "beyond": bool((ratio_LT[1, n:] == -1).all()),
        "flags": torch.equal(flags_T[edited], expected_flags_T[edited]),
        "flags_of_torch": torch.equal(flags_of_torch_T[edited], expected_flags_T[edited]),
        "opened": torch.equal(opened_by_kernel_E, expected_E) and torch.equal(opened_E.cpu(), expected_E),
    }


def _gate(k: int, i: int) -> Gate | None:
    """Of every fourth row none; else of another latent, staying open on every other one."""
    return None if k % 4 == 3 else Gate("b", (7 * i + 1) % N_POOL, 0.1, "onward" if k % 2 else "token")


def worst(found: Tensor, wanted: Tensor, step: float) -> float:
    """Largest |found − wanted| / (max(1, |wanted|) · the dtype's epsilon)."""
    if not found.numel():
        return 0.0
    return float(((found.float() - wanted).abs() / wanted.abs().clamp_min(1.0)).max()) / step


def nan() -> float:
    """‖Δ‖/‖h‖ of a row whose stream is NaN."""
    rows = pool(96, torch.Generator().manual_seed(0))
    plan_row = PlanRow(3, EVERYWHERE, "b", "latent", 5, 1.0, 1.0, False, None)
    picked = {f: getattr(rows, f)[5:6] for f in ("e_KD", "b_K", "theta_K", "d_KD")}
    found = Rows(torch.ones(1), torch.ones(1), **picked)
    path = DevicePath([3], 96, 1, 1, lambda _: found, torch.zeros(1, dtype=torch.int32))
    path.write([Span("s", {3: SlotRows(None, None, (plan_row,))}, 0, 1)])
    path.apply(3, torch.full((1, 96), torch.nan), None)
    return float(path.buffers.ratio_LT[0, 0])


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"nan": str(nan()), **{case.name: run(case) for case in CASES}}) + "\n")
