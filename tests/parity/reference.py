"""The reference: the same model in transformers, edited by `attribution.edit.delta` in forward hooks, teacher-forced.

If at every step the reference's most likely token is the one that vLLM chose, the two greedy generations are the same.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

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
    """Layer → largest ‖Δ‖/‖h‖ over the edited positions."""


class Reference:
    """The embedded model in fp32, on the host."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            model_path(), dtype=torch.float32, attn_implementation="eager"
        )
        self.model.eval()

    def __call__(
        self, plan: Plan | None, bundles: Mapping[str, Bundle], prompt: list[int], completion: list[int]
    ) -> Expected:
        """`bundles` by content hash. The last completion token predicts nothing, so it is not run."""
        norms: dict[int, float] = {}
        handles = []
        by_layer: dict[int, list[PlanRow]] = {}
        for row in plan.rows if plan else ():
            by_layer.setdefault(row.layer, []).append(row)
        for layer, rows in by_layer.items():

            def hook(module: Any, args: Any, output: Any, layer: int = layer, rows: list[PlanRow] = rows) -> Any:
                h_TD: Tensor = (output[0] if isinstance(output, tuple) else output)[0]
                change_TD = torch.zeros_like(h_TD)
                edited_T = torch.zeros(len(h_TD), dtype=torch.bool)
                for row in rows:
                    lo, hi = row.window.bounds(len(prompt))
                    change_TD[lo:hi] += delta(h_TD[lo:hi], _rows(row, bundles[row.bundle]))
                    edited_T[lo:hi] = True
                ratio_T = (change_TD.norm(dim=-1) / h_TD.norm(dim=-1))[edited_T]
                norms[layer] = float(ratio_T.max()) if len(ratio_T) else 0.0
                edited = (h_TD + change_TD).unsqueeze(0)
                return (edited, *output[1:]) if isinstance(output, tuple) else edited

            handles.append(self.model.model.layers[layer].register_forward_hook(hook))
        try:
            with torch.inference_mode():
                logits_TV = self.model(torch.tensor([prompt + completion[:-1]])).logits[0, len(prompt) - 1 :].float()
        finally:
            for handle in handles:
                handle.remove()
        chosen = torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        return Expected(logits_TV.argmax(-1).tolist(), chosen.tolist(), norms)


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
