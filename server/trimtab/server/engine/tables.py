"""The rows of the loaded bundles in a worker, and slots: a segment's rows at each layer, gathered and folded once.

Folding: all α of a segment and layer become one vector, Σ α_i d_i; what is left per latent is β_i φ(e_i · h + b_i) d_i with β_i
≠ 0. Rows that depend on the token they meet are not folded: they keep α and β beside the reader of their gate.

A slot is keyed by the segment's key, so requests with the same edits share it. Slots are a cache in front of the bundles' rows:
they can be rebuilt at any time, so they never run out, and nothing leaks when a request ends badly.

Axes: D d_model, K latents of a slot.
"""

import math
from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.attribution.bundle import Bundle
from trimtab.attribution.edit import Rows, project_rows
from trimtab.server.engine.onward import Watch
from trimtab.server.plan import PlanRow, Segment

__all__ = ["SLOT_BYTES", "Conditional", "SlotRows", "Tables"]

SLOT_BYTES = 512 << 20
"""What folded slots may hold beside the bundles' own rows, which vLLM's plan of the memory does not know; the slots of a step are
held whatever they weigh."""


class Conditional(NamedTuple):
    """The rows of a segment at one layer that are gated or leave special tokens alone."""

    rows: Rows
    gate_e_KD: Tensor
    gate_b_K: Tensor
    above_K: Tensor
    """−inf without a gate."""
    gated_K: Tensor
    special_K: Tensor
    """Whether special tokens are left alone."""
    watches: tuple[Watch | None, ...]
    """Of the rows gated `onward`."""
    reads: bool
    """Whether any β is not 0."""


class SlotRows(NamedTuple):
    """One segment's rows at one layer, folded, on the device in fp32."""

    add_D: Tensor | None
    """Σ α_i d_i; None when it is zero throughout."""
    latents: Rows | None
    """The rows with β ≠ 0, their α moved into `add_D`; None when there are none."""
    rows: tuple[PlanRow, ...] = ()
    """As they were before folding."""
    conditional: Conditional | None = None

    @property
    def is_conditional(self) -> bool:
        """Whether a row depends on the token that it meets."""
        return any(row.is_conditional for row in self.rows)

    @property
    def n_bytes(self) -> int:
        """Of the tensors."""
        conditional = self.conditional
        tensors: list[Tensor] = [] if self.add_D is None else [self.add_D]
        for rows in (self.latents, conditional and conditional.rows):
            tensors += vars(rows).values() if rows is not None else ()
        if conditional is not None:
            tensors += (conditional.gate_e_KD, conditional.gate_b_K, conditional.above_K)
        return sum(tensor.nbytes for tensor in tensors)


