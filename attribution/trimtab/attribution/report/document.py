"""What a report says, as JSON: every number in the page is in here, and nothing else is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.attribution.bundle import Bundle, now
from trimtab.attribution.errors import SettingsError

if TYPE_CHECKING:
    from trimtab.attribution.report.examples import Example

__all__ = ["Evidence", "document", "evidence", "read_trial"]

N_TOKENS = 8
"""Tokens shown that a direction promotes, and that it suppresses."""

Evidence = dict[int, dict[str, Any]]
"""By latent: `promoted`, `suppressed`, `on_sae_text`, `on_pairs`."""


def read_trial(path: Path, bundle: Bundle) -> dict[str, Any]:
    """The result of a trial of this bundle.

    Raises:
        SettingsError: it is none, or of another bundle.
    """
    try:
        data = path.read_bytes()
        found: dict[str, Any] = json.loads(data)
        same = (found["format"], found["version"]) == ("trimtab.trial", 1)
        tried = found["bundle"]["content_hash"]
    except OSError as e:
        raise SettingsError(f"cannot read {path}: {e.strerror}; `trimtab validate` writes it") from e
    except (ValueError, KeyError, TypeError) as e:
        raise SettingsError(f"{path} is no result of a trial ({e}); `trimtab validate` writes one") from e
    if not same:
        raise SettingsError(f"{path} is not a result of this release; run `trimtab validate` again")
    written = bundle.header.provenance.get("trial", {}).get("result")
    if bundle.content_hash != tried and written != f"sha256:{hashlib.sha256(data).hexdigest()}":
        raise SettingsError(
            f"{path} is of bundle {tried[:19]}… and not of {bundle.header.name!r}; give the bundle that was tried, or the one "
            "that the trial wrote"
        )
    return found


def evidence(bundle: Bundle, model: str, sae: Path | None, pairs: Path | None) -> Evidence:
    """What the model, the SAE's folder and the pairs show of each latent.

    Raises:
        AttributionError: one of them cannot be read.
    """
    import torch

    from trimtab.attribution.model import SplitModel, load_tokenizer
    from trimtab.attribution.pairs import load_pairs, tokenise
    from trimtab.attribution.report.examples import of_pairs, of_sae

    latents = [record.latent for record in bundle.header.latents]
    split, tokenizer = SplitModel.load(model, bundle.header.layer), load_tokenizer(model)
    bundle.check_model(split.identity)
    d_KD = torch.from_numpy(bundle.decoder)
    promoted, suppressed = split.promoted_tokens(d_KD, N_TOKENS), split.promoted_tokens(-d_KD, N_TOKENS)
    on_sae = of_sae(sae, latents) if sae is not None else {}
    on_pairs: dict[int, list[Example]] = {}
    if pairs is not None:
        completions = [c for pair in load_pairs(pairs).pairs for c in tokenise(tokenizer, pair)]
        on_pairs = of_pairs(split, tokenizer, bundle, completions)
    return {
        latent: {
            "promoted": [str(tokenizer.decode([i])) for i in promoted[k]],
            "suppressed": [str(tokenizer.decode([i])) for i in suppressed[k]],
            "on_sae_text": [e._asdict() for e in on_sae.get(latent, [])],
            "on_pairs": [e._asdict() for e in on_pairs.get(latent, [])],
        }
        for k, latent in enumerate(latents)
    }


def document(bundle: Bundle, trial: dict[str, Any] | None, shown: Evidence) -> dict[str, Any]:
    """The whole report."""
    header = bundle.header.model_dump(mode="json")
    provenance, recommended = header["provenance"], {edit["latent"] for edit in header["edits"]}
    truth = {point["latent"]: point for point in _dict(provenance, "fidelity").get("points", [])}
    cards = []
    for record in header["latents"]:
        name = f"latent {record['latent']}"
        doses = [dose for dose in trial["doses"] if dose["arm"] == name] if trial else []
        replies = [e for e in trial["examples"] if e["arm"] == name] if trial else []
        cards.append(
            {
                **record,
                "recommended": record["latent"] in recommended,
                "doses": sorted(doses, key=lambda dose: float(dose["strength"])),
                "replies": replies,
                "truth": truth.get(record["latent"]),
                "margin": trial["margins"].get(name) if trial else None,
                "promoted": [],
                "suppressed": [],
                "on_sae_text": [],
                "on_pairs": [],
                **shown.get(record["latent"], {}),
            }
        )
    whole = [d for d in trial["doses"] if d["latent"] is None and d["arm"] != "unsteered"] if trial else []
    return {
        "format": "trimtab.report",
        "version": 1,
        "created": now(),
        "bundle": {k: v for k, v in header.items() if k not in ("latents", "provenance")},
        "content_hash": bundle.content_hash,
        "provenance": provenance,
        "held_out": _held_out(provenance),
        "summary": _summary(header, trial),
        "cards": cards,
        "baselines": whole,
        "unsteered": next((d for d in trial["doses"] if d["arm"] == "unsteered"), None) if trial else None,
        "unsteered_replies": [e for e in trial["examples"] if e["arm"] == "unsteered"] if trial else [],
        "trial": {k: v for k, v in trial.items() if k not in ("doses", "examples")} if trial else None,
        "failed": _failed(header, trial),
    }


_CONTROLS = {
    "random": "as many random live latents",
    "delta_activation": "as many leaders by Δ-activation",
    "difference_in_means": "the difference in means, subtracted",
}


def _held_out(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The leaders together and what they are held against, on the held-out pairs; nothing where no run measured them."""
    effects = _dict(provenance, "effects")
    rows = [
        {
            "edit": f"the leaders together, strength {strength}",
            "margin": margin,
            "se": effects.get("together_se", {}).get(strength),
            "damage": effects.get("damage", {}).get(strength),
        }
        for strength, margin in effects.get("together", {}).items()
    ]
    rows += [{"edit": _CONTROLS.get(name, name), **control} for name, control in effects.get("controls", {}).items()]
    if "random_each" in effects:
        rows.append(
            {
                "edit": "one random live latent, mean of them",
                "margin": effects["random_each"],
                "se": None,
                "damage": None,
            }
        )
    return rows


