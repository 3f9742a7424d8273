"""The passes over the model, kept on disk: what a killed run resumes from, and what the leading latents are read from again.

A file per batch, safetensors, written beside its place and renamed:

    completions [B], loss [B]     the numbers of its completions, and their mean cross-entropy
    a.{layer}, g.{layer} [N, D]   as the model computes them (fp32, or bf16 on CUDA)
    of.{layer} [N]                the completion of each row

4.6 kB a kept token at d_model 576 in fp32, 16 kB at 4,096 in bf16. Sums are always made from the files, in their order: a run
that was killed gives the numbers of one that was not. The folder's name is a digest of everything that the numbers depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trimtab.attribution.errors import StorageError
from trimtab.attribution.gradients import BATCH_TOKENS, Factors, Pass, Tracing, batches, trace

if TYPE_CHECKING:
    from trimtab.attribution.model import SplitModel
    from trimtab.attribution.pairs import Completion
    from trimtab.attribution.processes import Processes

__all__ = ["Passes", "digest_of"]


def digest_of(**parts: Any) -> str:
    """A name for whatever depends on `parts`, which are JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Passes:
    """This process's passes over one list of completions."""

    def __init__(
        self,
        folder: Path,
        completions: Sequence[Completion],
        processes: Processes,
        *,
        device: torch.device,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self._completions, self._device, self._processes = completions, device, processes
        every = list(enumerate(batches(completions, batch_tokens)))
        self._mine = {folder / f"{number:06}.safetensors": batch for number, batch in processes.part(every)}

    def make(self, model: SplitModel, tracing: Tracing, advance: Callable[[int], None]) -> None:
        """Run the passes that are not there yet.

        Raises:
            GradientError: a completion's gradient is not finite.
            StorageError: a file cannot be written.
        """
        missing = {file for file in self._mine if not file.exists()}
        self._processes.wait()  # With tensor parallelism all must agree on what is missing before one of them writes.
        for file, batch in self._mine.items():
            if file in missing:
                made = trace(model, self._completions, batch, tracing)
                if self._processes.sharing or self._processes.first:
                    self._write(file, made)
            advance(len(batch))
        self._processes.wait()

    def factors(self, layer: int) -> Iterator[Factors]:
        """The factors at one hook point, a pass at a time.

        Raises:
            StorageError: a file is missing or damaged.
        """
        for file in self._mine:
            with self._read(file) as tensors:
                yield Factors(*(tensors.get_tensor(f"{name}.{layer}") for name in ("a", "g", "of")))

    def _read(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt", device=str(self._device))
        except (SafetensorError, OSError) as e:
            raise StorageError(f"{file} is damaged ({e}); remove it and run the same command again") from e

    def _write(self, file: Path, made: Pass) -> None:
        tensors = {"completions": torch.tensor(list(made.loss)), "loss": torch.tensor(list(made.loss.values()))}
        for layer, factors in made.factors.items():
            for name, tensor in zip(("a", "g", "of"), factors, strict=True):
                tensors[f"{name}.{layer}"] = tensor.cpu().contiguous()
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as out:
                out.write(save(tensors))
                out.flush()
                os.fsync(out.fileno())
            part.rename(file)
        except OSError as e:
            part.unlink(missing_ok=True)
            n_done = sum(other.exists() for other in self._mine)
            raise StorageError(
                f"cannot write {file}: {e.strerror or e}; make room and run the same command again: "
                f"it goes on after pass {n_done} of {len(self._mine)}"
            ) from e
