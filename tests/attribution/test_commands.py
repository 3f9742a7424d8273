"""`trimtab attribute` and `trimtab bundle show`, from the shell's point of view: a bundle, or one sentence and nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.bundles import random_bundle
from trimtab.attribution.bundle import Bundle
from trimtab.attribution.commands import attribute, bundle
from trimtab.attribution.commands import model as model_command
from trimtab.attribution.embedded import model_path
from trimtab.attribution.model import identify
from trimtab.attribution.pairs import load_pairs, shipped_pairs, split
from trimtab.attribution.sae import shipped_sae

app = typer.Typer()
app.command()(attribute)
app.command("model")(model_command)
app.add_typer(bundle, name="bundle")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def few_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shipped pairs, four to train on and two held out."""
    train, held_out = split(load_pairs(shipped_pairs()).pairs, 0.35)
    keep = {pair.id for pair in (*train[:4], *held_out[:2])}
    lines = [line for line in shipped_pairs().read_text().splitlines() if json.loads(line)["id"] in keep]
    file = tmp_path_factory.mktemp("pairs") / "few.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_a_run_writes_a_bundle_of_this_model_and_this_sae(few_pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "human.safetensors"
    options = ["--behaviour", "pretends", "--out", out, "--rival", out.with_name("rival.safetensors"), "--top", 3]
    result = run("attribute", "--pairs", few_pairs, *options, "--json")
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.parent.iterdir()} == {"human.safetensors", "rival.safetensors"}
    assert Bundle.load(out.with_name("rival.safetensors")).header.name == "human.by-activation"
    loaded = Bundle.load(out)
    loaded.check_model(identify("smollm2-135m-instruct")[0])
    document = json.loads(result.stdout)
    assert document["content_hash"] == loaded.content_hash
    header = loaded.header
    assert (header.name, header.behaviour, header.hook_point) == ("human", "pretends", "blocks.14.resid_post")
    assert (len(header.latents), len(header.vectors)) == (3, 1)
    assert {edit.latent or edit.vector for edit in header.edits} <= {
        *(record.latent for record in header.latents),
        *(vector.name for vector in header.vectors),
    }
    assert all(record.attribution_se is not None and record.effect is not None for record in header.latents)
    assert all((record.density or 0) > 0 and record.max_activation > 0 for record in header.latents)
    assert header.provenance["pairs"]["digest"] == load_pairs(few_pairs).digest
    assert (header.provenance["train_pairs"], header.provenance["held_out_pairs"]) == (4, 2)
    shown = run("bundle", "show", out)
    assert shown.exit_code == 0
    assert all(str(record.latent) in shown.stdout for record in header.latents)
    assert json.loads(run("bundle", "show", out, "--json").stdout) == document


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 7: Expecting"),
        ('{"prompt": "Q", "positive": "a", "negative": "b", "lable": 1}', "unknown field 'lable'"),
    ],
)
def test_a_broken_pair_writes_nothing(few_pairs: Path, tmp_path: Path, line: str, says: str) -> None:
    pairs = tmp_path / "broken.jsonl"
    pairs.write_text(few_pairs.read_text() + line + "\n")
    out = tmp_path / "out" / "b.safetensors"
    assert says in refused(run("attribute", "--pairs", pairs, "--behaviour", "x", "--out", out))
    assert not out.parent.exists()


def test_an_sae_of_another_width_is_refused_before_the_model_is_loaded(few_pairs: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    sae = tmp_path / "blocks.3.hook_resid_post"
    sae.mkdir()
    zeros = {"W_enc": (1024, 8), "W_dec": (8, 1024), "b_enc": (8,), "b_dec": (1024,), "threshold": (8,)}
    save_file({name: torch.zeros(shape) for name, shape in zeros.items()}, sae / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "metadata": {"hook_name": "blocks.3.hook_resid_post"}}
    (sae / "cfg.json").write_text(json.dumps(config))
    out = tmp_path / "b.safetensors"
    says = refused(run("attribute", "--pairs", few_pairs, "--behaviour", "x", "--sae", sae, "--out", out))
    assert "has d_in 1024 but smollm2-135m-instruct has d_model 576" in says
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pairs", "PAIRS"], "--behaviour"),
        (["--pairs", "nowhere.jsonl", "--behaviour", "x"], "cannot read pairs"),
        (["--operation", "scale"], "operation scale needs a factor"),
        (["--operation", "ablate", "--amount", "2"], "operation ablate takes no amount"),
        (["--sae", "nowhere"], "give a SAELens folder"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--name", "two words"], "two words"),
    ],
)
def test_refusals(few_pairs: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    out = tmp_path / "b.safetensors"
    given = [str(few_pairs) if a == "PAIRS" else a for a in arguments]
    assert says in refused(run("attribute", *given, "--out", out))
    assert not out.exists()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(run("attribute", "--out", tmp_path / "file" / "b.safetensors"))


def test_show_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    file = tmp_path / "b.safetensors"
    assert "cannot read bundle" in refused(run("bundle", "show", file))
    random_bundle().save(file)
    file.write_bytes(file.read_bytes()[:-3])
    assert "not a whole trimtab bundle" in refused(run("bundle", "show", file))
    assert "not a trimtab bundle" in refused(run("bundle", "show", shipped_sae() / "sae_weights.safetensors"))


def test_model_prints_the_folder() -> None:
    assert run("model").stdout.strip() == str(model_path())
