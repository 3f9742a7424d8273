"""A whole run on a small real model: killed and resumed, in two processes, at several hook points, on bad input."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from tests.attribution.tiny import llama
from trimtab.attribution.bundle import Bundle
from trimtab.attribution.edit import Rows
from trimtab.attribution.errors import FidelityError, GradientError, SettingsError, StorageError
from trimtab.attribution.interventions import n_interventions
from trimtab.attribution.matrix import Stored
from trimtab.attribution.model import SplitModel
from trimtab.attribution.run import Result, Settings, attribute
from trimtab.attribution.sae import SAE
from trimtab.attribution.validation import Effect, Margins

N_PROMPTS = 16
BIN = Path(sys.executable).parent
PROVENANCE_OF_ITS_OWN = ("command", "seconds", "processes")


def sae(folder: Path, layer: int, seed: int, *, n_latents: int = 96, theta: float = 0.5) -> Path:
    """Random unit directions in SAELens' layout."""
    folder.mkdir()
    d = torch.nn.functional.normalize(torch.randn(n_latents, 32, generator=torch.Generator().manual_seed(seed)), dim=1)
    tensors = {"W_enc": d.T.contiguous(), "W_dec": d, "b_enc": torch.zeros(n_latents), "b_dec": torch.zeros(32)}
    save_file({**tensors, "threshold": torch.full((n_latents,), theta)}, folder / "sae_weights.safetensors")
    hook = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    (folder / "cfg.json").write_text(json.dumps({"architecture": "jumprelu", "metadata": hook}))
    return folder


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two SAEs and pairs."""
    folder = tmp_path_factory.mktemp("room")
    llama(folder / "model")
    sae(folder / "low", 1, 1)
    sae(folder / "high", 2, 2)
    lines = [
        {"prompt": f"Question {i}: {'ab' * (i % 5)}?", "positive": " yes yes" * (1 + i % 3), "negative": " no, not so"}
        for i in range(N_PROMPTS)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def settings(room: Path, **changes: Any) -> Settings:
    chosen = Settings(
        pairs=room / "pairs.jsonl",
        saes=(room / "low",),
        model=str(room / "model"),
        name="tiny",
        behaviour="says yes",
        operation="ablate",
        top=3,
        batch_tokens=1,
    )
    return replace(chosen, **changes)


def run(settings: Settings) -> tuple[Result, ...]:
    return attribute(settings, Progress(disable=True))


def numbers(result: Result | Bundle) -> dict[str, Any]:
    """Everything in a bundle but when, how and for how long it was made."""
    bundle = result if isinstance(result, Bundle) else result.bundle
    document = bundle.header.model_dump(mode="json", exclude={"created"})
    for field in PROVENANCE_OF_ITS_OWN:
        del document["provenance"][field]
    return document


def same(one: Any, other: Any, rel: float) -> bool:
    """Whether two JSON values are equal, floats to `rel`."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k], rel) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other, [rel] * len(one)))
    return bool(one == pytest.approx(other, rel=rel, abs=1e-9)) if isinstance(one, float) else bool(one == other)


@pytest.fixture(scope="module")
def uninterrupted(room: Path) -> Result:
    (result,) = run(settings(room))
    return result


def test_the_predictions_hold_on_a_small_model(uninterrupted: Result) -> None:
    fidelity = uninterrupted.measured.fidelity
    assert fidelity.holds
    assert len(fidelity.points) == 20
    assert uninterrupted.bundle.header.provenance["fidelity"]["holds"] is True
    for record in uninterrupted.bundle.header.latents:
        assert record.attribution_interval is not None
        assert record.attribution is not None
        low, high = record.attribution_interval
        assert low <= record.attribution <= high
        assert 0 < (record.attribution_p or 0) <= 1


def test_the_rival_is_what_was_measured_beside_the_leaders(room: Path, uninterrupted: Result) -> None:
    rival, measured = Bundle.from_bytes(uninterrupted.rival.to_bytes()), uninterrupted.measured
    latents = [record.latent for record in rival.header.latents]
    assert latents == measured.by_activation
    assert len(latents) == len(uninterrupted.bundle.header.latents)
    scores = [record.delta_activation or 0.0 for record in rival.header.latents]
    assert scores == sorted(scores, reverse=True)
    assert [(edit.latent, edit.operation) for edit in rival.header.edits] == [(latent, "ablate") for latent in latents]
    assert torch.equal(torch.from_numpy(rival.decoder), SAE.load(room / "low").d_LD[latents])
    assert rival.header.name == "tiny.by-activation"
    assert rival.header.provenance["rival_of"] == uninterrupted.bundle.content_hash


