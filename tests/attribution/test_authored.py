"""The authored edit: what a run measures is what a server compiles of the bundle's recommendation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.attribution.authored import DEFAULT_AMOUNT, Authored, vector_rows
from trimtab.attribution.bundle import ModelIdentity, SAEIdentity
from trimtab.attribution.edit import Rows, delta
from trimtab.attribution.errors import SettingsError
from trimtab.attribution.record import rows_of
from trimtab.attribution.sae import SAE
from trimtab.attribution.stats import Stats
from trimtab.server.plan import compile_plan
from trimtab.server.steering import Scope, parse_steering
from trimtab.server.window import Window

D, L = 6, 5


@pytest.fixture
def sae() -> SAE:
    generator = torch.Generator().manual_seed(0)
    e, d = torch.randn(L, D, generator=generator), torch.randn(L, D, generator=generator)
    return SAE("tiny", "sha256:tiny", 1, e, torch.randn(L, generator=generator), torch.full((L,), 0.3), d, None, {})


@pytest.fixture
def stats() -> Stats:
    generator = torch.Generator().manual_seed(1)
    return Stats(torch.randn(D, generator=generator), 50.0, torch.rand(L), 1 + torch.rand(L), "random")


@pytest.mark.parametrize(
    ("operation", "amount", "unit"),
    [
        ("add", None, "raw"),
        ("add", -3.0, "raw"),
        ("ablate", None, "raw"),
        ("clamp", 0.5, "max_act"),
        ("scale", -2.0, "raw"),
        ("project", None, "raw"),
    ],
)
def test_the_rows_are_those_of_the_plan_that_recommends_them(
    sae: SAE, stats: Stats, operation: Any, amount: float | None, unit: Any
) -> None:
    edit = Authored.of(operation, amount, unit, "completion")
    latents, strength = [3, 1], 1.7
    bundle = rows_of(header(edit, stats, latents), sae, stats, latents, torch.ones(D))
    plan = compile_plan(parse_steering({"bundle": "tiny", "strength": strength}), {"tiny": bundle})
    h = torch.randn(40, D, generator=torch.Generator().manual_seed(2))
    mine = delta(h, edit.rows(sae, stats, latents, strength))
    theirs = sum((delta(h, served(bundle, row)) for row in plan.rows), torch.zeros_like(h))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert {(row.layer, row.window) for row in plan.rows} == {(1, Window.of(Scope(tokens="completion")))}
    assert not any(row.exclude_special for row in plan.rows)


def test_special_tokens_that_were_left_out_of_the_scores_are_left_alone_by_the_server(sae: SAE, stats: Stats) -> None:
    edit = Authored.of("ablate", None, "raw", "all", exclude_special=True)
    bundle = rows_of(header(edit, stats, [3]), sae, stats, [3], torch.ones(D))
    plan = compile_plan(parse_steering({"bundle": "tiny"}), {"tiny": bundle})
    assert [row.exclude_special for row in plan.rows] == [True]


def header(edit: Authored, stats: Stats, latents: list[int]) -> Any:
    from trimtab.attribution.bundle import Header, LatentRecord, VectorRecord

    return Header(
        name="tiny",
        behaviour="random",
        created="2026-11-22T00:00:00Z",
        model=ModelIdentity(
            id="tiny", architecture="Tiny", d_model=D, n_layers=3, fingerprint="sha256:a", tokenizer="sha256:b"
        ),
        sae=SAEIdentity(id="tiny", digest="sha256:tiny", d_sae=L),
        layer=1,
        resid_norm=stats.resid_norm,
        latents=tuple(
            LatentRecord(latent=i, attribution=0.1, max_activation=float(stats.max_activation_L[i])) for i in latents
        ),
        vectors=(VectorRecord(name="difference_in_means", source="ones", norm=1.0),),
        edits=tuple(edit.recommended(i) for i in latents),
    )


def served(bundle: Any, row: Any) -> Rows:
    """A plan's row with its tensors out of the bundle, as a worker finds them."""
    one = torch.ones(1)
    d = torch.from_numpy(bundle.decoder[[row.row]])
    if row.source == "project":
        u = d / d.norm()
        return Rows(row.alpha * one, row.beta * one, u, 0 * one, -torch.inf * one, u)
    e, b, theta = (torch.from_numpy(getattr(bundle, name)[[row.row]]) for name in ("encoder", "bias", "threshold"))
    return Rows(row.alpha * one, row.beta * one, e, b, theta, d)


def test_add_and_clamp_have_a_default_amount() -> None:
    assert Authored.of("add", None, "raw", "all") == Authored("add", DEFAULT_AMOUNT, "max_act", "all")
    assert Authored.of("clamp", 3.0, "raw", "all") == Authored("clamp", 3.0, "raw", "all")


@pytest.mark.parametrize(
    ("operation", "amount", "unit", "says"),
    [
        ("scale", None, "raw", "needs a factor"),
        ("ablate", 1.0, "raw", "takes no amount"),
        ("project", 1.0, "raw", "takes no amount"),
        ("scale", 2.0, "max_act", "has no unit"),
        ("ablate", None, "max_act", "has no unit"),
    ],
)
def test_amounts_that_do_not_fit_are_refused(operation: Any, amount: Any, unit: Any, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Authored.of(operation, amount, unit, "all")


@pytest.mark.parametrize(
    ("operation", "amount", "turns_up"),
    [("add", 1.0, True), ("add", -1.0, False), ("ablate", None, False), ("scale", 0.5, False), ("scale", 3.0, True)],
)
def test_what_turns_a_latent_up(operation: Any, amount: float | None, turns_up: bool) -> None:
    assert Authored.of(operation, amount, "raw", "all").turns_up is turns_up


def test_a_vector_row_adds_the_vector() -> None:
    v = torch.tensor([1.0, -2.0])
    assert delta(torch.randn(3, 2), vector_rows(v, -0.5)).tolist() == [[-0.5, 1.0]] * 3
