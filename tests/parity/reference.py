"""The reference: the same model in transformers, edited by `attribution.edit.delta` in forward hooks, teacher-forced.

If at every step the reference's most likely token is the one that vLLM chose, the two greedy generations are the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.attribution.bundle import Bundle
from trimtab.attribution.edit import Rows, delta, project_rows
from trimtab.attribution.embedded import model_path
from trimtab.server.plan import Plan, PlanRow


class Expected(NamedTuple):
    """What transformers makes of a prompt, a completion and a plan."""

    tokens: list[int]
    """The most likely token at each completion position."""
    logprobs: list[float]
    """Log-probability of the given completion tokens."""
    relative_norm: dict[int, float]
    """Layer → largest ‖Δ‖/‖h‖ over the positions in scope."""
    mean_norm: dict[int, float]
    """Layer → mean ‖Δ‖/‖h‖ over the same."""
    gate_firings: dict[int, int]
    """Layer → positions on which a gate was open."""
    special_tokens: dict[int, int]
    """Layer → positions that an edit left alone because their token is special."""


class Reference:
    """A model in fp32, on the host; the embedded one unless a folder is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder or model_path(), dtype=torch.float32, attn_implementation="eager"
        )
        self.model.eval()
        if folder is not None:  # without a tokenizer no token is special
            self.special: set[int] = set()
            return
        tokenizer = AutoTokenizer.from_pretrained(model_path())
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special |= set(tokenizer.all_special_ids)

    def __call__(
        self, plan: Plan | None, bundles: Mapping[str, Bundle], prompt: list[int], completion: list[int]
    ) -> Expected:
        """`bundles` by content hash. The last completion token predicts nothing, so it is not run."""
        tokens = prompt + completion[:-1]
        found = Expected([], [], {}, {}, {}, {})
        handles = []
        by_layer: dict[int, list[PlanRow]] = {}
        for row in plan.rows if plan else ():
            by_layer.setdefault(row.layer, []).append(row)
        for layer, rows in by_layer.items():

            def hook(module: Any, args: Any, output: Any, layer: int = layer, rows: list[PlanRow] = rows) -> Any:
                h_TD: Tensor = (output[0] if isinstance(output, tuple) else output)[0]
                edited = self._edit(h_TD, rows, bundles, tokens, len(prompt), layer, found).unsqueeze(0)
                return (edited, *output[1:]) if isinstance(output, tuple) else edited

            handles.append(self.model.model.layers[layer].register_forward_hook(hook))
        try:
            with torch.inference_mode():
                logits_TV = self.model(torch.tensor([tokens])).logits[0, len(prompt) - 1 :].float()
        finally:
            for handle in handles:
                handle.remove()
        chosen = torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        return found._replace(tokens=logits_TV.argmax(-1).tolist(), logprobs=chosen.tolist())

    def _edit(
        self,
        h_TD: Tensor,
        rows: list[PlanRow],
        bundles: Mapping[str, Bundle],
        tokens: list[int],
        n_prompt: int,
        layer: int,
        found: Expected,
    ) -> Tensor:
        """The edited stream, one row after another, one token after another."""
        change_TD = torch.zeros_like(h_TD)
        in_scope, left_alone, gate_open = set(), set(), set()
        for row in rows:
            lo, hi = row.window.bounds(n_prompt)
            edit = _rows(row, bundles[row.bundle])
            opened = False
            for t in range(lo, len(tokens) if hi is None else min(hi, len(tokens))):
                in_scope.add(t)
                if row.exclude_special and tokens[t] in self.special:
                    left_alone.add(t)
                    continue
                if row.gate is not None:
                    reader = bundles[row.gate.bundle]
                    e_D, b = torch.from_numpy(reader.encoder[row.gate.row]), float(reader.bias[row.gate.row])
                    fires = float(e_D @ h_TD[t]) + b > row.gate.above
                    opened = fires or (opened and row.gate.mode == "onward")
                    if not opened:
                        continue
                    gate_open.add(t)
                change_TD[t] += delta(h_TD[t : t + 1], edit)[0]
        ratio_T = (change_TD.norm(dim=-1) / h_TD.norm(dim=-1)).double()[sorted(in_scope)]
        found.relative_norm[layer] = float(ratio_T.max()) if len(ratio_T) else 0.0
        found.mean_norm[layer] = float(ratio_T.mean()) if len(ratio_T) else 0.0
        found.gate_firings[layer], found.special_tokens[layer] = len(gate_open), len(left_alone)
        return h_TD + change_TD


def _rows(row: PlanRow, bundle: Bundle) -> Rows:
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
