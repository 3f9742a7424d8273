"""The arms of a trial: each is what one request asks for, at strength 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimtab.attribution.errors import SelectionError
from trimtab.client import Edit, Latent, Steering, Vector

if TYPE_CHECKING:
    from trimtab.attribution.bundle import Bundle, RecommendedEdit

__all__ = ["UNSTEERED", "Arm", "arms_of", "asked", "chosen_arm"]


@dataclass(frozen=True)
class Arm:
    """One thing that is tried."""

    name: str
    edits: tuple[Edit, ...] = ()
    """None: the model as it is."""
    system: str | None = None
    """A system message before the prompt: the arm that any steering has to beat."""
    latent: int | None = None
    """The one latent that it edits, where it is a candidate."""

    @property
    def has_strength(self) -> bool:
        """Whether it can be tried at several strengths."""
        return bool(self.edits)

    def steering(self, strength: float) -> Steering | None:
        """The `steering` field at a strength; None for an arm without edits."""
        return Steering(edits=self.edits, strength=strength) if self.edits else None


UNSTEERED = Arm("unsteered")


def arms_of(bundle: Bundle, rivals: Sequence[Bundle] = (), system: str | None = None) -> list[Arm]:
    """Unsteered; each latent of the bundle alone; its recommended edits together; each vector, subtracted; each rival bundle's
    recommended edits together; the model under a system message.

    Raises:
        SelectionError: an arm would have more edits than a request may.
    """
    name, recommended = bundle.header.name, bundle.header.edits
    like = next((edit for edit in recommended if edit.latent is not None), None)
    arms = [UNSTEERED]
    for record in bundle.header.latents:
        own = [edit for edit in recommended if edit.latent == record.latent] or ([like] if like else [])
        if own:
            edits = tuple(asked(name, edit.model_copy(update={"latent": record.latent})) for edit in own)
            arms.append(Arm(f"latent {record.latent}", edits, latent=record.latent))
    if len(recommended) > 1:
        arms.append(_together("together", bundle))
    for vector in bundle.header.vectors:
        minus = _where(Vector(name, vector.name).add(-1.0), recommended[0])
        arms.append(Arm(f"minus {vector.name}", (minus,)))
    arms += [_together(f"rival {rival.header.name}", rival) for rival in rivals]
    if system is not None:
        arms.append(Arm("system message", system=system))
    return arms


def chosen_arm(arms: Sequence[Arm], latents: Sequence[int]) -> Arm:
    """The candidates of these latents, together."""
    of = {arm.latent: arm for arm in arms if arm.latent is not None}
    return Arm("chosen", tuple(edit for latent in latents for edit in of[latent].edits))


def asked(bundle: str, edit: RecommendedEdit) -> Edit:
    """A recommended edit as a request spells it."""
    if edit.vector is not None:
        of_vector = Vector(bundle, edit.vector)
        unit: Literal["raw", "resid_norm"] = "raw" if edit.unit == "max_act" else edit.unit
        made = of_vector.project() if edit.operation == "project" else of_vector.add(edit.amount or 0.0, unit=unit)
        return _where(made, edit)
    latent = Latent(bundle, edit.latent or 0)
    match edit.operation:
        case "add":
            made = latent.add(edit.amount or 0.0, unit=edit.unit)
        case "clamp":
            made = latent.clamp(edit.amount or 0.0, unit=edit.unit)
        case "scale":
            made = latent.scale(edit.amount or 0.0)
        case "ablate":
            made = latent.ablate()
        case "project":
            made = latent.project()
    return _where(made, edit)


def _where(made: Edit, like: RecommendedEdit) -> Edit:
    """`made` on the tokens that `like` edits."""
    made = made.during(like.scope)
    return made.excluding_special() if like.exclude_special else made


def _together(name: str, bundle: Bundle) -> Arm:
    edits = tuple(asked(bundle.header.name, edit) for edit in bundle.header.edits)
    if len(edits) > 64:
        raise SelectionError(
            f"bundle {bundle.header.name!r} recommends {len(edits)} edits and a request takes 64; recommend fewer"
        )
    return Arm(name, edits)
