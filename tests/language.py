"""The edit language, spelt out: one row after another, one token after another. What every faster implementation must equal."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.attribution.bundle import Bundle
from trimtab.attribution.edit import Rows, delta, project_rows
from trimtab.server.plan import PlanRow


class Edited(NamedTuple):
    """An edited stream at one hook point, and what its proof should say."""

    h_TD: Tensor
    tokens: int
    """Positions in the scope of an edit."""
    max_relative_norm: float
    mean_relative_norm: float
    gate_firings: int
    special_tokens: int
    margin: float
    """How near any gate or threshold was to its activation; below rounding, either answer is right."""


def edited(
    h_TD: Tensor,
    rows: Sequence[PlanRow],
    bundles: Mapping[str, Bundle],
    tokens: Sequence[int],
    n_prompt: int,
    special: Collection[int],
) -> Edited:
    """`h_TD` [tokens, d_model] under the rows of one layer; `bundles` by content hash."""
    change_TD = torch.zeros_like(h_TD)
    in_scope, left_alone, gate_open = set(), set(), set()
    margin = math.inf
    for row in rows:
        lo, hi = row.window.bounds(n_prompt)
        edit = served(row, bundles[row.bundle])
        opened = False
        for t in range(lo, len(tokens) if hi is None else min(hi, len(tokens))):
            in_scope.add(t)
            if row.exclude_special and tokens[t] in special:
                left_alone.add(t)
                continue
            if row.gate is not None:
                reader = bundles[row.gate.bundle]
                e_D, b = torch.from_numpy(reader.encoder[row.gate.row]), float(reader.bias[row.gate.row])
                x = float(e_D @ h_TD[t]) + b
                margin = min(margin, abs(x - row.gate.above))
                opened = x > row.gate.above or (opened and row.gate.mode == "onward")
                if not opened:
                    continue
                gate_open.add(t)
            if row.beta and float(edit.theta_K) > 0:
                margin = min(margin, abs(float(edit.e_KD[0] @ h_TD[t] + edit.b_K - edit.theta_K)))
            change_TD[t] += delta(h_TD[t : t + 1], edit)[0]
    ratio_N = (change_TD.norm(dim=-1) / h_TD.norm(dim=-1)).double()[sorted(in_scope)]
    largest, mean = (float(ratio_N.max()), float(ratio_N.mean())) if len(ratio_N) else (0.0, 0.0)
    return Edited(h_TD + change_TD, len(in_scope), largest, mean, len(gate_open), len(left_alone), margin)


def served(row: PlanRow, bundle: Bundle) -> Rows:
    """The row of the formula that a row of a plan names."""

    def at(array: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[row.row : row.row + 1]))

    match row.source:
        case "latent":
            e, b, theta, d = at(bundle.encoder), at(bundle.bias), at(bundle.threshold), at(bundle.decoder)
        case "project":
            e, b, theta, d = project_rows(at(bundle.decoder))
        case "vector":
            d = at(bundle.vectors)
            e, b, theta = torch.zeros_like(d), torch.zeros(1), torch.zeros(1)
        case "project_vector":
            e, b, theta, d = project_rows(at(bundle.vectors))
    return Rows(torch.tensor([row.alpha]), torch.tensor([row.beta]), e, b, theta, d)
