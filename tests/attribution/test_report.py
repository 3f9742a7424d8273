"""`trimtab report`: what it shows is true, and a browser lays it out."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from tests.browser import laid_out
from tests.bundles import random_bundle
from trimtab.attribution.authored import Authored
from trimtab.attribution.bundle import Bundle
from trimtab.attribution.fidelity import Fidelity, Point
from trimtab.attribution.hand_picked import hand_picked
from trimtab.attribution.model import SplitModel, pad
from trimtab.attribution.pairs import Completion, shipped_pairs
from trimtab.attribution.report.document import document
from trimtab.attribution.report.examples import of_pairs, of_sae
from trimtab.attribution.report.page import page
from trimtab.attribution.report_command import report
from trimtab.attribution.sae import SAE, shipped_sae
from trimtab.attribution.validation import Effect, Effects

app = typer.Typer()
app.command()(report)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    edit = Authored.of("add", 0.1, "max_act", "completion")
    return hand_picked(
        "883,1693",
        sae=None,
        model="smollm2-135m-instruct",
        name="picked",
        behaviour="says <b>it</b> is software",
        edit=edit,
    )


@pytest.fixture(scope="module")
def pages(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report on the bundle, with the examples of three pairs."""
    folder = tmp_path_factory.mktemp("report")
    bundle.save(folder / "picked.safetensors")
    (folder / "few.jsonl").write_text("\n".join(shipped_pairs().read_text().splitlines()[:3]) + "\n")
    result = run(folder / "picked.safetensors", "--pairs", folder / "few.jsonl", "--out", folder / "picked.html")
    assert result.exit_code == 0, result.output
    return folder


def test_examples_are_where_the_latent_fires(
    bundle: Bundle, sae: SAE, model: SplitModel, tokenizer: Any, completions: list[Completion]
) -> None:
    shown = of_pairs(model, tokenizer, bundle, completions, n=2)
    for latent in (883, 1693):
        phi = [
            sae.encode(model.lower(pad([c]))[0, 1 : len(c.ids) - 1], torch.tensor([latent])).max() for c in completions
        ]
        top = sorted((float(a) for a in phi if a > 0), reverse=True)[:2]
        assert [example.activation for example in shown[latent]] == pytest.approx(top, rel=1e-4)
        assert all(max(a for _, a in example.tokens) == example.activation for example in shown[latent])
    of_text = of_sae(shipped_sae(), [883, 1693])
    assert of_text[1693][0].activation >= of_text[1693][-1].activation > 0


def test_the_page_holds_what_its_json_holds(pages: Path) -> None:
    found, page = json.loads((pages / "picked.json").read_text()), (pages / "picked.html").read_text()
    assert [card["latent"] for card in found["cards"]] == [883, 1693]
    for card in found["cards"]:
        assert len(card["promoted"]) == len(card["suppressed"]) == 8
        assert card["on_sae_text"]
        for token in card["promoted"]:
            assert html.escape(token, quote=False) in html.unescape(page).replace(
                "&", "&amp;"
            ) or token in html.unescape(page)
    assert found["content_hash"] in page
    assert "says &lt;b&gt;it&lt;/b&gt; is software" in page
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)=["']https?:""", page)


def test_what_a_run_measured_stands_in_its_report_and_that_first_order_failed() -> None:
    """Without a trial too: predicted against measured, the controls, every hook point."""
    effect = Effect(mean=-0.25, se=0.05, positive=0.3, negative=0.125, max_relative_norm=0.1)
    effects = Effects({7: effect}, {1.0: effect}, (effect, effect), effect, effect, effect)
    fidelity = Fidelity.of([Point(7, True, 0.3, 0.1), Point(8, True, 0.2, -0.2), Point(50, False, 0.0, 0.3)])
    layer = {"sae": "an SAE", "together": -0.25, "together_se": 0.05, "damage": 0.125, "difference_in_means": -1.0}
    recorded = {
        "effects": effects.summary(),
        "fidelity": fidelity.summary(),
        "layers": [{**layer, "layer": 1, "fidelity": 0.9}, {**layer, "layer": 2, "fidelity": None}],
        "leaders": {"project": [7, 99], "delta_activation": [8]},
    }
    found = document(random_bundle(provenance=recorded), None, {})
    assert found["cards"][0]["truth"] == {"latent": 7, "leading": True, "predicted": 0.3, "measured": 0.1}
    assert found["cards"][2]["truth"] is None
    assert {row["edit"]: row["damage"] for row in found["held_out"]}["as many leaders by Δ-activation"] == 0.125
    shown = page(found)
    assert shown.count("<svg") == 1
    for text in ("First order does not hold here", "-0.2500 ± 0.0500", "1 (this one)", "<b>7</b>, 99"):
        assert text in shown


def test_refusals(pages: Path, tmp_path: Path) -> None:
    bundle = pages / "picked.safetensors"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"format": "trimtab.trial", "version": 1, "bundle": {"content_hash": "sha256:other"}}))
    random_bundle().save(tmp_path / "random.safetensors")
    for arguments, says in (
        ([bundle, "--trial", tmp_path / "none.json"], "cannot read"),
        ([bundle, "--trial", bundle], "is no result of a trial"),
        ([bundle, "--trial", other], "give the bundle that was tried"),
        ([tmp_path / "random.safetensors", "--model", "smollm2-135m-instruct"], "was made for tiny"),
    ):
        result = run(*arguments, "--out", tmp_path / "r.html")
        assert (result.exit_code, result.stderr.count("error:")) == (2, 1), result.output
        assert says in " ".join(result.stderr.split())
    assert not (tmp_path / "r.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_lays_it_out_without_scrolling_sideways(pages: Path, tmp_path: Path, width: int) -> None:
    excess, shown = laid_out((pages / "picked.html").read_text(), tmp_path, width)
    assert excess <= 0
    assert shown.count("panel card") == 2
