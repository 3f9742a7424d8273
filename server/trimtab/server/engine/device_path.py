"""The edit as it must be inside a CUDA graph: no choice on the host, only fixed shapes and persistent buffers.

    s_T  = row_slot[:T]                                                  slot 0 is the unedited row
    Δ_TD = Σ_k g[s, k] (α[s, k] + β[s, k] φ(e_i · h + b_i)) d_i          with i = place[s, k], a row of the pool

The host writes row_slot before the forward, and a slot's rows of the tables when the slot is first used; a replayed graph reads
them, and the model's own buffer of tokens. ‖Δ‖/‖h‖ of each edited row goes to a buffer that the host clears to −1 first, so a
graph that was captured without the operator is seen at once: its rows are never counted, and the reply fails closed.

Computed by one Triton kernel (`kernel`), or where Triton cannot run by torch ops (`kernel_torch`), which are its oracle too.
`armed` says whether the operator launches anything: a step without edits launches nothing, and `graphs` captures each CUDA graph
both ways.

A gate that stays open, in a step that runs several tokens of its request (a prefill, or drafts), has to be read on all of them
before any is edited. That is a launch more, `watch`, which graphs do not hold: such a step runs without one (`graphless`).

Axes: as in `buffers`.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.attribution.edit import Rows
from trimtab.server.engine import kernel_torch
from trimtab.server.engine.buffers import Buffers
from trimtab.server.engine.device_slots import DeviceSlots, Span
from trimtab.server.engine.onward import Onward
from trimtab.server.engine.work import Piece
from trimtab.server.plan import PlanRow

__all__ = ["DevicePath", "Found", "to_host"]


class Found(NamedTuple):
    """What a step did, by layer, row by row of its pieces."""

    ratios: Mapping[int, NDArray[np.float32] | None]
    """‖Δ‖/‖h‖; None or below 0 where the operator did not run."""
    flags: Mapping[int, NDArray[np.uint8]]
    """`proof.GATE` and `proof.SPECIAL`; of the layers where a row is conditional."""


class DevicePath:
    """The persistent buffers of one worker, and the operator on them.

    `row` gives a plan's row as one row of the formula, on the device; `token_T` is what the model reads its tokens from, and
    `special_V` says which are special.
    """

    def __init__(
        self,
        layers: Sequence[int],
        d_model: int,
        n_slots: int,
        n_rows: int,
        row: Callable[[PlanRow], Rows],
        token_T: Tensor,
        special_V: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        n_entries: int = 4096,
    ) -> None:
        device = token_T.device
        self.onward = Onward(device, n_entries, grows=False)
        self.buffers = Buffers.of(len(layers), d_model, n_slots, n_rows, token_T, special_V, self.onward.opened_S)
        self._index = {layer: i for i, layer in enumerate(layers)}
        self.slots = DeviceSlots(self._index, self.buffers, row)
        self.capturing: bool | None = None
        """While a CUDA graph is captured: whether the operator launches into it."""
        self._edited: frozenset[int] = frozenset()
        self._watching: frozenset[int] = frozenset()
        self._watched: set[int] = set()
        self.computed_by: Literal["torch", "triton"] = "torch"
        self._kernel: Any = kernel_torch
        if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            from trimtab.server.engine import kernel  # an engine on the CPU needs no Triton

            kernel.warm(self.buffers, dtype)
            self.computed_by, self._kernel = "triton", kernel

    @property
    def armed(self) -> bool:
        """Whether the next forward edits something."""
        return bool(self._edited) if self.capturing is None else self.capturing

    @property
    def graphless(self) -> bool:
        """Whether the next forward must run without a CUDA graph."""
        return bool(self._watching)

    def write(
        self,
        spans: Sequence[Span],
        positions: NDArray[np.int64] | None = None,
        watching: Collection[int] = (),
    ) -> None:
        """Before a forward: the slot of every row, and the tables of slots that are new.

        `positions` [rows of the step] are needed where a gate stays open; `watching` are the layers of those that run several
        tokens of their request.
        """
        slots = self.slots.take(spans)
        self._watching, self._watched = frozenset(watching), set()
        if not spans and not self._edited:
            return
        self._edited = frozenset(layer for span in spans for layer in span.slot)
        b = self.buffers
        # All of the buffer is written: a captured batch may be padded beyond the step's own rows.
        staging_T = torch.zeros(len(b.row_slot_T), dtype=torch.int32, pin_memory=b.row_slot_T.is_cuda)
        for span, slot in zip(spans, slots, strict=True):
            staging_T[span.start : span.stop] = slot
        b.row_slot_T.copy_(staging_T, non_blocking=True)
        if positions is not None:
            position_T = torch.from_numpy(positions)
            position_T = position_T.pin_memory() if b.position_T.is_cuda else position_T
            b.position_T[: len(position_T)].copy_(position_T, non_blocking=True)
        b.ratio_LT.fill_(-1.0)

    def apply(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """The operator's body on the device; `hidden` is edited in place."""
        if not self.armed or (self.capturing is None and layer not in self._edited):
            return
        b, i = self.buffers, self._index[layer]
        if hidden.shape[1] != b.e_PD.shape[1] or len(hidden) > len(b.row_slot_T) or hidden.stride(1) != 1:
            raise ValueError(
                f"a stream of shape {tuple(hidden.shape)} and strides {hidden.stride()} is not what was hooked"
            )
        if self.capturing is None and layer in self._watching:
            self._kernel.watch(b, i, hidden, residual)
            self._watched.add(layer)
        self._kernel.launch(b, i, hidden, residual)

    def found(self, pieces: Mapping[int, Sequence[Piece]], *, flags: bool) -> Callable[[], Found]:
        """Start copying what the step did to the host; the result waits for it."""
        if not pieces:
            return lambda: Found({}, {})
        n = max(piece.stop for found in pieces.values() for piece in found)
        # Copied on the device first: the next step clears the buffers.
        ratio = to_host(self.buffers.ratio_LT[:, :n].clone())
        flag = to_host(self.buffers.flags_LT[:, :n].clone()) if flags else None
        missed = self._watching - self._watched

        def gather() -> Found:
            ratio_LT = ratio().numpy()
            for layer in missed:  # gates were not read before the rows were edited
                ratio_LT[self._index[layer]] = -1.0
            return Found(
                self._by_layer(ratio_LT, pieces), {} if flag is None else self._by_layer(flag().numpy(), pieces)
            )

        return gather

    def _by_layer(self, of_LT: NDArray[Any], pieces: Mapping[int, Sequence[Piece]]) -> dict[int, NDArray[Any]]:
        return {
            layer: np.concatenate([of_LT[self._index[layer], piece.start : piece.stop] for piece in found])
            for layer, found in pieces.items()
        }


def to_host(x: Tensor) -> Callable[[], Tensor]:
    """Start copying to the host; the result waits for it, and for nothing that was launched later."""
    if not x.is_cuda:
        return lambda: x
    host = x.to("cpu", non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return host

    return wait