class Tables:
    """Bundles by content hash, slots by segment key.

    With `fold` false slots hold no tensors: a `DevicePath` keeps its own copy of each row, whatever slots use it.
    """

    def __init__(self, device: torch.device, n_slots: int, *, fold: bool = True) -> None:
        self.device = device
        self.n_slots = n_slots
        self.fold = fold
        self.bundles: dict[str, dict[str, Rows]] = {}
        """content hash → source → rows with α = β = 0."""
        self._slots: OrderedDict[str, dict[int, SlotRows]] = OrderedDict()
        self._bytes: dict[str, int] = {}
        """Of each slot."""

    def load(self, bundle: Bundle) -> None:
        """Hold a bundle's rows on the device."""
        if bundle.content_hash in self.bundles:
            return
        encoder, decoder, bias, threshold, vectors = (
            torch.from_numpy(a).to(self.device)
            for a in (bundle.encoder, bundle.decoder, bundle.bias, bundle.threshold, bundle.vectors)
        )
        zeros_K = torch.zeros(len(vectors), device=self.device)
        self.bundles[bundle.content_hash] = {
            "latent": _rows(encoder, bias, threshold, decoder),
            "project": _rows(*project_rows(decoder)),
            "vector": _rows(torch.zeros_like(vectors), zeros_K, zeros_K, vectors),
            "project_vector": _rows(*project_rows(vectors)),
        }

    def unload(self, content_hash: str) -> None:
        """Drop a bundle's rows and every slot."""
        self.bundles.pop(content_hash, None)
        self._slots.clear()
        self._bytes.clear()

    def slot(self, segment: Segment) -> dict[int, SlotRows]:
        """The segment's rows by layer.

        Raises:
            KeyError: a bundle is not in this worker.
        """
        slot = self._slots.get(segment.key)
        if slot is None:
            by_layer: dict[int, list[PlanRow]] = {}
            for row in segment.rows:
                for bundle in {row.bundle, row.gate.bundle if row.gate else row.bundle}:
                    self.bundles[bundle]  # raises here, whether or not the rows are gathered
                by_layer.setdefault(row.layer, []).append(row)
            slot = {layer: self._slot_rows(rows) for layer, rows in by_layer.items()}
            self._bytes[segment.key] = sum(rows.n_bytes for rows in slot.values())
            while self._slots and (len(self._slots) >= self.n_slots or sum(self._bytes.values()) > SLOT_BYTES):
                del self._bytes[self._slots.popitem(last=False)[0]]
        self._slots[segment.key] = slot
        self._slots.move_to_end(segment.key)
        return slot

    def row(self, row: PlanRow) -> Rows:
        """A plan's row as one row of the formula.

        Raises:
            KeyError: its bundle is not in this worker.
        """
        source = self.bundles[row.bundle][row.source]
        one = slice(row.row, row.row + 1)
        alpha, beta = (torch.full((1,), x, device=self.device) for x in (row.alpha, row.beta))
        return Rows(alpha, beta, source.e_KD[one], source.b_K[one], source.theta_K[one], source.d_KD[one])

    def _slot_rows(self, plan_rows: list[PlanRow]) -> SlotRows:
        if not self.fold:
            return SlotRows(None, None, tuple(plan_rows))
        conditional = self._conditional([row for row in plan_rows if row.is_conditional])
        always = [row for row in plan_rows if not row.is_conditional]
        adding, reading = [row for row in always if row.alpha], [row for row in always if row.beta]
        add_D = latents = None
        if len(adding) == 1:
            add_D = adding[0].alpha * self._gather(adding, "d_KD")[0]
        elif adding:
            add_D = self._column([row.alpha for row in adding]) @ self._gather(adding, "d_KD")
        if reading:
            e_KD, b_K, theta_K, d_KD = (self._gather(reading, name) for name in ("e_KD", "b_K", "theta_K", "d_KD"))
            beta_K = self._column([row.beta for row in reading])
            latents = Rows(torch.zeros_like(beta_K), beta_K, e_KD, b_K, theta_K, d_KD)
        return SlotRows(add_D, latents, tuple(plan_rows), conditional)

    def _gather(self, plan_rows: list[PlanRow], name: Literal["e_KD", "b_K", "theta_K", "d_KD"]) -> Tensor:
        """A field of the rows of the formula that these are, in their order."""
        of: dict[tuple[str, str], list[int]] = {}
        for row in plan_rows:
            of.setdefault((row.bundle, row.source), []).append(row.row)
        if len(of) == 1:
            (((bundle, source), rows),) = of.items()
            table: Tensor = getattr(self.bundles[bundle][source], name)
            if len(rows) == 1:
                return table[rows[0] : rows[0] + 1]
            return table.index_select(0, torch.tensor(rows, device=self.device))
        return torch.cat(
            [getattr(self.bundles[row.bundle][row.source], name)[row.row : row.row + 1] for row in plan_rows]
        )

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _conditional(self, plan_rows: list[PlanRow]) -> Conditional | None:
        if not plan_rows:
            return None
        rows = Rows.concat([self.row(row) for row in plan_rows])
        gate_e_KD, gate_b_K = torch.zeros_like(rows.e_KD), torch.zeros_like(rows.b_K)
        for k, row in enumerate(plan_rows):
            if row.gate is not None:
                readers = self.bundles[row.gate.bundle]["latent"]
                gate_e_KD[k], gate_b_K[k] = readers.e_KD[row.gate.row], readers.b_K[row.gate.row]

        def tensor(values: list[float] | list[bool]) -> Tensor:
            return torch.tensor(values, device=self.device)

        return Conditional(
            rows,
            gate_e_KD,
            gate_b_K,
            tensor([-math.inf if row.gate is None else row.gate.above for row in plan_rows]),
            tensor([row.gate is not None for row in plan_rows]),
            tensor([row.exclude_special for row in plan_rows]),
            tuple(Watch.of(row) for row in plan_rows),
            any(row.beta for row in plan_rows),
        )


def _rows(e_KD: Tensor, b_K: Tensor, theta_K: Tensor, d_KD: Tensor) -> Rows:
    zeros_K = torch.zeros(len(d_KD), device=d_KD.device)
    return Rows(zeros_K, zeros_K, e_KD, b_K, theta_K, d_KD)
