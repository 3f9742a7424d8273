"""A causal language model cut in two at one hook point, so that everything below it is computed once and without gradients.

    ids [B, T] ── lower: embedding, blocks 0 … layer ──► h [B, T, D] ── upper: the other blocks, final norm, head ──► logits

Sequences are padded on the right. Attention is causal, so no real token can see the padding: a batch is exact without a mask.
The stream after blocks further up (`above`) is kept on the way, so one backward pass gives the gradient at several hook points.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from trimtab.attribution.bundle import ModelIdentity
from trimtab.attribution.embedded import no_progress_bars, resolve
from trimtab.attribution.errors import ModelError
from trimtab.attribution.fingerprint import FingerprintError, model_fingerprint, model_folder, tokenizer_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from trimtab.attribution.pairs import Completion

__all__ = ["Prefix", "SplitModel", "compute_device", "identify", "load_tokenizer", "pad", "special_tokens"]


class SplitModel:
    """A model, its weights frozen, cut after block `layer`."""

    def __init__(self, model: nn.Module, identity: ModelIdentity, layer: int, above: Sequence[int] = ()) -> None:
        for asked in (layer, *above):
            if not 0 <= asked < identity.n_layers:
                raise ModelError(
                    f"layer {asked} is outside the {identity.n_layers} layers of {identity.id}; use another SAE"
                )
        self.identity, self.layer, self.above = identity, layer, tuple(above)
        self.config: Any = model.config
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._model = model
        self._base = cast("nn.Module", model.base_model)
        self._head = cast("nn.Module", model.get_output_embeddings())  # type: ignore[operator]
        name = next((n for n in ("layers", "h") if isinstance(getattr(self._base, n, None), nn.ModuleList)), None)
        if name is None:
            raise ModelError(
                f"cannot find the blocks of {identity.architecture}; Llama-like and GPT-2-like models are known"
            )
        for field in ("logits_scaling", "logit_scale"):
            if getattr(self.config, field, None) not in (None, 1, 1.0):
                raise ModelError(
                    f"{identity.architecture} scales its logits (`{field}`), which attribution does not know"
                )
        blocks = list(getattr(self._base, name))
        self.upper_blocks: list[nn.Module] = blocks[layer + 1 :]
        self._capture, self._inject = _Keep(blocks[layer]), _Inject(blocks[layer])
        self._taps = {i: _Keep(blocks[i]) for i in self.above}
        self._lower = _with_blocks(self._base, name, [*blocks[:layer], self._capture])
        upper = [self._taps.get(i, block) for i, block in enumerate(blocks)][layer + 1 :]
        self._upper = _with_blocks(self._base, name, [*map(_Skip, blocks[:layer]), self._inject, *upper])

    @classmethod
    def load(
        cls,
        model: str,
        layer: int,
        above: Sequence[int] = (),
        *,
        dtype: torch.dtype | None = None,
        tensor_parallel: bool = False,
    ) -> SplitModel:
        """Load an HF folder, hub id or the embedded model's name: on CUDA in bf16 where there is one, else in fp32.

        With `tensor_parallel` its weights are shared out over the processes that `torchrun` started, by transformers' own plan.

        Raises:
            ModelError: there is no such model, or its blocks cannot be found, or it has no plan for tensor parallelism.
        """
        from transformers import AutoModelForCausalLM

        identity, folder = identify(model)
        device = compute_device()
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        place: dict[str, Any] = {"device_map": device}
        if tensor_parallel:
            from transformers.distributed.configuration_utils import DistributedConfig

            place = {"distributed_config": DistributedConfig(tp_plan="auto")}
        try:
            with no_progress_bars():
                loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **place)
        except (OSError, ValueError) as e:
            raise ModelError(
                f"cannot load model {model!r}: {str(e).splitlines()[0]}; give an ordinary HF folder"
            ) from e
        loaded.requires_grad_(False).train(False)
        return cls(loaded, identity, layer, above)

    def at(self, layer: int) -> SplitModel:
        """The same weights, cut after another block."""
        return self if layer == self.layer else SplitModel(self._model, self.identity, layer)

    @property
    def n_parameters(self) -> int:
        """Weights of the whole model."""
        return sum(weight.numel() for weight in self._model.parameters())

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm before the head."""
        return next((getattr(self._base, n) for n in ("norm", "ln_f") if hasattr(self._base, n)), None)

    @torch.no_grad()
    def lower(self, ids_BT: Tensor) -> Tensor:
        """The residual stream h [B, T, D] at the hook point."""
        self._lower(input_ids=ids_BT.to(self.device), use_cache=False)
        return self._capture.take()

    def upper(self, h_BTD: Tensor, prefix: Prefix | None = None) -> Tensor:
        """The stream [B, T, D] after the final norm, as a function of h; gradients flow.

        With a `prefix`, h starts right after its tokens, in every sequence of the batch.
        """
        self._inject.h_BTD = h_BTD
        if prefix is None:
            return cast("Tensor", self._upper(inputs_embeds=h_BTD, use_cache=False).last_hidden_state)
        n_batch, n_tokens, _ = h_BTD.shape
        positions_T = torch.arange(prefix.n_tokens, prefix.n_tokens + n_tokens, device=h_BTD.device)
        hidden_TS = positions_T[:, None] < torch.arange(prefix.n_tokens + n_tokens, device=h_BTD.device)[None]
        mask_TS = torch.zeros(hidden_TS.shape, dtype=h_BTD.dtype, device=h_BTD.device)
        mask_TS.masked_fill_(hidden_TS, torch.finfo(h_BTD.dtype).min)
        out = self._upper(
            inputs_embeds=h_BTD,
            position_ids=positions_T[None],
            attention_mask=mask_TS.expand(n_batch, 1, -1, -1),
            past_key_values=prefix.cache(n_batch),
            use_cache=True,
        )
        return cast("Tensor", out.last_hidden_state)

    def above_streams(self) -> dict[int, Tensor]:
        """The stream after each block of `above`, as the last call of `upper` made it; part of its graph."""
        return {i: tap.take() for i, tap in self._taps.items()}

    @torch.no_grad()
    def prefix(self, h_TD: Tensor) -> Prefix | None:
        """What the upper blocks keep of tokens that no edit touches; None for a model whose attention is not plain causal."""
        from transformers import DynamicCache

        if getattr(self.config, "sliding_window", None) is not None:
            return None
        kept = DynamicCache()
        self._inject.h_BTD = h_TD[None]
        self._upper(inputs_embeds=h_TD[None], past_key_values=kept, use_cache=True)
        layers: list[Any] = kept.layers
        above = range(self.layer + 1, self.identity.n_layers)
        return Prefix(len(h_TD), {i: (layers[i].keys, layers[i].values) for i in above})

    def logits(self, y_ND: Tensor) -> Tensor:
        """Logits [N, vocabulary] of rows of `upper`'s result; apply it to the positions that matter, it is the dearest step."""
        logits_NV: Tensor = self._head(y_ND).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)

    def promoted_tokens(self, d_ND: Tensor, k: int) -> list[list[int]]:
        """The k token ids whose logits each direction raises most, seen through the final norm's weight alone."""
        weight = getattr(self.final_norm, "weight", None)
        d_ND = d_ND.to(self.device, self.dtype)
        with torch.no_grad():
            logits_NV = self._head(d_ND if weight is None else d_ND * weight)
        return cast("list[list[int]]", logits_NV.topk(k, dim=-1).indices.tolist())