def test_a_model_in_bf16_ranks_much_the_same(room: Path, uninterrupted: Result) -> None:
    (found,) = run(settings(room, dtype="bfloat16", allow_low_fidelity=True))
    assert found.bundle.header.provenance["dtype"] == "bfloat16"
    scores = torch.stack([found.ranking.scores.operation_L, uninterrupted.ranking.scores.operation_L])
    assert 0.95 < float(torch.corrcoef(scores)[0, 1]) < 1


def command(room: Path, out: Path, *more: str) -> list[str]:
    given = {"pairs": room / "pairs.jsonl", "model": room / "model", "sae": room / "low", "out": out, "top": 3}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    fixed = ["--name", "tiny", "--behaviour", "says yes", "--operation", "ablate", "--batch-tokens", "1"]
    return [str(BIN / "trimtab"), "attribute", *options, *fixed, *more]


def test_a_killed_run_goes_on_and_gives_identical_numbers(room: Path, tmp_path: Path, uninterrupted: Result) -> None:
    out = tmp_path / "b.safetensors"
    work = tmp_path / "b.safetensors.run"
    process = subprocess.Popen(command(room, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while (
        len(done := sorted(work.rglob("*.safetensors"))) < 3 and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert len(done) >= 3
    written = {file: file.stat().st_mtime_ns for file in done}
    (resumed,) = run(settings(room, work=work))
    assert {file: file.stat().st_mtime_ns for file in done} == written
    assert numbers(resumed) == numbers(uninterrupted)


@pytest.mark.parametrize(
    "more",
    [pytest.param([], id="data"), pytest.param(["--tensor-parallel"], id="model", marks=pytest.mark.slow)],
)
def test_two_processes_are_one(room: Path, tmp_path: Path, uninterrupted: Result, more: list[str]) -> None:
    out = tmp_path / "b.safetensors"
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *command(room, out, *more)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = Bundle.load(out)
    assert found.header.provenance["processes"] == 2
    # Each process adds up its own passes, M in fp32: the score by projection differs by one unit in the last place of its largest
    # term, at most 2e-6 of itself where the terms cancel. All else is the same to 1e-13.
    assert same(numbers(found), numbers(uninterrupted), 1e-3 if more else 1e-5)
    assert list(tmp_path.iterdir()) == [out]


def test_interventions_that_are_done_are_not_made_again(
    room: Path, tmp_path: Path, uninterrupted: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    effects, most = Margins.effects, 2

    def counted(self: Margins, edits: Sequence[Rows]) -> list[Effect]:
        if len(made) == most:
            raise KeyboardInterrupt
        made.append(len(edits))
        return effects(self, edits)

    monkeypatch.setattr(Margins, "effects", counted)
    with pytest.raises(KeyboardInterrupt):
        run(settings(room, work=tmp_path))
    most = 1_000
    (resumed,) = run(settings(room, work=tmp_path))
    assert sum(made) == n_interventions(settings(room).top)
    assert numbers(resumed) == numbers(uninterrupted)


def test_several_hook_points_share_their_passes(room: Path, uninterrupted: Result) -> None:
    low, high = run(settings(room, saes=(room / "high", room / "low")))
    assert [result.bundle.header.layer for result in (low, high)] == [1, 2]
    (alone,) = run(settings(room, saes=(room / "high",)))
    for together, one in ((low, uninterrupted), (high, alone)):
        expected, found = numbers(one), numbers(together)
        layers = found["provenance"].pop("layers")
        assert [entry["layer"] for entry in layers] == [1, 2]
        assert same(expected["provenance"].pop("layers"), [layers[together is high]], 1e-3)
        del expected["provenance"]["fidelity"]["points"], found["provenance"]["fidelity"]["points"]
        assert same(found, expected, 1e-3)


@pytest.mark.parametrize("gradient", ["relp", "integrated"])
def test_other_gradients_rank_otherwise_and_say_so(room: Path, uninterrupted: Result, gradient: Any) -> None:
    (found,) = run(settings(room, gradient=gradient, allow_low_fidelity=True))
    assert found.bundle.header.provenance["gradient"].startswith(gradient)
    mine, plain = found.ranking.scores.operation_L, uninterrupted.ranking.scores.operation_L
    assert not torch.allclose(mine, plain, rtol=1e-2)
    assert float(torch.corrcoef(torch.stack([mine, plain]))[0, 1]) > 0.3


def test_a_model_differs_from_itself_in_nothing(room: Path, tmp_path: Path) -> None:
    (same_model,) = run(settings(room, diff_model=str(room / "model")))
    assert not same_model.ranking.scores.by["model_diffing"].any()
    llama(tmp_path / "other", seed=1)
    (other,) = run(settings(room, diff_model=str(tmp_path / "other")))
    assert other.ranking.scores.by["model_diffing"].any()
    assert "model_diffing" in other.bundle.header.provenance["leaders"]


def test_a_wide_sae_is_scored_whole_and_encoded_in_part(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate has the score that it has when all latents are encoded, under its own number."""
    (whole,) = run(settings(room, operation="project", allow_low_fidelity=True))
    monkeypatch.setattr("trimtab.attribution.ranking.N_CANDIDATES", 30)
    monkeypatch.setattr(SplitModel, "n_parameters", 100)
    (narrow,) = run(settings(room, operation="project", allow_low_fidelity=True))
    held = narrow.ranking.sae.held_K
    assert held is not None
    assert 30 <= len(held) < 60
    assert set(whole.ranking.scores.project_L.topk(30).indices.tolist()) <= set(held.tolist())
    for method, score_L in narrow.ranking.scores.by.items():
        torch.testing.assert_close(score_L, whole.ranking.scores.by[method][held])
    for mine, theirs in zip(narrow.bundle.header.latents, whole.bundle.header.latents, strict=True):
        assert mine.latent == theirs.latent
        assert mine.attribution == pytest.approx(theirs.attribution)
    provenance = narrow.bundle.header.provenance
    assert (provenance["scored_latents"], provenance["encoded_latents"]) == (96, len(held))
    assert narrow.bundle.header.sae.d_sae == 96


@pytest.mark.slow
def test_two_million_latents_are_scored_from_disk(room: Path, tmp_path: Path) -> None:
    """The projection of each meets the leaders' own score; neither matrix is read into memory whole."""
    n_latents = 1 << 21
    source = sae(tmp_path / "wide", 1, 3, n_latents=n_latents, theta=4.0)
    assert isinstance(SAE.load(source).d_LD, Stored)
    (found,) = run(settings(room, saes=(source,), operation="project", allow_low_fidelity=True))
    ranking = found.ranking
    assert ranking.sae.n_all == n_latents
    assert 4096 < ranking.sae.d_sae <= 8192
    best = found.bundle.header.latents[0]
    assert best.attribution == float(ranking.scores.project_L[ranking.live_L].max())
    assert SAE.load(source).d_LD[best.latent].tolist() == pytest.approx(found.bundle.decoder[0].tolist())


def test_an_edit_too_large_for_first_order_fails_loudly(room: Path, tmp_path: Path) -> None:
    bad = settings(room, operation="scale", amount=-60.0, work=tmp_path / "work")
    with pytest.raises(FidelityError, match=r"correlate at .*below 0.5; try a smaller --amount"):
        run(bad)
    (marked,) = run(replace(bad, allow_low_fidelity=True))
    assert marked.bundle.header.provenance["fidelity"]["holds"] is False


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """What a full disk looks like to one process: no file may grow beyond `n_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_loses_nothing(room: Path, tmp_path: Path, uninterrupted: Result) -> None:
    """Passes go from the longest to the shortest; leave room for small files alone, then for all."""
    work = tmp_path / "work"
    with file_size_limit(1000), pytest.raises(StorageError, match=r"make room and run the same command again"):
        run(settings(room, work=work))
    assert not list(work.rglob("*.part"))
    (resumed,) = run(settings(room, work=work))
    assert numbers(resumed) == numbers(uninterrupted)


def test_a_damaged_pass_is_named(room: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    run(settings(room, work=work))
    victim = sorted(work.rglob("*.safetensors"))[4]
    victim.write_bytes(victim.read_bytes()[:-40])
    with pytest.raises(StorageError, match=rf"{victim.name} is damaged .*remove it and run the same command again"):
        run(settings(room, work=work))
    victim.unlink()
    run(settings(room, work=work))


def test_a_gradient_that_is_not_finite_names_its_pair(room: Path, tmp_path: Path) -> None:
    """A head row of infinity: the loss of every completion that predicts against it is not finite."""
    broken = tmp_path / "model"
    llama(broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][60] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GradientError, match=r"the gradient of pair 'line-\d+', (positive|negative) completion, is not"):
        run(settings(room, model=str(broken)))


def test_two_saes_of_one_block_are_refused(room: Path) -> None:
    with pytest.raises(SettingsError, match=r"read blocks \[1, 1\]"):
        run(settings(room, saes=(room / "low", room / "low")))
    with pytest.raises(SettingsError, match="integrated gradients follow a path of their own"):
        run(settings(room, saes=(room / "low", room / "high"), gradient="integrated"))
