"""A CUDA graph on the host: what a capture launched is launched again on the same memory, and no Python of the model runs.

Stands in for `torch.cuda.CUDAGraph`, which needs a GPU. What matters of one is kept: decisions on the host are frozen at capture,
every operation reads and writes the addresses that it had then, and a kernel that was not launched is not in the graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from trimtab.server.engine import op


class FakeGraph(TorchDispatchMode):
    """Records the tensor operations inside `with graph:`; `replay` runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self._launched: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "trimtab":  # the opaque operator's body runs, and what it launches is recorded
            with self:
                return op._edit(*args)
        out = func(*args, **(kwargs or {}))
        self._launched.append((func, args, kwargs or {}, out))
        return out

    @property
    def n_launched(self) -> int:
        """Operations in the graph."""
        return len(self._launched)

    def replay(self) -> None:
        """Everything that was launched, again, into the tensors that it went to then."""
        for func, args, kwargs, out in self._launched:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    with torch.no_grad():
                        old.copy_(new)
