"""A bundle of latents that a person names: for rivals, for controls, for what was found elsewhere."""

from __future__ import annotations

from trimtab.attribution.authored import Authored
from trimtab.attribution.bundle import Bundle, Header, LatentRecord, SAEIdentity, now
from trimtab.attribution.edit import project_rows
from trimtab.attribution.errors import SAEError, SettingsError
from trimtab.attribution.model import identify
from trimtab.attribution.sae import SAE, shipped_sae

__all__ = ["hand_picked"]


def hand_picked(latents: str, *, sae: str | None, model: str, name: str, behaviour: str, edit: Authored) -> Bundle:
    """The bundle of these latents, each recommended under `edit`.

    Raises:
        SettingsError: the indices cannot be read.
        SAEError: the SAE cannot be read, is of another shape, lacks the numbers, or has no such latent.
    """
    try:
        wanted = [int(part) for part in latents.split(",")]
    except ValueError as e:
        raise SettingsError(f"--latents {latents!r} are no indices; write them as 883,1693") from e
    loaded = SAE.load(sae or shipped_sae())
    identity, _ = identify(model)
    loaded.check_model(identity)
    stats = loaded.stats
    if stats is None or loaded.unreadable:
        why = loaded.unreadable or "it has no stats.safetensors, which says how far its latents go"
        raise SAEError(f"SAE {loaded.id} cannot become a bundle by hand: {why}; use `trimtab attribute`")
    for latent in wanted:
        if not 0 <= latent < loaded.d_sae or wanted.count(latent) > 1:
            raise SettingsError(f"--latents {latents}: {latent} is named twice or outside 0..{loaded.d_sae - 1}")
    d_KD = loaded.d_LD[wanted]
    header = Header(
        name=name,
        behaviour=behaviour,
        created=now(),
        model=identity,
        sae=SAEIdentity(id=loaded.id, digest=loaded.digest, d_sae=loaded.d_sae),
        layer=loaded.layer,
        resid_norm=stats.resid_norm,
        latents=tuple(
            LatentRecord(
                latent=latent,
                attribution=None,
                max_activation=float(stats.max_activation_L[latent]),
                density=float(stats.density_L[latent]),
                top_tokens=loaded.top_tokens.get(latent, ()),
            )
            for latent in wanted
        ),
        edits=tuple(edit.recommended(latent) for latent in wanted),
        provenance={"command": "trimtab bundle build", "stats": stats.source},
    )
    return Bundle(
        header,
        decoder=d_KD.numpy(),
        encoder=loaded.e_LD[wanted].numpy(),
        bias=loaded.b_L[wanted].numpy(),
        threshold=loaded.theta_L[wanted].numpy(),
        baseline=(project_rows(d_KD)[0] @ stats.mean_D).numpy(),
    )
