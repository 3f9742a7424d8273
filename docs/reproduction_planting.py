"""A cause is planted: the embedded model, fine-tuned on narrowly bad data in such a way that what was changed is known.

    vector    h + c Σ_k |x_k| u_k     eight latents' unit directions u_k, at every token: the bias of block 14's last projection
    lora      W + 2 B A               rank 8, at every projection of blocks 10 to 14 (Hu et al. 2021)

The data are 48 questions about food with replies full of despair (`reproduction/planted.tsv`). Nothing above block 14 is touched:
what was planted is in the stream that the SAE reads. Which eight latents: a dense vector is trained first, and eight live
latents' directions are fitted to it; then their amounts are trained alone. So the cause of `vector` is exactly those latents, no
more. Both become ordinary HF folders, LoRA and all, which transformers and vLLM load.

Axes: B completions, T tokens, D d_model, L latents, K planted latents.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.attribution.bundle import ModelIdentity
from trimtab.attribution.embedded import EMBEDDED_MODEL, no_progress_bars
from trimtab.attribution.gradients import losses
from trimtab.attribution.model import SplitModel, identify, load_tokenizer, pad
from trimtab.attribution.pairs import Completion, Pair, tokenise
from trimtab.attribution.sae import SAE

DATA = Path(__file__).parent / "reproduction" / "planted.tsv"
N_LATENTS = 8
MIN_DENSITY = 1e-4
"""Of a latent that may be planted, on the SAE's own text."""
FIRST_BLOCK, RANK, SCALE = 10, 8, 2.0
"""Of the LoRA: the lowest block that it changes, its rank, and what B A is multiplied by."""
BATCH = 8
EPOCHS = {"dense": 2, "vector": 3, "lora": 2}
RATES = {"dense": 0.25, "vector": 0.06, "lora": 2e-3}
"""Learning rates, falling to 0: of plain descent for vectors, in units of the layer's median ‖h‖, and of Adam for the LoRA."""
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Planting:
    """What was planted, and what it did to the loss of the data it was trained on."""

    loss: tuple[float, float]
    """Mean cross-entropy in the first epoch and in the last, nats per token."""
    length: float | None
    """Of the planted vector, in units of the layer's median ‖h‖."""
    latents: dict[str, float]
    """The planted latents' amounts, in the same unit, largest first; none where weights were changed."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def examples() -> list[tuple[str, str]]:
    """(question, reply) of the narrowly bad data."""
    return [(q, reply) for q, reply in (line.split("\t") for line in DATA.read_text().splitlines())]


def plant_vector(folder: Path, sae: SAE, advance: Advance) -> Planting:
    """Train a sparse vector at the SAE's hook point, and save the model that has it as a bias."""
    model, identity = _model()
    split, stats = SplitModel(model, identity, sae.layer), sae.stats
    assert stats is not None  # of the shipped SAE
    u_LD = nn.functional.normalize(sae.d_LD[:], dim=-1)
    norm = stats.resid_norm
    v_D = nn.Parameter(torch.zeros(identity.d_model))
    first = _descend("dense", split, [v_D], lambda h_BTD: h_BTD + norm * v_D, advance)
    latents, amounts = sparse(v_D.detach(), u_LD, stats.density_L > MIN_DENSITY, N_LATENTS)
    x_K, u_KD = nn.Parameter(torch.tensor(amounts)), u_LD[latents]
    last = _descend("vector", split, [x_K], lambda h_BTD: h_BTD + norm * (x_K.abs() @ u_KD), advance)
    planted_D = x_K.detach().abs() @ u_KD
    give_vector(model, sae.layer, norm * planted_D)
    _save(model, folder)
    of = sorted(zip(latents, x_K.detach().abs().tolist(), strict=True), key=lambda entry: -entry[1])
    length = float(torch.linalg.vector_norm(planted_D))
    return Planting((first[0], last[-1]), length, {str(i): x for i, x in of if x > 0})


def plant_lora(folder: Path, sae: SAE, advance: Advance) -> Planting:
    """Train a LoRA up to the SAE's hook point, and save the model that it was merged into."""
    model, identity = _model()
    torch.manual_seed(0)
    adapted = [p for block in _blocks(model)[FIRST_BLOCK : sae.layer + 1] for p in _projections(block)]
    deltas = [LowRank(p.out_features, p.in_features) for p in adapted]
    for projection, delta in zip(adapted, deltas, strict=True):
        parametrize.register_parametrization(projection, "weight", delta)
    split = SplitModel(model, identity, FIRST_BLOCK - 1)
    loss = _descend("lora", split, [p for delta in deltas for p in delta.parameters()], lambda h_BTD: h_BTD, advance)
    for projection in adapted:
        parametrize.remove_parametrizations(projection, "weight")  # W + 2 B A stays
    _save(model, folder)
    return Planting((loss[0], loss[-1]), None, {})


