"""What is compared: the edits of each condition, one authored edit for every engine, and the cells of the grid.

An edit here is random rows of the right shape: what it costs does not depend on what it means. It touches every position, the
first one too, because that is what the other engines' edits do. It is small enough to leave text as it is, so that every
condition generates tokens of the same kind; only `STRONG` ones, which are not timed, change it, to show that all engines make the
same edit.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from trimtab.attribution import bundle as bundles
from trimtab.attribution.embedded import EMBEDDED_MODEL
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

LAYER, N_LAYERS, D_MODEL, N_LATENTS = 14, 30, 576, 8
RESID_NORM = 150.0


class Condition(NamedTuple):
    """One column of a round: an engine, and what each of its requests asks for."""

    name: str
    engine: str
    """`plain`, `trimtab`, another process of either (`plain again`), `vllm-lens` or `transformers`."""
    edit: str | None
    """None, `add`, `clamp8`, `gated` or `add30`."""
    distinct: int | None = None
    """So many different plans among the requests; None: each request has its own."""


PLAIN = Condition("plain", "plain", None)
CONDITIONS = {
    condition.name: condition
    for condition in (
        PLAIN,
        Condition("plain again", "plain again", None),
        Condition("idle", "trimtab", None),
        Condition("one add", "trimtab", "add", 1),
        Condition("add", "trimtab", "add"),
        Condition("clamp8", "trimtab", "clamp8"),
        Condition("gated", "trimtab", "gated"),
        Condition("add30", "trimtab", "add30"),
        *(Condition(f"{edit or 'idle'} again", "trimtab again", edit) for edit in (None, "add", "clamp8", "add30")),
        Condition("vllm-lens idle", "vllm-lens", None),
        Condition("vllm-lens add", "vllm-lens", "add"),
        Condition("vllm-lens clamp8", "vllm-lens", "clamp8"),
        Condition("vllm-lens add30", "vllm-lens", "add30"),
        Condition("transformers idle", "transformers", None),
        Condition("transformers add", "transformers", "add"),
        Condition("transformers clamp8", "transformers", "clamp8"),
        Condition("transformers add30", "transformers", "add30"),
        *(Condition(f"{edit}, {k} plans", "trimtab", edit, k) for edit in ("add", "clamp8") for k in (1, 16, 64)),
    )
}
OURS = ("plain", "plain again", "idle", "one add", "add", "clamp8", "gated", "add30")
BESIDE = tuple(name for name in CONDITIONS if name.startswith(("vllm-lens", "transformers")))


class Cell(NamedTuple):
    """One measured situation: how many requests at once, and how long they are."""

    n: int
    n_prompt: int
    n_tokens: int
    rounds: int
    conditions: tuple[str, ...]
    beside: int = 0
    """So many of the rounds, the first ones, run the other projects too."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Conditions that run side by side, in turns, each on an engine of its own; a round runs every group. None: one by one."""

    @property
    def n_entries(self) -> int:
        """What is kept of all rounds: one entry for each, or for each of its groups."""
        return self.rounds * max(1, len(self.groups))

    def n_rounds(self, n_entries: int) -> int:
        """How many whole rounds these entries are."""
        return n_entries // max(1, len(self.groups))


def turned(conditions: Sequence[str], k: int) -> list[str]:
    """The same, in an order that each round begins elsewhere."""
    k %= len(conditions)
    return [*conditions[k:], *conditions[:k]]


