"""Every format, in files that its own library wrote, against what that library's own encoder and decoder make of them."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.attribution import matrix
from trimtab.attribution import sae as sae_module
from trimtab.attribution.errors import SAEError
from trimtab.attribution.matrix import Stored
from trimtab.attribution.sae import SAE
from trimtab.attribution.sae_convert import convert
from trimtab.attribution.sae_formats import read

FORMATS = Path(__file__).parent / "formats"
L, K = 24, 4


def sources(*formats: str) -> list[Any]:
    """The folder, or the pickle, of every case of these formats."""
    found = []
    for expected in sorted(FORMATS.rglob("expected.safetensors")):
        name = expected.parent.relative_to(FORMATS)
        if name.parts[0] in formats:
            files = [f for f in expected.parent.iterdir() if f.suffix in (".pt", ".pth")]
            found.append(pytest.param(files[0] if files else expected.parent, id=str(name.parent / name.name)))
    return found


MAPPED = ("saelens", "sparsify", "gemma_scope_1", "gemma_scope_2", "llama_scope")
PICKLED = ("dictionary_learning", "openai", "qwen_scope", "goodfire", "deepseek_r1")
DIRECT, CONVERTED = sources(*MAPPED), sources(*PICKLED)


def expected(source: Path) -> dict[str, torch.Tensor]:
    return load_file((source if source.is_dir() else source.parent) / "expected.safetensors")


def check(sae: SAE, source: Path) -> None:
    """The SAE fires as its library says, and what fires writes what its library's decoder writes."""
    want = expected(source)
    torch.testing.assert_close(sae.encode(want["h"]), want["phi"], rtol=2e-5, atol=2e-5)
    some = torch.tensor([7, 2])
    torch.testing.assert_close(sae.encode(want["h"], some), want["phi"][:, some], rtol=2e-5, atol=2e-5)


