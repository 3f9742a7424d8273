"""The training loop: BatchTopK steps over shuffled activations, with checkpoints.

The data are centred and scaled to x = (h − mean) / scale, ‖x‖ about `INPUT_NORM`, so that one learning rate suits weights and
biases. A run over a growing cache takes what is there whenever it shuffles anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import normalize

from trimtab.attribution.training.cache import LEARNT, read_shard
from trimtab.attribution.training.dictionary import Dictionary, add_auxiliary, batch_top_k, gradients
from trimtab.attribution.training.plan import TrainPlan

__all__ = ["INPUT_NORM", "Run", "Store", "train"]

INPUT_NORM = 8.0
_AUX_TOKENS = 384
_CHECKPOINT_EVERY = 100


class Store:
    """Every activation to learn from, in memory in fp16."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._h = torch.empty(0, 0, dtype=torch.float16)
        self.shards: list[str] = []
        """File names in the order read: the order of the rows."""
        self.n_tokens = 0
        self.n_chat = 0
        self.n_sinks = 0

    def refresh(self, first: Sequence[str] = ()) -> int:
        """Read the shards not read yet, those named `first` before the others; the number of tokens now here."""
        parts = [self._h] if self.n_tokens else []
        there = [path for name in LEARNT for path in self._folder.glob(f"{name}-*.safetensors")]
        for name in (*first, *sorted({path.name for path in there} - set(first), reverse=True)):
            if name not in self.shards:
                shard = read_shard(self._folder / name)
                parts.append(shard.h)
                self.n_chat += int(shard.chat.sum())
                self.n_sinks += shard.n_sinks
                self.shards.append(name)
        if len(parts) > 1 or not self.n_tokens:
            self._h = torch.cat(parts)
        self.n_tokens = len(self._h)
        return self.n_tokens

    def rows(self, at: torch.Tensor) -> torch.Tensor:
        """[len(at), d_model] fp32."""
        return self._h[at].float()


@dataclass
class Run:
    """Everything a run needs to go on: what a checkpoint holds."""

    dictionary: Dictionary
    moments: list[torch.Tensor]
    """Adam's two moments for each parameter, in the order of `Dictionary.parameters`."""
    mean: torch.Tensor
    scale: float
    step: int
    seen: int
    lowest: float
    """Smallest activation kept in the last step, in scaled units."""
    silent_for: torch.Tensor
    """[L] steps since each latent last fired."""
    order: torch.Tensor
    """Shuffled numbers of the tokens of this pass that are still to come."""
    drawn: torch.Tensor
    """[tokens] whether each was ever learnt from."""
    shards: list[str]
    """The store's, when `order` and `drawn` were numbered."""

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".part")
        torch.save(vars(self) | {"dictionary": self.dictionary.parameters()}, partial)
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> Run:
        state = torch.load(path, weights_only=True)
        return cls(**state | {"dictionary": Dictionary(*state["dictionary"])})

    @classmethod
    def start(cls, plan: TrainPlan, store: Store) -> Run:
        generator = torch.Generator().manual_seed(plan.seed)
        h_TD = store.rows(torch.randperm(store.n_tokens, generator=generator)[: 2 * plan.n_latents])
        mean = h_TD.mean(0)
        x_TD = h_TD - mean
        scale = float(x_TD.norm(dim=1).mean()) / INPUT_NORM
        dictionary = Dictionary.from_data(x_TD / scale, plan.n_latents, plan.encoder_gain, generator)
        moments = [torch.zeros_like(p) for p in dictionary.parameters() for _ in range(2)]
        silent = torch.zeros(plan.n_latents, dtype=torch.long)
        none = torch.empty(0, dtype=torch.long)
        return cls(dictionary, moments, mean, scale, 0, 0, 0.0, silent, none, none.bool(), [])