def compute_device() -> torch.device:
    """The accelerator of this process where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def identify(model: str) -> tuple[ModelIdentity, Path]:
    """The identity of a model as a bundle records it, and its folder.

    Raises:
        ModelError: the folder is missing or lacks weights, tokenizer or config.
    """
    from transformers import AutoConfig

    try:
        folder = model_folder(resolve(model))
        config = AutoConfig.from_pretrained(folder)
        architectures = config.architectures or [type(config).__name__]
        identity = ModelIdentity(
            id=model if not Path(model).is_dir() else Path(model).name,
            architecture=architectures[0],
            d_model=config.hidden_size,
            n_layers=config.num_hidden_layers,
            fingerprint=model_fingerprint(folder),
            tokenizer=tokenizer_digest(folder),
        )
    except (FingerprintError, OSError, ValueError, AttributeError) as e:
        raise ModelError(f"cannot read model {model!r}: {str(e).splitlines()[0]}") from e
    return identity, folder


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that `identify` accepts."""
    from transformers import AutoTokenizer

    return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(model_folder(resolve(model))))


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """The ids that the server takes for special: those the tokenizer names, and added tokens marked so."""
    added = tokenizer.added_tokens_decoder
    return frozenset([*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)])


def pad(completions: Sequence[Completion]) -> Tensor:
    """Token ids [B, T], padded on the right with id 0, which no real token can see."""
    return nn.utils.rnn.pad_sequence([torch.tensor(c.ids) for c in completions], batch_first=True)


class Prefix(NamedTuple):
    """The keys and values of the upper blocks over the first tokens of a sequence."""

    n_tokens: int
    blocks: dict[int, tuple[Tensor, Tensor]]
    """Keys and values [1, heads, tokens, width] of each block, by its index."""

    def cache(self, n_batch: int) -> Any:
        """As transformers wants it, the same for each sequence of a batch."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for i, (keys, values) in self.blocks.items():
            cache.update(keys.expand(n_batch, -1, -1, -1), values.expand(n_batch, -1, -1, -1), i)
        return cache


class _Block(nn.Module):
    """Stands in a block's place and shows the model the attributes that it asks of blocks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type


class _Skip(_Block):
    """Passes its input on."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Inject(_Block):
    """Puts `h_BTD` into the stream, whatever came from below."""

    h_BTD: Tensor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h_BTD, self.h_BTD = self.h_BTD, torch.empty(0)
        return h_BTD


class _Keep(_Block):
    """Runs the real block and keeps its output."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.block = block
        self._h_BTD = torch.empty(0)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.block(hidden_states, *args, **kwargs)
        self._h_BTD = out[0] if isinstance(out, tuple) else out
        return self._h_BTD

    def take(self) -> Tensor:
        h_BTD, self._h_BTD = self._h_BTD, torch.empty(0)
        return h_BTD


def _with_blocks(base: nn.Module, name: str, blocks: list[nn.Module]) -> nn.Module:
    """`base` with other blocks; shares every weight and leaves `base` as it was."""
    other = copy.copy(base)
    other._modules = {**base._modules, name: nn.ModuleList(blocks)}
    return other
