"""Which decoder layers can be hooked, and where the residual stream is in what they return.

    pair     (hidden, residual): the stream is hidden + residual (vLLM's fused add-and-norm layers)
    single   one tensor: it is the stream
    decoy    a tuple whose first is already the stream; the second is stale
    alone    (hidden, None): the first is the stream

Adding Δ to the first tensor is right for every kind; the kind says what is *read*. A class that is not listed is refused:
reading the wrong tensor would steer wrongly and look fine. To add one: read its forward in the installed vLLM, enter it here,
and run the parity tests on a tiny random model of that architecture. Not steerable in this release: layers of several streams
(Gemma 3n, hyper-connection models), and layers that leave a partial sum per rank (`vllm/models/*`).
"""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from torch import nn

from trimtab.server.errors import Unsupported

__all__ = ["KINDS", "HookPoint", "Kind", "elsewhere", "find"]

Kind = Literal["pair", "single", "decoy", "alone"]

_MODELS = "vllm.model_executor.models."
KINDS: dict[str, Kind] = {
    # By parity with transformers on the real engine (SmolLM2).
    _MODELS + "llama.LlamaDecoderLayer": "pair",
    # By parity on tiny random models, in the study before this plugin.
    _MODELS + "gemma3.Gemma3DecoderLayer": "pair",
    _MODELS + "gpt2.GPT2Block": "single",
    _MODELS + "commandr.CohereDecoderLayer": "decoy",
    # By reading their forward in vLLM 0.32, line for line that of Llama or Gemma 3; not run here.
    _MODELS + "mistral.MistralDecoderLayer": "pair",
    _MODELS + "qwen2.Qwen2DecoderLayer": "pair",
    _MODELS + "qwen3.Qwen3DecoderLayer": "pair",
    _MODELS + "gemma2.Gemma2DecoderLayer": "pair",
}
"""Class of a decoder layer → kind, and how it was verified."""


class HookPoint(NamedTuple):
    """One hooked layer: `blocks.{layer}.resid_post`."""

    layer: int
    kind: Kind
    module: nn.Module


def find(model: nn.Module, only: list[int] | None = None) -> list[HookPoint]:
    """The hook points of the decoder layers that this rank owns, ascending; `only` restricts them.

    Raises:
        Unsupported: no layer of a listed class, a layer of an unlisted one, or one whose forward was replaced.
    """
    points = []
    for layer, module in _numbered(model):
        if _is_elsewhere(module):
            continue
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        if name not in KINDS:
            raise Unsupported(
                f"decoder layers of class {name} are not in the table of verified layers "
                f"({', '.join(sorted(k.rsplit('.', 1)[1] for k in KINDS))}); serve such a model, or add the class to "
                "trimtab/server/engine/layers.py after its parity test passes"
            )
        points.append(HookPoint(layer, KINDS[name], module))
    points.sort(key=lambda point: point.layer)
    layers = [point.layer for point in points]
    if not points or len(set(layers)) != len(layers):
        raise Unsupported(f"model {type(model).__name__} has no single stack of numbered decoder layers to hook")
    if only is not None:
        points = [point for point in points if point.layer in only]
        if not points and not set(only) & set(elsewhere(model)):
            raise Unsupported(
                f"none of the steerable layers {sorted(only)} is among this rank's layers {layers[0]}..{layers[-1]}"
            )
    return points


def elsewhere(model: nn.Module) -> list[int]:
    """The layers that other pipeline stages own, ascending."""
    return sorted(layer for layer, module in _numbered(model) if _is_elsewhere(module))


def _numbered(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    for name, module in model.named_modules():
        if match := re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)$", name):
            yield int(match.group(1)), module


def _is_elsewhere(module: nn.Module) -> bool:
    return type(module).__name__ == "PPMissingLayer"
