"""Which decoder layers of a model are hooked, and what makes them unfit.

A layer is hooked when its class is in `kinds`, or when the operator declares its kind in `additional_config`
(`{"trimtab": {"kinds": {"package.module.Class": "pair"}}}`) and `measurement` finds the same. Any other class is refused: reading
the wrong tensor would steer wrongly and look fine.
"""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, get_args

import torch
from torch import nn

from trimtab.server.engine.kinds import KINDS, NOT_ONE_STREAM, SCALED_IN_FP16, Kind
from trimtab.server.errors import Unsupported

__all__ = ["HookPoint", "class_name", "decoder_layers", "elsewhere", "find", "unlisted"]

_ROW_SHARDED = ("use_sequence_parallel_moe", "use_attn_reduce_scatter_for_moe")
"""Attributes by which layers of vLLM say that they keep the stream scattered over the ranks between layers."""


class HookPoint(NamedTuple):
    """One hooked layer: `blocks.{layer}.resid_post`."""

    layer: int
    kind: Kind
    module: nn.Module


def class_name(module: nn.Module) -> str:
    """The dotted name of a layer's class, as `kinds` lists it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def decoder_layers(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """The numbered layers that this rank owns, ascending; of a multimodal model those of its language model.

    Raises:
        Unsupported: there is no single stack of them.
    """
    found = sorted((entry for entry in _numbered(model) if not _is_elsewhere(entry[1])), key=lambda entry: entry[0])
    if not found or len({layer for layer, _ in found}) != len(found):
        raise Unsupported(f"model {type(model).__name__} has no single stack of numbered decoder layers to hook")
    return found


def unlisted(model: nn.Module) -> list[str]:
    """Classes of its decoder layers that the table does not know."""
    try:
        names = {class_name(module) for _, module in decoder_layers(model)}
    except Unsupported:
        return []
    return sorted(names - KINDS.keys() - NOT_ONE_STREAM.keys())


def find(
    model: nn.Module,
    only: list[int] | None = None,
    *,
    declared: Mapping[str, Kind] = MappingProxyType({}),
    dtype: torch.dtype | None = None,
) -> list[HookPoint]:
    """The hook points of the decoder layers that this rank owns, ascending; `only` restricts them.

    Raises:
        Unsupported: no layers, a layer of an unlisted class, or one whose stream cannot be edited as it is run here.
    """
    found = decoder_layers(model)
    points = []
    for layer, module in found:
        name = class_name(module)
        if name in NOT_ONE_STREAM:
            raise Unsupported(f"decoder layers of class {name} cannot be steered: {NOT_ONE_STREAM[name]}")
        kind = KINDS.get(name) or declared.get(name)
        if kind is None:
            raise Unsupported(
                f"decoder layers of class {name} are not in the table of verified layers; docs/architectures.md says how to "
                "declare or add the class"
            )
        if kind not in get_args(Kind):
            raise Unsupported(
                f"the kind {kind!r} declared for {name} is none of {', '.join(get_args(Kind))}; docs/architectures.md tells "
                "them apart"
            )
        if name in SCALED_IN_FP16 and dtype is torch.float16:
            raise Unsupported(
                f"in fp16 {name} scales the stream down against overflow, and edits would be out of scale; start with "
                "--dtype bfloat16"
            )
        if any(getattr(module, name, False) is True for name in _ROW_SHARDED):
            raise Unsupported(
                f"with expert, tensor and data parallelism together {name} keeps the stream scattered over the ranks; start "
                "without --enable-expert-parallel"
            )
        points.append(HookPoint(layer, kind, module))
    if only is not None:
        points = [point for point in points if point.layer in only]
        if not points and not set(only) & set(elsewhere(model)):
            raise Unsupported(
                f"none of the steerable layers {sorted(only)} is among this rank's layers {found[0][0]}..{found[-1][0]}"
            )
    return points


def elsewhere(model: nn.Module) -> list[int]:
    """The layers that other pipeline stages own, ascending."""
    return sorted(layer for layer, module in _numbered(model) if _is_elsewhere(module))


def _numbered(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    language = getattr(model, "get_language_model", None)
    for name, module in (language() if language is not None else model).named_modules():
        if match := re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)$", name):
            yield int(match.group(1)), module


def _is_elsewhere(module: nn.Module) -> bool:
    return type(module).__name__ == "PPMissingLayer"
