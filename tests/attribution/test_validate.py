"""`trimtab validate` against the real server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from tests.bundles import random_bundle
from tests.conftest import Server
from tests.processes import descendants
from trimtab.attribution.bundle import Bundle, ModelIdentity
from trimtab.attribution.edit import Rows
from trimtab.attribution.errors import ServingError
from trimtab.attribution.journal import Journal
from trimtab.attribution.model import SplitModel
from trimtab.attribution.pairs import Pair, load_pairs, shipped_pairs, split, tokenise
from trimtab.attribution.report.document import document, read_trial
from trimtab.attribution.report.page import page
from trimtab.attribution.trial.endpoint import Endpoint, Reply
from trimtab.attribution.trial.forced import Margins
from trimtab.attribution.validate_command import validate
from trimtab.attribution.validation import Margins as Reference
from trimtab.client import Latent

GRADER = "trimtab.attribution.graders.pretends_human:grade"
app = typer.Typer()
app.command()(validate)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result: Result) -> str:
    assert (result.exit_code, result.stderr.count("error:")) == (2, 1), result.output
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def few() -> list[Pair]:
    """Three held-out pairs, a prompt each: means over pairs and over prompts are then the same."""
    held_out = split(load_pairs(shipped_pairs()).pairs, 0.35)[1]
    return list({pair.prompt_key: pair for pair in held_out}.values())[:3]


@pytest.mark.parametrize("scope", ["completion", pytest.param("all", marks=pytest.mark.slow)])
def test_margins_through_the_server_are_those_of_transformers(
    server: Server, model: SplitModel, tokenizer: Any, few: list[Pair], tmp_path: Path, scope: Any
) -> None:
    pairs = [tokenise(tokenizer, pair) for pair in few]
    with (
        Journal.open(tmp_path / "j.jsonl", {}) as journal,
        Endpoint.open(server.base_url, server.model, None, [server.bundle]) as endpoint,
    ):
        through = Margins(journal, endpoint, pairs, [p.prompt_key for p in few], 8, lambda *_: None)
        edits = (Latent("calm", 7).add(30.0).during(scope), Latent("calm", 8).ablate().during(scope))
        (shift,) = through.shifts([edits])
    b = server.bundle
    d_KD = torch.from_numpy(b.decoder[:2])
    rows = Rows(
        torch.tensor([30.0, 0.0]),
        torch.tensor([0.0, -1.0]),
        torch.from_numpy(b.encoder[:2]),
        torch.from_numpy(b.bias[:2]),
        torch.from_numpy(b.threshold[:2]),
        d_KD,
    )
    effect = Reference(model, pairs, [p.prompt_key for p in few], scope).effect(rows)
    assert effect.negative > 0.05  # the edit does something
    assert float(shift.margin_P.mean()) == pytest.approx(effect.mean, abs=1e-4)
    assert float(shift.damage_P.mean()) == pytest.approx(effect.negative, abs=1e-4)


def test_a_trial_from_pairs_to_a_bundle_with_evidence_and_a_page(
    server: Server, few: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, out = tmp_path / "calm.safetensors", tmp_path / "out" / "calm.validated.safetensors"
    server.bundle.save(bundle)
    pairs = tmp_path / "few.jsonl"
    ids = {pair.id for pair in few}
    pairs.write_text(
        "\n".join(x for x in shipped_pairs().read_text().splitlines() if json.loads(x)["id"] in ids) + "\n"
    )
    neutral = tmp_path / "neutral.txt"
    neutral.write_text("What is the capital of France?\n")
    options: list[object] = [bundle, "--grader", GRADER, "--pairs", pairs, "--held-out", 1.0, "--neutral", neutral]
    options += ["--strengths", "-1,1", "--seeds", 1, "--max-tokens", 8, "--system", "You are a machine.", "--out", out]
    options += ["--model", server.model]
    reply, n_done = Endpoint.reply, 0

    def lost_after_five(self: Endpoint, *asked: Any) -> Reply:
        nonlocal n_done
        if n_done >= 5:
            raise ServingError("the server is gone")
        n_done += 1
        return reply(self, *asked)

    with monkeypatch.context() as lost:
        lost.setattr(Endpoint, "reply", lost_after_five)
        assert "the server is gone" in refused(run(*options, "--url", server.base_url, "--parallel", 4))
    assert not out.exists()
    kept = out.with_suffix(".journal.jsonl").read_bytes()
    assert kept.count(b'"cached_tokens"') >= 1
    first = run(*options, "--url", server.base_url)
    assert first.exit_code == 0, first.output
    journal = out.with_suffix(".journal.jsonl").read_bytes()
    keys = [json.loads(line).get("key") for line in journal.splitlines()]
    assert journal.startswith(kept)
    assert len(set(keys)) == len(keys)  # none of it was asked again
    found = json.loads(out.with_suffix(".json").read_text())
    arms = {(d["arm"], d["strength"]) for d in found["doses"]}
    assert {
        ("unsteered", 0.0),
        ("latent 7", -1.0),
        ("together", 1.0),
        ("minus mean", 1.0),
        ("system message", 0.0),
    } <= arms
    assert all(
        d["n_prompts"] == len({p.prompt_key for p in few}) and d["neutral_changed"] is not None for d in found["doses"]
    )
    assert set(found["margins"]) >= {"latent 7", "latent 8", "latent 9", "together", "minus mean"}
    written = Bundle.load(out)
    written.check_model(server.bundle.header.model)
    assert all(record.effect is not None for record in written.header.latents)
    assert written.header.provenance["trial"]["asked"]["pairs"] == load_pairs(pairs).digest

    again = run(*options, "--url", server.base_url, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["doses"] == found["doses"]
    assert out.with_suffix(".journal.jsonl").read_bytes() == journal  # nothing was asked twice

    written = Bundle.load(out)
    html = page(document(written, read_trial(out.with_suffix(".json"), written), {}))
    assert html.count('class="panel card"') == 3
    assert html.count("<svg") == 4  # each latent's dose and response, and the baselines
    assert "<script" not in html


def test_refusals(server: Server, tmp_path: Path) -> None:
    bundle, prompts = tmp_path / "calm.safetensors", tmp_path / "p.txt"
    server.bundle.save(bundle)
    random_bundle().save(tmp_path / "tiny.safetensors")
    prompts.write_text("Name a colour.\nName a city.\n")
    asked = [bundle, "--grader", GRADER, "--prompts", prompts]
    there = ["--url", server.base_url, "--model", server.model]
    cases: tuple[tuple[list[object], str], ...] = (
        ([tmp_path / "none.safetensors", *asked[1:]], "cannot read bundle"),
        ([*asked, "--strengths", "0,1"], "is not 0"),
        ([*asked, "--strengths", "strong"], "are no numbers"),
        (asked[:3], "needs two prompts or more"),
        (
            [
                tmp_path / "tiny.safetensors",
                *asked[1:],
                "--pairs",
                shipped_pairs(),
                "--tokenizer",
                "smollm2-135m-instruct",
            ],
            "has another tokenizer than the model of bundle",
        ),
        ([*asked, "--url", "http://127.0.0.1:9"], "cannot be reached"),
        ([*asked, "--url", server.base_url, "--model", "another"], "`another` does not exist"),
    )
    for i, (arguments, says) in enumerate(cases):
        assert says in refused(run(*arguments, "--journal", tmp_path / f"{i}.jsonl"))
    rival = server.bundle.header.model_copy(update={"behaviour": "another of the same name"})
    b = server.bundle
    rows = {name: getattr(b, name) for name in ("decoder", "encoder", "bias", "threshold", "baseline", "vectors")}
    Bundle(rival, **rows).save(tmp_path / "rival.safetensors")
    assert "calm" in refused(run(tmp_path / "rival.safetensors", *asked[1:], *there))
    assert not list(tmp_path.glob("*.validated.safetensors"))


@pytest.mark.slow
def test_a_server_is_started_where_none_is_named_and_stopped(
    embedded_identity: ModelIdentity, few: list[Pair], tmp_path: Path
) -> None:
    bundle, prompts = tmp_path / "calm.safetensors", tmp_path / "p.txt"
    random_bundle(embedded_identity, layer=14).save(bundle)
    prompts.write_text("Name a colour.\nName a city.\n")
    options: list[object] = [
        "--grader",
        GRADER,
        "--prompts",
        prompts,
        "--neutral",
        prompts,
        "--strengths",
        1,
        "--seeds",
        1,
    ]
    before = set(descendants(os.getpid()))
    done = run(bundle, *options, "--max-tokens", 4, "--parallel", 8)
    assert done.exit_code == 0, done.output
    Bundle.load(tmp_path / "calm.validated.safetensors")
    assert not set(descendants(os.getpid())) - before
