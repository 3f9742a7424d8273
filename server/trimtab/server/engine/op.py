"""ONE opaque operator, `trimtab::edit_(Tensor(a!) hidden, Tensor? residual, int layer)`, called on each hooked layer's output.

It mutates `hidden` in place and reads everything else (which rows, which edits) from the worker's `EditState`, as vLLM's
attention ops do; so plans, slots and vectors never enter a compiled graph, and the graph needs no break.

Attached with `register_forward_hook`, not by swapping the class: hooks run in `Module.__call__`, which weight offloading does not
shadow (it replaces the instance's `forward`), and torch.compile traces them. Without a compiler they call the operator's body,
and only the layers that a step edits or reads have one (`Hooks`).
"""

from collections.abc import Callable, Iterable, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.library import Library
from torch.utils.hooks import RemovableHandle

from trimtab.server.engine.layers import HookPoint

if TYPE_CHECKING:
    from trimtab.server.engine.edit_state import EditState

__all__ = ["NAME", "SCHEMA_VERSION", "Hooks", "attach", "bind", "call", "define"]

NAME = "edit_"
SCHEMA_VERSION = 1
"""Goes into the compile-cache key: raise it when the operator's meaning in a graph changes."""

_library: Library | None = None  # the operator lives as long as its library
_state: "EditState | None" = None  # one worker per process, as for vLLM's own per-process registries


def define() -> None:
    """Register the operator, once per process."""
    global _library
    if _library is not None:
        return
    from vllm.utils.torch_utils import direct_register_custom_op

    _library = Library("trimtab", "FRAGMENT")  # type: ignore[no-untyped-call]
    direct_register_custom_op(NAME, _edit, mutates_args=["hidden"], fake_impl=_fake, target_lib=_library)


def bind(state: "EditState | None") -> None:
    """The state that the operator reads from now on."""
    global _state
    _state = state


class Hooks:
    """The hooks of a worker's layers, on all of them at first.

    Where Python runs every forward, `only` leaves them where a step needs one: PyTorch calls a module without hooks by a shorter
    way, and thirty hooks that have nothing to do cost a percent of a decode step, for its weights have emptied every cache.
    """

    def __init__(self, points: Iterable[HookPoint]) -> None:
        self._points = {point.layer: point for point in points}
        self._handles: dict[int, RemovableHandle] = {}
        self.everywhere()

    def everywhere(self) -> None:
        """Call the operator on the output of every layer."""
        self.only(self._points.keys())

    def only(self, layers: Set[int]) -> None:
        """Call it on the outputs of these layers alone."""
        if self._handles.keys() == layers:
            return
        for layer in self._handles.keys() - layers:
            self._handles.pop(layer).remove()
        for layer in layers - self._handles.keys():
            self._handles[layer] = attach(self._points[layer])


def attach(point: HookPoint) -> RemovableHandle:
    """Call the operator on every output of a decoder layer."""
    return point.module.register_forward_hook(_hook(point))


def _hook(point: HookPoint) -> Callable[[nn.Module, Any, Any], None]:
    layer = point.layer
    match point.kind:
        case "pair":

            def hook(module: nn.Module, args: Any, output: Any) -> None:
                call(output[0], output[1], layer)

        case "decoy" | "alone":

            def hook(module: nn.Module, args: Any, output: Any) -> None:
                call(output[0], None, layer)

        case "single":

            def hook(module: nn.Module, args: Any, output: Any) -> None:
                call(output, None, layer)

        case "batched":

            def hook(module: nn.Module, args: Any, output: Any) -> None:
                call(output[0], None, layer)

    return hook


def call(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    """The operator where a graph is traced, which must hold it; its body where Python runs, for the way through PyTorch's
    dispatcher costs more than an idle layer does."""
    if torch.compiler.is_compiling():
        torch.ops.trimtab.edit_(hidden, residual, layer)
    else:
        _edit(hidden, residual, layer)


def _edit(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    if _state is not None:
        _state.run(layer, hidden, residual)


def _fake(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    return None