def train(plan: TrainPlan, store: Store, folder: Path, report: Callable[[Run, float, int], None]) -> Run:
    """Run to the last step, going on from the checkpoint in `folder` if there is one.

    `report` gets (run, fraction of variance unexplained in the batch, number of silent latents) after each step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        run = Run.load(checkpoint)
        store.refresh(run.shards)
    else:
        store.refresh()
        run = Run.start(plan, store)
    while run.step < plan.steps:
        if len(run.order) < plan.batch:
            generator = torch.Generator().manual_seed(plan.seed + run.step)
            run.order = torch.randperm(store.refresh(), generator=generator)
            run.shards = list(store.shards)
            run.drawn = torch.cat([run.drawn, torch.zeros(store.n_tokens - len(run.drawn), dtype=torch.bool)])
        at, run.order = run.order[: plan.batch].sort().values, run.order[plan.batch :]
        run.drawn[at] = True
        fvu = _step(run, plan, (store.rows(at) - run.mean) / run.scale)
        report(run, fvu, int((run.silent_for > plan.silent_after).sum()))
        if run.step % _CHECKPOINT_EVERY == 0 or run.step == plan.steps:
            run.save(checkpoint)
    return run


def _step(run: Run, plan: TrainPlan, x_TD: torch.Tensor) -> float:
    dictionary = run.dictionary
    z_TL = dictionary.encode(x_TD)
    k = plan.k + round((plan.k_first - plan.k) * max(0.0, 1 - run.step / plan.k_falls))
    a, lowest = batch_top_k(z_TL, k, run.lowest)
    error_TD, loss, grads = gradients(dictionary, x_TD, a)
    run.silent_for += 1
    run.silent_for[a.latent] = 0
    silent_S = (run.silent_for > plan.silent_after).nonzero().squeeze(1)
    if len(silent_S) > 0:
        part = slice(0, len(x_TD), max(1, len(x_TD) // _AUX_TOKENS))
        silent_S = silent_S[torch.randperm(len(silent_S))[:2048]]
        add_auxiliary(
            dictionary,
            grads,
            x_TD[part],
            z_TL[part][:, silent_S],
            error_TD[part],
            silent_S,
            plan.aux_k,
            plan.aux_weight,
        )
    W_dec = dictionary.W_dec
    grads[2] -= (grads[2] * W_dec).sum(1, keepdim=True) * W_dec  # Along the row the step would only change its norm.
    _adam(run, grads, plan.lr * _schedule(run.step, plan))
    W_dec.copy_(normalize(W_dec))
    if run.step % plan.revive_every == 0 and run.step < (1 - plan.decay) * plan.steps - plan.silent_after:
        _revive(run, plan, error_TD)
    run.step += 1
    run.seen += len(x_TD)
    run.lowest = lowest
    return float(loss)


def _revive(run: Run, plan: TrainPlan, error_TD: torch.Tensor) -> None:
    """Point the longest silent latents at what is least explained (Bricken et al. 2023, "neuron resampling").

    Decoder row: the direction of a token's missing part, tokens drawn by squared error. Encoder row: the same, as long as
    the live ones' are on average, which on that token is well above the threshold.
    """
    n = min(plan.revive, int((run.silent_for > plan.silent_after).sum()))
    if n == 0:
        return
    generator = torch.Generator().manual_seed(plan.seed + run.step)
    tokens = torch.multinomial(error_TD.square().sum(1), n, generator=generator)
    latents = run.silent_for.topk(n).indices
    dictionary = run.dictionary
    live = run.silent_for <= plan.silent_after
    missing = normalize(-error_TD[tokens])
    dictionary.W_dec[latents] = missing
    dictionary.W_enc[latents] = missing * dictionary.W_enc[live].norm(dim=1).mean()
    dictionary.b_enc[latents] = 0.0
    for moment in run.moments[:6]:  # Of W_enc, b_enc, W_dec: both moments of each.
        moment[latents] = 0.0
    run.silent_for[latents] = 0


def _schedule(step: int, plan: TrainPlan) -> float:
    return min((step + 1) / plan.warmup, 1.0, (plan.steps - step) / (plan.decay * plan.steps))


def _adam(run: Run, grads: list[torch.Tensor], lr: float, beta1: float = 0.9, beta2: float = 0.99) -> None:
    """One step of torch's fused Adam; the moments are plain tensors, so that a checkpoint is too."""
    parameters = list(run.dictionary.parameters())
    steps = [torch.tensor(run.step + 1.0) for _ in parameters]
    torch._fused_adam_(
        parameters, grads, run.moments[0::2], run.moments[1::2], [], steps, lr=lr, beta1=beta1, beta2=beta2,
        weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
