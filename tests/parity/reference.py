"""The reference: the same model in transformers, edited by `tests.language` in forward hooks, teacher-forced.

If at every step the reference's most likely token is the one that vLLM chose, the two greedy generations are the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.language import Edited, edited
from trimtab.attribution.bundle import Bundle
from trimtab.attribution.embedded import model_path
from trimtab.server.plan import Plan, PlanRow


class Expected(NamedTuple):
    """What transformers makes of a prompt, a completion and a plan."""

    tokens: list[int]
    """The most likely token at each completion position."""
    logprobs: list[float]
    """Log-probability of the given completion tokens."""
    layers: dict[int, Edited]
    """What was edited, by layer."""

    @property
    def relative_norm(self) -> dict[int, float]:
        """Layer → largest ‖Δ‖/‖h‖ over the edited positions."""
        return {layer: found.max_relative_norm for layer, found in self.layers.items()}

    @property
    def margin(self) -> float:
        """How near any gate or threshold was to its activation; below rounding, either answer is right."""
        return min((found.margin for found in self.layers.values()), default=float("inf"))


class Reference:
    """A model in fp32, on the host; the embedded one unless a folder is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder or model_path(), dtype=torch.float32, attn_implementation="eager"
        )
        self.model.eval()
        self.blocks = _blocks(self.model)
        self.special: set[int] = set()
        if folder is not None and not (folder / "tokenizer.json").exists():  # without a tokenizer no token is special
            return
        tokenizer = AutoTokenizer.from_pretrained(folder or model_path())
        self.special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special |= set(tokenizer.all_special_ids)

    def __call__(
        self, plan: Plan | None, bundles: Mapping[str, Bundle], prompt: list[int], completion: list[int]
    ) -> Expected:
        """`bundles` by content hash. The last completion token predicts nothing, so it is not run."""
        logprobs_TV, layers = self.run(plan, bundles, prompt, completion)
        logprobs_NV = logprobs_TV[len(prompt) - 1 :]
        chosen = logprobs_NV.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        return Expected(logprobs_NV.argmax(-1).tolist(), chosen.tolist(), layers)

    def run(
        self, plan: Plan | None, bundles: Mapping[str, Bundle], prompt: list[int], completion: list[int]
    ) -> tuple[Tensor, dict[int, Edited]]:
        """Log-probabilities of the token after each position that is run [T, V], and what was edited, by layer."""
        tokens = prompt + completion[:-1]
        layers: dict[int, Edited] = {}
        handles = []
        by_layer: dict[int, list[PlanRow]] = {}
        for row in plan.rows if plan else ():
            by_layer.setdefault(row.layer, []).append(row)
        for layer, rows in by_layer.items():

            def hook(module: Any, args: Any, output: Any, layer: int = layer, rows: list[PlanRow] = rows) -> Any:
                h_TD: Tensor = (output[0] if isinstance(output, tuple) else output)[0]
                layers[layer] = edited(h_TD, rows, bundles, tokens, len(prompt), self.special)
                changed = layers[layer].h_TD.unsqueeze(0)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            handles.append(self.blocks[layer].register_forward_hook(hook))
        try:
            with torch.inference_mode():
                return torch.log_softmax(self.model(torch.tensor([tokens])).logits[0].float(), -1), layers
        finally:
            for handle in handles:
                handle.remove()


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, whatever the architecture calls them."""
    found = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("layers", "h", "blocks") and isinstance(module, nn.ModuleList)
    ]
    return found[0]
