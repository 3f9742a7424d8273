"""Hypothesis strategies over the whole edit language: documents of the `steering` field that any server with these bundles takes.

Amounts are drawn around what the bundles say is typical, so that steered text stays text and a greedy choice is rarely a tie.
"""

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from trimtab.attribution.bundle import Bundle
from trimtab.server.steering import Scope
from trimtab.server.window import Window

__all__ = ["edits", "gates", "scopes", "steerings"]

SOON = 48
"""Windows lie within so many tokens of their origin: prompts are short."""


def numbers(lo: float, hi: float) -> st.SearchStrategy[float]:
    """Short decimal numbers, which read well in a failing case."""
    return st.integers(round(lo * 100), round(hi * 100)).map(lambda x: x / 100)


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """A window of positions from any origin, at least one side of it bounded."""
    origin = draw(st.sampled_from(["start", "prompt_end", "completion"]))
    positions = st.integers(-SOON, SOON // 4) if origin == "prompt_end" else st.integers(0, SOON)
    start, stop = draw(st.none() | positions), draw(st.none() | positions)
    if start is not None and stop is not None:
        start, stop = min(start, stop), max(start, stop) + (start == stop)
    return {"origin": origin} | {k: v for k, v in (("start", start), ("stop", stop)) if v is not None}


def scopes(*, special: bool = True) -> st.SearchStrategy[dict[str, Any]]:
    """A scope that some prompt has a token in."""
    fields: dict[str, st.SearchStrategy[Any]] = {
        "tokens": st.sampled_from(["prompt", "completion", "all"]),
        "window": windows(),
        "first_token": st.booleans(),
    }
    if special:
        fields["exclude_special"] = st.booleans()
    drawn = st.fixed_dictionaries({}, optional=fields)
    return drawn.filter(lambda scope: Window.of(Scope.model_validate(scope)).example() is not None)


@st.composite
def gates(draw: st.DrawFn, bundles: Mapping[str, Bundle], layer: int) -> dict[str, Any]:
    """A gate on a latent of this layer; low enough to open now and then."""
    name = draw(
        st.sampled_from([n for n, b in sorted(bundles.items()) if b.header.layer == layer and b.header.latents])
    )
    record = draw(st.sampled_from(bundles[name].header.latents))
    above = draw(numbers(0.0, 0.6))
    unit = draw(st.sampled_from(["raw", "max_act"]))
    return {
        "bundle": name,
        "latent": record.latent,
        "above": above * record.max_activation if unit == "raw" else above,
        "unit": unit,
        "mode": draw(st.sampled_from(["token", "onward"])),
    }


@st.composite
def edits(draw: st.DrawFn, bundles: Mapping[str, Bundle], *, conditional: bool = True) -> dict[str, Any]:
    """One edit: any operation, unit, scope and gate, on any latent or vector."""
    name = draw(st.sampled_from(sorted(bundles)))
    bundle = bundles[name]
    header = bundle.header
    found: dict[str, Any] = {"bundle": name}
    if header.vectors and draw(st.integers(0, 4)) == 0:
        vector = draw(st.sampled_from(header.vectors))
        found |= {"vector": vector.name, "operation": draw(st.sampled_from(["add", "project"]))}
        scales = {"raw": header.resid_norm / vector.norm, "resid_norm": 1.0}
    else:
        latent = draw(st.sampled_from(header.latents))
        operation = draw(st.sampled_from(["add", "ablate", "clamp", "scale", "project"]))
        found |= {"latent": latent.latent, "operation": operation}
        scales = {"raw": latent.max_activation, "max_act": 1.0, "resid_norm": latent.max_activation / header.resid_norm}
    match found["operation"]:
        case "add" | "clamp":
            unit = draw(st.sampled_from(sorted(scales)))
            among = numbers(-0.4, 0.4) if "vector" in found else numbers(-1.5, 1.5)
            found["amount" if found["operation"] == "add" else "target"] = draw(among) * scales[unit]
            found["unit"] = unit
        case "scale":
            found["factor"] = draw(numbers(-1.0, 4.0))
    if draw(st.booleans()):
        found["strength"] = draw(numbers(-1.5, 1.5))
    if draw(st.integers(0, 3)):
        found["scope"] = draw(scopes(special=conditional))
    if conditional and draw(st.integers(0, 2)) == 0:
        found["gate"] = draw(gates(bundles, header.layer))
    return found


@st.composite
def steerings(
    draw: st.DrawFn, bundles: Mapping[str, Bundle], *, max_edits: int = 6, conditional: bool = False
) -> dict[str, Any]:
    """A valid `steering` document: a bundle's recommended edits, or up to `max_edits` of any kind at any layers.

    `conditional` brings in gates and `exclude_special`.
    """
    strength = draw(st.sampled_from([1.0, 1.0, 0.5, -0.8]))
    more = {} if strength == 1.0 else {"strength": strength}
    if draw(st.integers(0, 9)) == 0:
        return {"bundle": draw(st.sampled_from([n for n, b in sorted(bundles.items()) if b.header.edits]))} | more
    drawn = draw(st.lists(edits(bundles, conditional=conditional), min_size=1, max_size=max_edits))
    kept: list[dict[str, Any]] = []
    for edit in drawn:  # Two operations on one direction conflict unless one is `add`: the first one stays.
        direction = (edit["bundle"], edit.get("latent", edit.get("vector")))
        taken = any(
            (e["bundle"], e.get("latent", e.get("vector"))) == direction and e["operation"] != "add" for e in kept
        )
        if edit["operation"] == "add" or not taken:
            kept.append(edit)
    return {"edits": kept} | more