def _dict(provenance: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of what a run records; empty in a bundle that no run made."""
    found = provenance.get(name)
    return found if isinstance(found, dict) else {}


def _summary(header: dict[str, Any], trial: dict[str, Any] | None) -> list[str]:
    """The findings in sentences, strongest first."""
    where = f"SAE {header['sae']['id']} at {header['model']['id']}, blocks.{header['layer']}.resid_post"
    lines = [
        f"{len(header['latents'])} latents of {where} lead for this behaviour; {len(header['edits'])} edits are recommended."
    ]
    if trial is None:
        return [*lines, "No trial on sampled text was given: `trimtab validate` runs one."]
    base = next(d for d in trial["doses"] if d["arm"] == "unsteered")
    lines.append(
        f"Unsteered, {base['shows']:.0%} of {base['n_replies']} sampled replies to {base['n_prompts']} prompts show it."
    )
    best = [d for d in trial["doses"] if d["safe"] and d["strength"] > 0]
    for arm in ("chosen", "together"):
        of_arm = [d for d in best if d["arm"] == arm]
        if of_arm:
            d = min(of_arm, key=lambda dose: float(dose["effect"]["mean"]))
            which = "chosen" if arm == "chosen" else "recommended"
            lines.append(f"The {which} edits together take it to {_said(d)}.")
    if alone := [d for d in best if d["latent"] is not None]:
        d = min(alone, key=lambda dose: float(dose["effect"]["mean"]))
        lines.append(f"The strongest single edit is that of latent {d['latent']}: it takes it to {_said(d)}.")
    for d in trial["doses"]:
        if d["arm"] == "system message":
            lines.append(f"A system message that asks for the same takes it to {d['shows']:.0%} {_interval(d)}.")
    return lines


def _said(d: dict[str, Any]) -> str:
    return f"{d['shows']:.0%} at strength {d['strength']:g} {_interval(d)}, with the text still whole"


def _interval(d: dict[str, Any]) -> str:
    e = d["effect"]
    if e["low"] is None:
        return f"({100 * e['mean']:+.0f} points, one prompt alone)"
    return f"({100 * e['mean']:+.0f} points, 95 % interval {100 * e['low']:+.0f} to {100 * e['high']:+.0f})"


def _failed(header: dict[str, Any], trial: dict[str, Any] | None) -> list[str]:
    failed = list(trial["failed"]) if trial else []
    fidelity = _dict(header["provenance"], "fidelity")
    if fidelity.get("holds") is False:
        failed.append(
            f"First order does not hold here: predicted and measured effects correlate {fidelity.get('pearson')}, below "
            f"{fidelity.get('bar')}."
        )
    return failed
