"""SAELens folders written by hand: what is folded in, and what is refused. `test_sae_formats` reads what libraries wrote."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trimtab.attribution.bundle import ModelIdentity
from trimtab.attribution.errors import SAEError
from trimtab.attribution.sae import SAE

D, L = 4, 6
MODEL = ModelIdentity(
    id="tiny", architecture="Tiny", d_model=D, n_layers=20, fingerprint="sha256:tiny", tokenizer="sha256:words"
)


def folder(path: Path, *, drop: str | None = None, **config: Any) -> Path:
    path = path / "blocks.14.hook_resid_post"
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(D, L, generator=generator),
        "W_dec": torch.randn(L, D, generator=generator),
        "b_enc": torch.randn(L, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
        "threshold": torch.rand(L, generator=generator),
    }
    if drop is not None:
        del tensors[drop]
    save_file(tensors, path / "sae_weights.safetensors")
    document = {
        "architecture": "jumprelu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.14.hook_resid_post"},
    }
    (path / "cfg.json").write_text(json.dumps({**document, **config}))
    return path


@pytest.mark.parametrize("applies", [True, False, None])
def test_b_dec_is_folded_into_the_bias(tmp_path: Path, applies: bool | None) -> None:
    """None is how SAELens wrote it before version 6: absent, and done."""
    path = folder(tmp_path, apply_b_dec_to_input=applies)
    if applies is None:
        config = json.loads((path / "cfg.json").read_text())
        del config["apply_b_dec_to_input"]
        (path / "cfg.json").write_text(json.dumps(config))
    sae = SAE.load(path)
    from safetensors.torch import load_file

    w = load_file(path / "sae_weights.safetensors")
    h = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    x = (h - w["b_dec"] if applies in (True, None) else h) @ w["W_enc"] + w["b_enc"]
    torch.testing.assert_close(sae.encode(h), x * (x > w["threshold"]))
    torch.testing.assert_close(sae.encode(h, torch.tensor([4, 2])), sae.encode(h)[:, [4, 2]])


def test_a_standard_sae_is_a_jumprelu_of_threshold_0(tmp_path: Path) -> None:
    sae = SAE.load(folder(tmp_path, drop="threshold", architecture="standard"))
    assert sae.theta_L.tolist() == [0.0] * L
    assert (sae.layer, sae.d_sae, sae.stats) == (14, L, None)


@pytest.mark.parametrize(
    ("drop", "config", "says"),
    [
        ("threshold", {"architecture": "topk"}, "does not say its k"),
        ("threshold", {}, "jumprelu SAE without a `threshold`"),
        ("W_enc", {}, "has no tensor 'W_enc'"),
        (None, {"architecture": "gated"}, "has no tensor 'b_mag'"),
        (None, {"architecture": "temporal"}, "has architecture 'temporal'"),
        (None, {"normalize_activations": "expected_average_only_in"}, "fold it into the weights"),
        (None, {"metadata": {"hook_name": "blocks.3.hook_mlp_out"}}, "hook point 'blocks.3.hook_mlp_out'"),
        (None, {"metadata": {}}, "hook point ''"),
        (None, {"reshape_activations": "hook_z"}, "reshapes its input"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(
    tmp_path: Path, drop: str | None, config: dict[str, Any], says: str
) -> None:
    with pytest.raises(SAEError, match=says.replace("(", r"\(")):
        SAE.load(folder(tmp_path, drop=drop, **config))


def test_a_model_of_another_width_is_refused_with_both_widths(tmp_path: Path) -> None:
    sae = SAE.load(folder(tmp_path))
    sae.check_model(MODEL)
    with pytest.raises(SAEError, match="has d_in 4 but tiny has d_model 576"):
        sae.check_model(MODEL.model_copy(update={"d_model": 576}))
    with pytest.raises(SAEError, match=r"reads block 14 but tiny has blocks 0\.\.11"):
        sae.check_model(MODEL.model_copy(update={"n_layers": 12}))


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "sae_weights.safetensors").rename(path / "sae_weights.pt")
    with pytest.raises(SAEError, match="a pickle, which is never read"):
        SAE.load(path)
    (path / "sae_weights.safetensors").write_bytes(pickle.dumps({"W_enc": 1}))
    with pytest.raises(SAEError, match="not a whole safetensors file"):
        SAE.load(path)


def test_damage_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path)
    weights = path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(SAEError, match="not a whole safetensors file"):
        SAE.load(path)
    (path / "cfg.json").write_text("{")
    with pytest.raises(SAEError, match="is not JSON"):
        SAE.load(path)
    with pytest.raises(SAEError, match="give a SAELens folder"):
        SAE.load(tmp_path / "nowhere")


def test_stats_of_another_sae_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path)
    per_latent = {name: torch.ones(L + 1) for name in ("density_text", "density_chat", "max_activation")}
    stats = {"mean_activation_vector": torch.zeros(D), "median_norm": torch.ones(1), **per_latent}
    save_file(stats, path / "stats.safetensors")
    with pytest.raises(SAEError, match="another shape"):
        SAE.load(path)


def test_an_encoder_of_another_width_than_its_decoder_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(path / "sae_weights.safetensors")
    save_file({**tensors, "b_enc": torch.zeros(L + 1)}, path / "sae_weights.safetensors")
    with pytest.raises(SAEError, match=r"b_enc is \[7\] but W_dec asks for \[6\]"):
        SAE.load(path)
