"""Every intervention of a run at one hook point: the leading latents, what they are held against, and how well it was predicted.

All run on the same held-out pairs, in batches, shared out over the processes; a batch that is done is kept in a journal, so that
a run that was stopped goes on after it with the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from trimtab.attribution.authored import Authored, vector_rows
from trimtab.attribution.edit import Rows
from trimtab.attribution.fidelity import Fidelity, Point
from trimtab.attribution.journal import Journal
from trimtab.attribution.passes import Passes
from trimtab.attribution.processes import Processes
from trimtab.attribution.ranking import Ranking
from trimtab.attribution.scores import completion_scores
from trimtab.attribution.selection import leading, random_live
from trimtab.attribution.validation import STRENGTHS, Effect, Effects, Margins

__all__ = ["N_TRUTH", "Measured", "intervene", "n_interventions"]

N_TRUTH = 10
"""Leading latents, and as many random ones, whose prediction is compared with what was measured, at least."""
AT_ONCE = 8
"""Edits that share a batch."""


@dataclass(frozen=True)
class Measured:
    """What the interventions showed."""

    effects: Effects
    fidelity: Fidelity
    by_activation: list[int]
    """The leaders by Δ-activation, as many as lead: what `effects.delta_activation` is of."""


def intervene(
    margins: Margins,
    ranking: Ranking,
    held_out: Passes,
    edit: Authored,
    *,
    n_pairs: int,
    processes: Processes,
    work: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> Measured:
    """Measure the effects on the held-out pairs, of which there are `n_pairs`, with the passes `held_out` over them; what is done
    is kept in the folder `work`, which belongs to this model and these pairs.

    Raises:
        JournalError: it cannot be kept.
    """
    scores, sae, stats, live_L = ranking.scores, ranking.sae, ranking.stats, ranking.live_L
    best = ranking.best
    wanted = max(N_TRUTH, len(best))
    truth = leading(scores.operation_L, live_L, sae.d_LD, wanted)
    control = random_live(live_L, truth, scores.activation_L, wanted)
    towards = -scores.delta_activation_L if edit.turns_up else scores.delta_activation_L
    by_activation = leading(towards, live_L, sae.d_LD, len(best))

    def rows(latents: list[int], strength: float = 1.0) -> Rows:
        return edit.rows(sae, stats, latents, strength)

    each = [*truth, *control]
    edits = [rows([latent]) for latent in each]
    edits += [rows(best, strength) for strength in STRENGTHS]
    edits += [rows(control[: len(best)]), rows(by_activation), vector_rows(scores.difference_in_means_D, -1.0)]
    mine = processes.part(edits)
    found: list[Effect] = []
    with _kept(work / f"interventions-{sae.layer}", processes) as journal:
        for start in range(0, len(mine), AT_ONCE):
            batch = mine[start : start + AT_ONCE]
            found += _effects(margins, batch, journal)
            advance(len(batch) * (processes.size if processes.sharing else 1))
    effects = iter(processes.collect(found))
    of_each = {latent: next(effects) for latent in each}
    together = {strength: next(effects) for strength in STRENGTHS}
    measured = Effects(
        each={latent: of_each[latent] for latent in best},
        together=together,
        random=tuple(of_each[latent] for latent in control),
        random_together=next(effects),
        delta_activation=next(effects),
        difference_in_means=next(effects),
    )
    chosen = torch.tensor(each, device=live_L.device)
    predicted = completion_scores(
        held_out.factors(sae.layer), sae, chosen, edit.operation, edit.amounts(stats), stats.mean_D, 2 * n_pairs
    )
    processes.add_up(predicted)
    gap_C = (predicted[0::2] - predicted[1::2]).mean(0).tolist()
    points = [Point(sae.name(latent), i < len(truth), gap_C[i], -of_each[latent].mean) for i, latent in enumerate(each)]
    return Measured(measured, Fidelity.of(points), by_activation)


@contextmanager
def _kept(stem: Path, processes: Processes) -> Iterator[Journal | None]:
    """This process's journal; None where all processes make every batch together and must not disagree on what is done."""
    if processes.size > 1 and not processes.sharing:
        yield None
        return
    with Journal.open(stem.with_name(f"{stem.name}-{processes.rank}.jsonl"), {}) as journal:
        yield journal


def _effects(margins: Margins, batch: Sequence[Rows], journal: Journal | None) -> list[Effect]:
    """The effects of a batch, out of the journal if it is there; under one key, since a batch is one computation."""
    digest = hashlib.sha256()
    for rows in batch:
        for tensor in vars(rows).values():
            digest.update(tensor.cpu().numpy().tobytes())
    key = digest.hexdigest()
    if journal is not None and key in journal:
        return [Effect(*map(float.fromhex, numbers)) for numbers in journal[key]["effects"]]
    found = margins.effects(batch)
    if journal is not None:  # as hexadecimal, which is exact, and spells what is not finite
        journal.add(key, {"effects": [[float(number).hex() for number in astuple(effect)] for effect in found]})
    return found


def n_interventions(top: int) -> int:
    """How many there are, for a progress bar."""
    return 2 * max(N_TRUTH, top) + len(STRENGTHS) + 3
