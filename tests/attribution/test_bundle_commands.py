"""`trimtab bundle build`, `diff` and `verify`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner, Result

from tests.bundles import random_bundle
from trimtab.attribution.bundle import Bundle
from trimtab.attribution.bundle_commands import bundle
from trimtab.attribution.sae import SAE, shipped_sae


def run(*arguments: object) -> Result:
    return CliRunner().invoke(bundle, [str(a) for a in arguments])


def refused(result: Result) -> str:
    assert (result.exit_code, result.stderr.count("error:")) == (2, 1), result.output
    return " ".join(result.stderr.split())


def test_a_bundle_of_named_latents_is_that_of_its_model_and_sae(sae: SAE, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    made = run("build", "--latents", "883,5", "--behaviour", "none", "--operation", "ablate", "--out", out)
    assert made.exit_code == 0, made.output
    loaded = Bundle.load(out)
    assert [record.latent for record in loaded.header.latents] == [883, 5]
    assert [edit.operation for edit in loaded.header.edits] == ["ablate", "ablate"]
    assert loaded.header.latents[0].attribution is None
    assert np.array_equal(loaded.decoder[0], sae.d_LD[883].numpy())
    checked = run("verify", out, "--model", "smollm2-135m-instruct", "--sae", shipped_sae())
    assert checked.exit_code == 0, checked.output
    assert loaded.content_hash in " ".join(checked.output.split())
    rows = {name: getattr(loaded, name) for name in ("decoder", "encoder", "bias", "threshold", "baseline")}
    for name in ("decoder", "threshold"):
        Bundle(loaded.header, **{**rows, name: rows[name] + np.float32(1)}).save(out)
        assert f"its {name} rows are not those of" in refused(run("verify", out, "--sae", shipped_sae()))


def test_what_cannot_be_built_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    for latents, says in (("5,5", "named twice"), ("8192", "outside 0..8191"), ("five", "are no indices")):
        assert says in refused(run("build", "--latents", latents, "--behaviour", "none", "--out", out))
    assert not out.exists()


def test_diff_names_every_difference(tmp_path: Path) -> None:
    first, same, second = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "c"))
    one = random_bundle()
    one.save(first)
    one.save(same)
    random_bundle(seed=1, behaviour="other", provenance={"command": "x"}).save(second)
    alike = run("diff", first, same)
    assert (alike.exit_code, alike.output.strip()) == (0, "the same bundle, byte for byte")
    found = run("diff", first, second)
    assert found.exit_code == 1
    told = json.loads(run("diff", first, second, "--json").stdout)
    assert (told["same"], told["differences"]) == (False, found.stdout.splitlines())
    for line in (
        "behaviour: random rows, for tests → other",
        "provenance.command: None → x",
        "latents 7.decoder: differs by",
    ):
        assert line in found.output


def test_verify_finds_altered_bytes_another_model_and_other_rows(tmp_path: Path) -> None:
    file = tmp_path / "b.safetensors"
    random_bundle().save(file)
    assert "was made for tiny" in refused(run("verify", file, "--model", "smollm2-135m-instruct"))
    assert "was made from SAE" in refused(run("verify", file, "--sae", shipped_sae()))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "altered or damaged" in refused(run("verify", file))
