"""The SAE in the package is what its card says: its format, and what it does on the real model, measured here."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trimtab.attribution.embedded import EMBEDDED_MODEL, model_path
from trimtab.attribution.training.cache import SINK_RATIO, LowerModel
from trimtab.attribution.training.corpus import Document
from trimtab.attribution.training.jumprelu import JumpReLU
from trimtab.attribution.training.plan import HOOK_NAME, LAYER, shipped_folder

D_MODEL, N_LATENTS = 576, 8192

# Written for this test, so nobody trained on it.
TEXTS = (
    """The ferry left the harbour an hour late because the captain had been waiting for two crates of lemons. Nobody on
deck complained; the evening was warm, and the lights of the town looked better from the water than they ever did from the
street. A boy fed the gulls with the crust of his sandwich until his father told him to stop.""",
    """Soil that is dug too often loses its structure: the pores between the grains collapse, rain runs off instead of
sinking in, and the worms that would repair the damage move elsewhere. Many gardeners now leave the ground alone and
spread compost on the surface in autumn, which is less work and gives much the same harvest.""",
)
CHATS = (
    (
        "How can I keep basil alive in my kitchen?",
        """Basil needs plenty of light and water. Put the pot near a sunny window, water it when the top of the soil
feels dry, and pick the leaves from the top so that it grows bushy.""",
    ),
    (
        "Write two sentences about a fox in the snow.",
        """The fox stepped carefully over the frozen field, leaving a thin line of prints behind it. When it heard the
owl call from the barn, it stopped and lifted its head.""",
    ),
    (
        "My neighbour plays the drums at night and I am so angry!",
        """I'm sorry to hear that, it must be frustrating. Try talking to your neighbour calmly first, and explain when
you need quiet. If that does not help, contact your landlord.""",
    ),
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return shipped_folder()


@pytest.fixture(scope="module")
def sae(folder: Path) -> JumpReLU:
    return JumpReLU.load(folder)


@pytest.fixture(scope="module")
def streams() -> dict[str, torch.Tensor]:
    """Residual stream of text and of chat, [tokens, d_model]: all tokens, position 0 first."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path())
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": said}], tokenize=False
        )
        for asked, said in CHATS
    ]
    model = LowerModel(str(model_path()), LAYER)
    found = {}
    for name, texts in (("text", TEXTS), ("chat", chats)):
        documents = [Document(name, True, tuple(tokenizer(text).input_ids), 1) for text in texts]
        found[name] = torch.cat(model(documents))
    return found


def _usual(h_TD: torch.Tensor) -> torch.Tensor:
    norm_T = h_TD.norm(dim=1)
    return h_TD[norm_T <= SINK_RATIO * norm_T.median()]


def test_the_folder_is_complete_and_small(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "cfg.json", "metrics.json", "sae_weights.safetensors", "stats.safetensors", "top_contexts.jsonl.gz",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20_000_000


def test_the_configuration_is_sae_lens_jumprelu(folder: Path) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"]) == ("jumprelu", D_MODEL, N_LATENTS)
    assert config["apply_b_dec_to_input"] is False
    assert config["normalize_activations"] == "none"
    assert config["metadata"]["hook_name"] == HOOK_NAME == folder.name
    assert config["metadata"]["model_name"] == EMBEDDED_MODEL == folder.parent.name


def test_the_weights_have_sae_lens_shapes_and_unit_decoder_rows(sae: JumpReLU) -> None:
    assert {name: tuple(value.shape) for name, value in vars(sae).items()} == {
        "W_enc": (D_MODEL, N_LATENTS),
        "W_dec": (N_LATENTS, D_MODEL),
        "b_enc": (N_LATENTS,),
        "b_dec": (D_MODEL,),
        "threshold": (N_LATENTS,),
    }
    assert all(bool(value.isfinite().all()) for value in vars(sae).values())
    assert bool((sae.threshold > 0).all())
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_LATENTS), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("kind", "bound"), [("text", 0.22), ("chat", 0.22)])
def test_it_reconstructs_unseen_tokens(
    sae: JumpReLU, streams: dict[str, torch.Tensor], kind: str, bound: float
) -> None:
    h_TD = _usual(streams[kind])
    a_TL = sae.encode(h_TD)
    fvu = (sae.decode(a_TL) - h_TD).square().sum() / (h_TD - h_TD.mean(0)).square().sum()
    assert float(fvu) < bound
    assert 20 < float((a_TL > 0).sum(1).float().mean()) < 80


def test_position_0_is_a_sink_and_in_no_statistic(folder: Path, streams: dict[str, torch.Tensor]) -> None:
    stats = load_file(folder / "stats.safetensors")
    median = float(stats["median_norm"])
    assert float(streams["text"][0].norm()) > 50 * median
    assert float(stats["mean_activation_vector"].norm()) < median
    assert 100 < median < 250
    for name in ("density_text", "density_chat", "max_activation", "mean_activation"):
        assert stats[name].shape == (N_LATENTS,)
        assert bool((stats[name] >= 0).all())


def test_every_latent_that_fires_has_contexts(folder: Path) -> None:
    stats = load_file(folder / "stats.safetensors")
    lines = gzip.decompress((folder / "top_contexts.jsonl.gz").read_bytes()).decode().splitlines()
    contexts = {entry["latent"]: entry["top"] for entry in map(json.loads, lines)}
    assert set(contexts) == set((stats["max_activation"] > 0).nonzero().squeeze(1).tolist())
    for latent, top in contexts.items():
        strengths = [activation for activation, *_ in top]
        assert strengths == sorted(strengths, reverse=True)
        assert abs(strengths[0] - float(stats["max_activation"][latent])) < 0.06


def test_the_card_states_what_metrics_json_holds(folder: Path) -> None:
    from trimtab.attribution.training.card import card

    assert (folder / "README.md").read_text() == card(json.loads((folder / "metrics.json").read_text()))