def assigned(group: tuple[str, ...], round_: int) -> dict[str, str]:
    """Engine by condition. Where one of two twins is wanted, they take it by turns; where both, they swap. In four rounds each
    process of plain vLLM meets each of Trimtab's."""
    engines = [CONDITIONS[name].engine for name in group]
    for name, turn in (("plain", round_), ("trimtab", round_ // 2)):
        twins = (name, f"{name} again")
        if twins[1] not in engines:
            for k, i in enumerate([i for i, engine in enumerate(engines) if engine == name]):
                engines[i] = twins[(k + turn) % 2]
    return dict(zip(group, engines, strict=True))


def pairings(group: tuple[str, ...]) -> set[tuple[str, str]]:
    """Each condition with each engine that it runs on in some round."""
    return {pair for round_ in range(4) for pair in assigned(group, round_).items()}


def _in_turns(n: int, n_prompt: int, n_tokens: int, rounds: int, *groups: tuple[str, ...], beside: int = 0) -> Cell:
    named = tuple(dict.fromkeys(name for group in groups for name in group))
    return Cell(n, n_prompt, n_tokens, rounds, named, beside, groups)


CELLS = {
    "turns-16": _in_turns(
        *(16, 16, 64, 20),
        *(("plain", edit, "plain again", f"{edit} again") for edit in ("idle", "add", "clamp8", "add30")),
        *(("plain", f"vllm-lens {edit}") for edit in ("idle", "add", "clamp8", "add30")),
        beside=3,
    ),
    "turns-64": _in_turns(
        *(64, 4, 16, 8), *((f"{edit}, 1 plans", f"{edit}, {k} plans") for edit in ("add", "clamp8") for k in (16, 64))
    ),
    "decode-16": Cell(16, 16, 64, 7, (*OURS, *BESIDE), 3),
    "decode-1": Cell(1, 16, 64, 5, (*OURS, *BESIDE), 2),
    "decode-64": Cell(64, 4, 16, 3, (*OURS, *BESIDE), 1),
    "prefill-16": Cell(16, 64, 2, 3, (*OURS, *BESIDE), 1),
    "prefill-1": Cell(1, 512, 2, 5, (*OURS, *BESIDE), 2),
    "prefill-64": Cell(64, 16, 2, 3, (*OURS, *BESIDE), 1),
}
ALONE = ("within", "calls", "step", "admission", "upload")
"""What is measured once, without the engines of the cells."""
CHECK = Cell(4, 16, 12, 1, ())
"""Not timed: the same prompts for every engine."""
STRONG = 64 * 64
"""As `which`: an amount that changes what is generated."""


def bundle(layer: int, *, name: str | None = None, n_latents: int = N_LATENTS, seed: int = 0) -> bundles.Bundle:
    """A bundle of random rows at one layer."""
    random = np.random.default_rng([layer, seed])
    rows = (random.standard_normal((n_latents, D_MODEL)) / D_MODEL**0.5).astype(np.float32)
    header = bundles.Header(
        name=name or f"l{layer}",
        behaviour="None: random rows.",
        created="2026-11-24T00:00:00Z",
        model=bundles.ModelIdentity(
            id=EMBEDDED_MODEL, architecture="-", d_model=D_MODEL, n_layers=N_LAYERS, fingerprint="-", tokenizer="-"
        ),
        sae=bundles.SAEIdentity(id="random", digest="-", d_sae=n_latents),
        layer=layer,
        resid_norm=RESID_NORM,
        latents=tuple(bundles.LatentRecord(latent=i, attribution=0.0, max_activation=10.0) for i in range(n_latents)),
        edits=(bundles.RecommendedEdit(latent=0, operation="add", amount=1.0),),
    )
    zeros = np.zeros(n_latents, np.float32)
    return bundles.Bundle(header, decoder=rows, encoder=rows, bias=zeros, threshold=zeros, baseline=zeros)


@lru_cache
def all_bundles() -> dict[str, bundles.Bundle]:
    """A bundle for each layer, by name."""
    return {f"l{layer}": bundle(layer) for layer in range(N_LAYERS)}


def authored(edit: str, which: int) -> dict[str, Any]:
    """The `steering` field of request number `which`: alike for every request, different in its amounts."""
    amount, scope = 0.5 + which / 64, {"first_token": True}

    def add(layer: int) -> dict[str, Any]:
        return {"bundle": f"l{layer}", "latent": 0, "operation": "add", "amount": amount, "scope": scope}

    match edit:
        case "add":
            return {"edits": [add(LAYER)]}
        case "add30":
            return {"edits": [add(layer) for layer in range(N_LAYERS)]}
        case "gated":
            gate = {"bundle": f"l{LAYER}", "latent": 1, "above": 0.5}
            return {"edits": [add(LAYER) | {"gate": gate}]}
        case "clamp8":
            one = {"bundle": f"l{LAYER}", "operation": "clamp", "target": amount, "scope": scope}
            return {"edits": [one | {"latent": i} for i in range(N_LATENTS)]}
    raise ValueError(edit)


def plan(edit: str, which: int) -> Plan:
    """The plan of `authored`."""
    return compile_plan(parse_steering(authored(edit, which)), all_bundles())


def prompts(cell: Cell, seed: str, round_: int) -> list[list[int]]:
    """Token ids that no other seed or round has, so that no prefix is cached."""
    random = np.random.default_rng([round_, *seed.encode()])
    ids: list[list[int]] = random.integers(1000, 40000, (cell.n, cell.n_prompt)).tolist()
    return ids
