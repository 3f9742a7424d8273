"""What differs between two bundles, and between a bundle's rows and the SAE that it names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.attribution.bundle import Bundle, BundleError

if TYPE_CHECKING:
    from trimtab.attribution.matrix import Matrix

__all__ = ["check_rows", "differences"]

_ROWS = ("decoder", "encoder", "bias", "threshold", "baseline")


def differences(first: Bundle, second: Bundle) -> list[str]:
    """One line for each difference, `path: first → second`; none where the content is the same."""
    if first.content_hash == second.content_hash:
        return []
    a, b = (x.header.model_dump(mode="json") for x in (first, second))
    lines = []
    for field in a:
        if field not in ("latents", "vectors"):
            lines += _fields(field, a[field], b[field])
    for kind, name, rows in (("latents", "latent", _ROWS), ("vectors", "name", ("vectors",))):
        ours, theirs = ({record[name]: (i, record) for i, record in enumerate(x[kind])} for x in (a, b))
        lines += [f"{kind} {key}: only in the first" for key in ours if key not in theirs]
        lines += [f"{kind} {key}: only in the second" for key in theirs if key not in ours]
        for key in (key for key in ours if key in theirs):
            (i, mine), (j, other) = ours[key], theirs[key]
            lines += _fields(f"{kind} {key}", mine, other)
            for tensor in rows:
                apart = float(np.abs(getattr(first, tensor)[i] - getattr(second, tensor)[j]).max())
                lines += [f"{kind} {key}.{tensor}: differs by up to {apart:.3g}"] if apart else []
    return lines or ["the same in another order"]


def check_rows(bundle: Bundle, source: str) -> None:
    """Refuse a bundle whose rows are not those of the SAE.

    Raises:
        BundleError: another digest, or a row that differs.
        SAEError: the SAE cannot be read.
    """
    from trimtab.attribution.sae import SAE

    sae, name = SAE.load(source), bundle.header.name
    if sae.digest != bundle.header.sae.digest:
        raise BundleError(f"bundle {name!r} was made from SAE {bundle.header.sae.digest} and {source} is {sae.digest}")
    latents = [record.latent for record in bundle.header.latents]
    named: dict[str, Matrix] = {"decoder": sae.d_LD, "encoder": sae.e_LD, "bias": sae.b_L}
    if sae.k is None:  # A top-k SAE has no thresholds; the run gave it one.
        named["threshold"] = sae.theta_L
    for tensor, rows in ((name, whole[latents]) for name, whole in named.items()):
        if not np.array_equal(getattr(bundle, tensor), rows.numpy()):
            raise BundleError(f"bundle {name!r}: its {tensor} rows are not those of {source}; write it again")


def _fields(path: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [line for key in {**a, **b} for line in _fields(f"{path}.{key}", a.get(key), b.get(key))]
    return [] if a == b else [f"{path}: {_short(a)} → {_short(b)}"]


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 100 else text[:97] + "…"
