"""RelP's rules: the same values, another gradient, which goes through the non-linear places of a block as if they were linear.

    norm          x · (1/σ) w         1/σ is a constant                            LN-rule
    activation    x · (f(x) / x)      the ratio is a constant                      identity rule
    gate          a ⊙ b               each factor gets half of the gradient        half rule
    attention     Σ_j A_ij v_j        the pattern A is a constant                  AH-rule

Each rule is a hook whose result equals the module's own to the last bit: value.detach() + (x − x.detach()) · constant.

Source: relevance patching, arXiv 2508.21258; the rules are those of layer-wise relevance propagation for transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.attribution.errors import ModelError
from trimtab.attribution.model import SplitModel

__all__ = ["relp"]


@contextmanager
def relp(model: SplitModel) -> Iterator[None]:
    """Within it, gradients through the upper blocks follow the rules.

    Raises:
        ModelError: the blocks are not Llama-like, so the rules do not say what to do with them.
    """
    with ExitStack() as hooks:
        norms = [model.final_norm]
        for block in model.upper_blocks:
            attention: Any = getattr(block, "self_attn", None)
            mlp: Any = getattr(block, "mlp", None)
            names = [
                (attention, "q_proj"),
                (attention, "k_proj"),
                (mlp, "act_fn"),
                (mlp, "gate_proj"),
                (mlp, "down_proj"),
            ]
            if any(not isinstance(getattr(owner, name, None), nn.Module) for owner, name in names) or len(
                block._modules
            ) != len(("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")):
                raise _unknown(model)
            norms += [getattr(block, "input_layernorm", None), getattr(block, "post_attention_layernorm", None)]
            hooks.enter_context(_hook(attention.q_proj, _constant))
            hooks.enter_context(_hook(attention.k_proj, _constant))
            hooks.enter_context(_hook(mlp.act_fn, _identity_rule))
            hooks.callback(mlp.down_proj.register_forward_pre_hook(_half_rule).remove)
        for norm in norms:
            if not isinstance(getattr(norm, "variance_epsilon", None), float):
                raise _unknown(model)
            hooks.enter_context(_hook(norm, _norm_rule))
        yield


def _unknown(model: SplitModel) -> ModelError:
    return ModelError(
        f"RelP's rules are known for Llama-like blocks, which those of {model.identity.architecture} are not; "
        "use --gradient plain"
    )


@contextmanager
def _hook(module: Any, rule: Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(rule)
    try:
        yield
    finally:
        handle.remove()


def _constant(module: Any, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out.detach()


def _norm_rule(module: Any, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
    (x,) = arguments
    x32 = x.detach().float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + module.variance_epsilon)
    constant: Tensor = (scale * module.weight).to(x.dtype)
    return out.detach() + (x - x.detach()) * constant


def _identity_rule(module: Any, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
    (x,) = arguments
    ratio = (out / x).detach().nan_to_num(0.0)
    return out.detach() + (x - x.detach()) * ratio


def _half_rule(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x,) = arguments
    return (0.5 * x.detach() + 0.5 * x,)