def check_written(source: Path) -> None:
    found, want = read(source, pickles=True), expected(source)
    if "recon" in want:  # Those that normalise each token scale their output by it too.
        recon = want["phi"] @ found.d_LD[:] + found.b_dec_D
        torch.testing.assert_close(recon, want["recon"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("source", DIRECT)
def test_an_sae_fires_and_writes_as_in_its_own_library(source: Path) -> None:
    sae = SAE.load(source)
    assert (sae.layer, sae.d_sae) == (3, L)
    check(sae, source)
    check_written(source)


@pytest.mark.parametrize("source", [*CONVERTED, *DIRECT])
def test_a_converted_sae_fires_as_in_its_own_library(source: Path, tmp_path: Path) -> None:
    found = convert(str(source), tmp_path / "new" / "out")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]
    sae = SAE.load(tmp_path / "new" / "out")
    assert sae.layer == found.layer == (19 if "l19" in source.name else 3)
    check(sae, source)
    check_written(source)
    torch.testing.assert_close(sae.d_LD[:], found.d_LD[:])


@pytest.mark.parametrize("source", CONVERTED)
def test_a_pickle_is_opened_by_the_converter_alone(source: Path) -> None:
    for path in (source, source.parent):
        with pytest.raises(SAEError, match=r"a pickle, which is never read here; run `trimtab sae convert"):
            SAE.load(path)


def test_a_pickle_that_would_run_code_is_refused_by_the_converter_too(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "layer3.sae.pt").write_bytes(pickle.dumps({"W_enc": Evil()}, protocol=2))
    torch.save({"W_enc": Evil()}, tmp_path / "layer4.sae.pt")
    for name in ("layer3.sae.pt", "layer4.sae.pt"):
        with pytest.raises(SAEError, match="holds more than tensors"):
            convert(str(tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", [*DIRECT, *CONVERTED])
def test_rows_of_a_mapped_sae_are_those_in_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 5 latents, which divide nothing."""
    convert(str(source), tmp_path / "out")
    whole = SAE.load(tmp_path / "out")
    monkeypatch.setattr(sae_module, "MAX_NUMBERS", 0)
    mapped = SAE.load(tmp_path / "out")
    assert isinstance(mapped.d_LD, Stored)
    assert isinstance(whole.d_LD, torch.Tensor)
    torch.testing.assert_close(mapped.d_LD[[3, 1]], whole.d_LD[[3, 1]], rtol=0, atol=0)
    monkeypatch.setattr(matrix.blocks, "__defaults__", (5,))
    h = expected(source)["h"]
    torch.testing.assert_close(mapped.encode(h), whole.encode(h))


def test_a_topk_latent_cannot_be_read_alone_until_it_has_a_threshold() -> None:
    source = FORMATS / "saelens" / "topk_plain"
    sae, h = SAE.load(source), expected(source)["h"]
    one = torch.ones(1)
    assert "top 4" in (sae.unreadable or "")
    with pytest.raises(SAEError, match="only among a token's top 4; use --operation add or project"):
        sae.rows([3], 0 * one, -one)
    assert sae.rows([3], one, 0 * one).d_KD.shape == (1, 8)
    read_alone, agreement = sae.thresholded(h)
    assert read_alone.unreadable is None
    fires, top = read_alone.encode(h) > 0, sae.encode(h) > 0
    assert int(fires.sum()) == K * len(h)
    assert agreement == pytest.approx(float((fires & top).sum() / (fires | top).sum()))
    assert 0.5 < agreement < 1
    assert f"agrees to {agreement:.1%}" in read_alone.notes[-1]


def test_an_sae_that_normalises_each_token_has_no_rows() -> None:
    sae = SAE.load(FORMATS / "saelens" / "layer_norm")
    one = torch.ones(1)
    with pytest.raises(SAEError, match=r"normalises each token first \(layer_norm\)"):
        sae.rows([3], 0 * one, -one)
    with pytest.raises(SAEError, match="a threshold does not make"):
        sae.thresholded(torch.zeros(1, 8))


def test_a_compressed_archive_is_read_too(tmp_path: Path) -> None:
    source = next(FORMATS.glob("gemma_scope_1/**/params.npz"))
    folder = tmp_path / "layer_3"
    folder.mkdir()
    with np.load(source) as arrays:
        np.savez_compressed(folder / "params.npz", **dict(arrays))
    check(SAE.load(folder), source.parent)


def test_an_archive_of_objects_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "layer_3"
    folder.mkdir()
    for save in (np.savez, np.savez_compressed):
        save(folder / "params.npz", W_enc=np.array([{}], dtype=object))
        with pytest.raises(SAEError, match="not a whole archive of arrays"):
            SAE.load(folder)


def test_a_hub_id_is_the_folder_in_the_local_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--google--gemma-scope-2b-pt-res"
    folder = repository / "snapshots" / "abc" / "layer_3" / "width_16k" / "average_l0_71"
    shutil.copytree(next(FORMATS.glob("gemma_scope_1/**/average_l0_71")), folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    inside = "layer_3/width_16k/average_l0_71"
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download.__kwdefaults__",
        {**_defaults(), "cache_dir": str(tmp_path), "local_files_only": True},
    )
    sae = SAE.load(f"google/gemma-scope-2b-pt-res/{inside}")
    assert sae.id == f"google/gemma-scope-2b-pt-res/{inside}"
    check(sae, folder)
    with pytest.raises(SAEError, match="has no layer_4; look up the folder"):
        SAE.load("google/gemma-scope-2b-pt-res/layer_4")
    with pytest.raises(SAEError, match="neither a path nor"):
        SAE.load("google/nothing-of-the-kind/layer_4")


def _defaults() -> dict[str, Any]:
    from huggingface_hub import snapshot_download

    return dict(snapshot_download.__kwdefaults__ or {})


def edited(tmp_path: Path, case: str, file: str, **changes: Any) -> Path:
    """A case with its configuration changed."""
    source = next(FORMATS.glob(case))
    folder = tmp_path / "changed" / source.name
    shutil.copytree(source, folder)
    config = json.loads((folder / file).read_text())
    for key, value in changes.items():
        config.get("trainer", config)[key] = value
    (folder / file).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("case", "file", "changes", "says"),
    [
        ("sparsify/layers.3", "cfg.json", {"transcode": True}, "is a transcoder"),
        ("sparsify/layers.3", "cfg.json", {"activation": "groupmax"}, "chooses its latents by groupmax"),
        (
            "gemma_scope_2/**/layer_3*",
            "config.json",
            {"hf_hook_point_in": "model.layers.3.mlp"},
            "no SAE of the residual",
        ),
        ("gemma_scope_2/**/layer_3*", "config.json", {"architecture": "relu"}, "architecture 'relu'"),
        ("llama_scope/*", "hyperparams.json", {"use_glu_encoder": True}, "gated linear encoder"),
        ("llama_scope/*", "hyperparams.json", {"norm_activation": "batch-wise"}, "normalises its input batch-wise"),
        ("llama_scope/*", "hyperparams.json", {"hook_point_out": "blocks.4.hook_mlp_out"}, "is a transcoder"),
        ("dictionary_learning/BatchTopKSAE/*", "config.json", {"dict_class": "CrossCoder"}, "is a CrossCoder"),
        ("dictionary_learning/BatchTopKSAE/*", "config.json", {"submodule_name": "mlp_3"}, "reads 'mlp_3'"),
        ("saelens/gated", "cfg.json", {"normalize_activations": "covariance_whitening"}, "fold it into the weights"),
    ],
)
def test_what_the_formula_cannot_say_is_refused(
    tmp_path: Path, case: str, file: str, changes: dict[str, Any], says: str
) -> None:
    folder = edited(tmp_path, case, file, **changes)
    with pytest.raises(SAEError, match=says):
        read(folder, pickles=True)


def test_a_threshold_that_was_never_set_is_refused(tmp_path: Path) -> None:
    folder = edited(tmp_path, "dictionary_learning/BatchTopKSAE/*", "config.json")
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**state, "threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    with pytest.raises(SAEError, match="threshold was never set"):
        read(folder, pickles=True)


def test_a_block_that_is_not_named_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "somewhere"
    shutil.copytree(next(FORMATS.glob("gemma_scope_1/**/average_l0_71")), folder)
    with pytest.raises(SAEError, match=r"does not say which block it reads; say it: .* --layer N"):
        SAE.load(folder)
    assert read(folder, layer=5).layer == 5
    with pytest.raises(SAEError, match="reads the output of block 3, not of 5"):
        read(FORMATS / "saelens" / "gated", layer=5)


def test_the_input_of_the_first_block_is_no_block_s_output(tmp_path: Path) -> None:
    folder = edited(tmp_path, "saelens/gated", "cfg.json", metadata={"hook_name": "blocks.0.hook_resid_pre"})
    with pytest.raises(SAEError, match=r"hook point 'blocks\.0\.hook_resid_pre'"):
        SAE.load(folder)


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="is there already"):
        convert(str(FORMATS / "saelens" / "gated"), tmp_path)


def test_half_precision_stays_half_in_the_file(tmp_path: Path) -> None:
    folder = edited(tmp_path, "saelens/jumprelu", "cfg.json")
    file = folder / "sae_weights.safetensors"
    w = load_file(file)
    for dtype in (torch.float16, torch.bfloat16):
        halved = {name: t.to(dtype) if name.startswith("W") else t for name, t in w.items()}
        save_file(halved, file)
        out = tmp_path / str(dtype)
        convert(str(folder), out)
        written = load_file(out / "sae_weights.safetensors")
        assert written["W_dec"].dtype == written["W_enc"].dtype == dtype
        torch.testing.assert_close(written["W_enc"], halved["W_enc"], rtol=0, atol=0)
        torch.testing.assert_close(SAE.load(out).d_LD[:], halved["W_dec"].float(), rtol=0, atol=0)