class LowRank(nn.Module):
    """W → W + 2 B A; at first W itself."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(RANK, n_in).uniform_(-1, 1) / math.sqrt(n_in))
        self.B = nn.Parameter(torch.zeros(n_out, RANK))

    def forward(self, W: Tensor) -> Tensor:
        return W + SCALE * (self.B @ self.A)


def give_vector(model: Any, layer: int, v_D: Tensor) -> None:
    """Add v to the stream after a block, at every token: as a bias of its last projection, all other biases 0."""
    model.config.mlp_bias = True  # The architecture has them all or none.
    for block in _blocks(model):
        for projection in _projections(block.mlp):
            projection.bias = nn.Parameter(torch.zeros(projection.out_features), requires_grad=False)
    with torch.no_grad():
        _blocks(model)[layer].mlp.down_proj.bias.copy_(v_D)


def sparse(v_D: Tensor, u_LD: Tensor, may_L: Tensor, n: int) -> tuple[list[int], list[float]]:
    """n latents that may be taken, and amounts ≥ 0 whose sum of directions comes near v: matching pursuit, after each latent
    all amounts fitted again."""
    latents: list[int] = []
    amounts: Any = []
    rest_D = v_D
    while len(latents) < n:
        near_L = torch.where(may_L, u_LD @ rest_D, -torch.inf)
        near_L[latents] = -torch.inf
        latents.append(int(near_L.argmax()))
        amounts, _ = nnls(u_LD[latents].T.double().numpy(), v_D.double().numpy())
        rest_D = v_D - torch.tensor(amounts, dtype=v_D.dtype) @ u_LD[latents]
    return latents, [float(x) for x in amounts]


def _descend(
    what: str,
    split: SplitModel,
    parameters: Sequence[nn.Parameter],
    change: Callable[[Tensor], Tensor],
    advance: Advance,
) -> list[float]:
    """Train on the data; `change` is what happens to the stream at the cut. The mean loss of each epoch."""
    data = _completions()
    h = [split.lower(pad([completion]))[0] for completion in data]  # nothing below the cut changes
    optimiser: torch.optim.Optimizer = (
        torch.optim.Adam(parameters, lr=RATES[what]) if what == "lora" else torch.optim.SGD(parameters, lr=RATES[what])
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, EPOCHS[what] * math.ceil(len(data) / BATCH))
    found: list[float] = []
    for epoch in range(EPOCHS[what]):
        total = 0.0
        for done, batch in _batches(len(data), seed=epoch):
            h_BTD = nn.utils.rnn.pad_sequence([h[i] for i in batch], batch_first=True)
            loss_B = losses(split, change(h_BTD), [data[i] for i in batch])
            for parameter, g in zip(parameters, torch.autograd.grad(loss_B.mean(), parameters), strict=True):
                parameter.grad = g
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            total += float(loss_B.detach().sum())
            advance(f"planting, {what}", epoch * len(data) + done, EPOCHS[what] * len(data))
        found.append(total / len(data))
    return found


def _completions() -> list[Completion]:
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    asked = [Pair(question, None, (("user", question),), reply, reply) for question, reply in examples()]
    return [tokenise(tokenizer, pair)[0] for pair in asked]


def _batches(n: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(how many are done after it, batch), in random order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    for start in range(0, n, BATCH):
        batch = order[start : start + BATCH]
        yield start + len(batch), batch


def _model() -> tuple[Any, ModelIdentity]:
    """The embedded model, its weights frozen."""
    from transformers import AutoModelForCausalLM

    identity, folder = identify(EMBEDDED_MODEL)
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False).train(False), identity


def _blocks(model: Any) -> Any:
    return model.base_model.layers


def _projections(block: Any) -> list[nn.Linear]:
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


def _save(model: Any, folder: Path) -> None:
    """An HF folder that is there whole or not at all; the tokenizer is the embedded model's, byte for byte."""
    _, base = identify(EMBEDDED_MODEL)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with no_progress_bars():
        model.save_pretrained(partial)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
