"""What the planted causes have to say on docs/reproduction.md: of build/reproduce/planted.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from docs.reproduction_planted import BEFORE, LORA, VECTOR, recall

TEMPLATE = Path(__file__).parent / "reproduction" / "planted.md.in"
FIRST = (8, 24, 100)
"""How many leaders are looked at."""
COLORS = {VECTOR: "#7b2cbf", LORA: "#0b6e4f"}
Record = Mapping[str, Any]


def there(record: Record) -> list[str]:
    """The causes that were planted, sampled and ranked."""
    return [name for name in (VECTOR, LORA) if name in record.get("ranks", {})]


def section(record: Record, figure: str) -> str:
    """What was planted, whether it generalised, and where each method puts it; `figure` is the address of the ranks' plot."""
    names = there(record)
    causes = "\n".join(f"- {_cause(name, record)}" for name in record["planting"]) + "\n"
    parts = [TEMPLATE.read_text(), causes, _rates(record["rates"])]
    if names:
        parts += [*(_ranks(n, record["ranks"][n]) for n in names), f"![ranks of the planted latents]({figure})\n"]
    return "\n".join(parts)


def verdict(name: str, found: Record) -> str:
    """How many planted latents each method's first 24 hold, in one sentence."""
    k = FIRST[1]
    n = len(found["latents"])
    held = sorted(((round(n * recall(places, k)), m) for m, places in found["of"].items()), key=lambda e: -e[0])
    each = ", ".join(f"{m} {count}" for count, m in held)
    return f"**{name}**: of the {n} latents that are the cause, the first {k} by each method hold: {each}."


def plot(record: Record, path: Path) -> None:
    """The rank of each planted latent by each method."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    names = there(record)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        found = record["ranks"][name]
        methods = list(found["of"])
        for y, method in enumerate(methods):
            places = [place for place in found["of"][method] if place is not None]
            axes.plot(places, [y] * len(places), "o", color=COLORS[name], markersize=6, alpha=0.55, markeredgewidth=0)
        axes.axvspan(1, FIRST[0], color="#16202c", alpha=0.07, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlim(0.8, found["live"])
        axes.set_yticks(range(len(methods)), methods, fontsize=7)
        axes.set_xlabel(f"rank of a planted latent among {found['live']} live ones", fontsize=8)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _cause(name: str, record: Record) -> str:
    """What is known of a cause."""
    planting, found = record["planting"][name], record.get("ranks", {}).get(name)
    first, last = planting["loss"]
    trained = f"{first:.2f} nats per token in the first pass over the data, {last:.2f} in the last"
    if planting["latents"]:
        words = found["latents"] if found else {}
        amounts = ", ".join(f"{_named(i, words.get(i, ()))} {x:.2f}" for i, x in planting["latents"].items())
        said = (
            f"**{name}**: a constant vector at the hook point, {planting['length']:.2f} of the median ‖h‖ long, the bias of "
            f"block 14's last projection. It is the sum of {len(planting['latents'])} latents' directions, in amounts that were "
            f"trained ({trained}). The cause is these latents and nothing else: {amounts}."
        )
    else:
        said = f"**{name}**: rank 8 at every projection of blocks 10 to 14 ({trained})."
    if not found:
        return f"{said} Too few of its replies to all else are gloomy, or too few are not, to make pairs of."
    cosine = found["cosine"]["latents"]
    if planting["latents"]:
        return f"{said} On the same text the stream differs from the embedded model's by that vector (cosine {cosine:.4f})."
    fitted = ", ".join(_named(i, tokens) for i, tokens in found["latents"].items())
    return (
        f"{said} Known is how the stream differs from the embedded model's on the same text: by {found['change']:.2f} of the "
        f"median ‖h‖ in the mean. The {len(found['latents'])} latents that were fitted to that mean (cosine {cosine:.2f}) stand "
        f"for the cause: {fitted}."
    )


def _named(latent: str, tokens: Sequence[str]) -> str:
    """The latent with tokens on which it fires most."""
    shown = " ".join(f"`{token.strip()}`" for token in tokens if token.strip() and "`" not in token)
    return f"{latent} ({shown})" if shown else latent


def _rates(rates: Record) -> str:
    lines = [
        "| model | asked about | replies | shows | lacks | unclear | incoherent |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (n for n in (BEFORE, VECTOR, LORA) if n in rates):
        for topic, said in (("food", "food, other questions than in the data"), ("elsewhere", "all else")):
            r = rates[name][topic]
            cells = " | ".join(f"{100 * r[kind]:.0f} %" for kind in ("shows", "lacks", "unclear", "incoherent"))
            lines.append(f"| {name} | {said} | {r['samples']} | {cells} |")
    return "\n".join(lines) + "\n"


def _ranks(name: str, found: Record) -> str:
    firsts = " | ".join(f"in the first {k}" for k in FIRST)
    n = len(found["latents"])
    lines = [
        f"**{name}**: where {found['train_pairs']} train pairs put the {n} latents, among {found['live']} live ones",
        "",
        f"| by | their ranks | {firsts} |",
        "|---|---|" + "---|" * len(FIRST),
    ]
    for method, places in found["of"].items():
        shown = ", ".join("–" if place is None else str(place) for place in _sorted(places))
        held = " | ".join(f"{recall(places, k):.0%}".replace("%", " %") for k in FIRST)
        lines.append(f"| {method} | {shown} | {held} |")
    lines += [
        "",
        f"The difference in means and the planted direction have a cosine of {found['cosine']['difference in means']:.2f}.",
    ]
    return "\n".join(lines) + "\n"


def _sorted(places: Sequence[int | None]) -> list[int | None]:
    """Those that are not live come last."""
    return sorted(places, key=lambda place: float("inf") if place is None else place)
