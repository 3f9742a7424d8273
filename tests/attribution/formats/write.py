"""Writes the small SAEs beside this file, each with its own library, and what that library's own code makes of one input.

    python -m venv .oracle && .oracle/bin/pip install sae-lens==6.54.12 natsort simple-parsing schedulefree
    .oracle/bin/pip install --no-deps eai-sparsify==1.3.3 dictionary-learning==0.1.0
    git clone https://github.com/openai/sparse_autoencoder
    git clone https://github.com/OpenMOSS/Language-Model-SAEs && git -C Language-Model-SAEs checkout 7bfb3f14a3
    .oracle/bin/python tests/attribution/formats/write.py sparse_autoencoder Language-Model-SAEs

The tests read what is checked in, so none of this need be installed for them. Formats that no library writes (Gemma Scope,
Goodfire, Qwen-Scope, DeepSeek-R1) are laid out by hand and read by SAELens' own loaders, with the hub's download replaced by the
local file.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
D, L, K, T = 8, 24, 4, 32
H = torch.randn(T, D, generator=torch.Generator().manual_seed(0)) * 2 + 0.5


def randomise(module: torch.nn.Module, seed: int = 1) -> None:
    """Every weight and bias from a normal distribution, decoders not of unit norm; thresholds above 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if "b" in name.split(".")[-1][:1] else 0.6))
            if "threshold" in name:
                p.abs_()


def expect(folder: Path, phi: torch.Tensor, recon: torch.Tensor | None, **extra: torch.Tensor) -> None:
    tensors = {"h": H, "phi": phi.detach().float(), **extra}
    if recon is not None:
        tensors["recon"] = recon.detach().float()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")
    assert 0 < (phi != 0).float().mean() < 0.9, folder


def saelens() -> None:
    from sae_lens import SAE
    from sae_lens.saes.gated_sae import GatedSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAEConfig

    plain = {"d_in": D, "d_sae": L, "device": "cpu", "dtype": "float32"}
    cases = {
        "standard": StandardSAEConfig(**plain),
        "jumprelu": JumpReLUSAEConfig(**plain, apply_b_dec_to_input=False),
        "gated": GatedSAEConfig(**plain),
        "topk": TopKSAEConfig(**plain, k=K, rescale_acts_by_decoder_norm=True),
        "topk_plain": TopKSAEConfig(**plain, k=K, rescale_acts_by_decoder_norm=False),
        "layer_norm": StandardSAEConfig(**plain, normalize_activations="layer_norm"),
        "constant_norm": JumpReLUSAEConfig(**plain, normalize_activations="constant_norm_rescale"),
        "centred": StandardSAEConfig(**plain),
    }
    for name, config in cases.items():
        kwargs = {"center_writing_weights": True} if name == "centred" else None
        hook = "blocks.4.hook_resid_pre" if name == "standard" else "blocks.3.hook_resid_post"
        config.metadata = SAEMetadata(model_name="tiny", hook_name=hook, model_from_pretrained_kwargs=kwargs)
        sae = SAE.get_sae_class_for_architecture(config.architecture())(config)
        randomise(sae)
        folder = HERE / "saelens" / name
        sae.save_model(folder)
        h = H - H.mean(1, keepdim=True) if name == "centred" else H
        phi = sae.encode(h)
        expect(folder, phi, None if name in ("layer_norm", "constant_norm") else sae.decode(phi))


def sparsify() -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(D, SparseCoderConfig(num_latents=L, k=K))
    randomise(coder)
    folder = HERE / "sparsify" / "layers.3"
    coder.save_to_disk(folder)
    top = coder.encode(H)
    phi = torch.zeros(T, L).scatter_(1, top.top_indices, top.top_acts)
    expect(folder, phi, phi @ coder.W_dec + coder.b_dec)


def dictionary_learning() -> None:
    # Its package imports a language model's tools on import; the classes of dictionaries need none of them.
    root = Path(str(distribution("dictionary-learning").locate_file("dictionary_learning")))
    for name, path in {"dictionary_learning": root, "dictionary_learning.trainers": root / "trainers"}.items():
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    from dictionary_learning import dictionary as kinds
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    cases: dict[str, Any] = {
        "AutoEncoder": kinds.AutoEncoder(D, L),
        "AutoEncoderNew": kinds.AutoEncoderNew(D, L),
        "GatedAutoEncoder": kinds.GatedAutoEncoder(D, L),
        "JumpReluAutoEncoder": kinds.JumpReluAutoEncoder(D, L),
        "AutoEncoderTopK": AutoEncoderTopK(D, L, K),
        "AutoEncoderTopK-threshold": AutoEncoderTopK(D, L, K),
        "BatchTopKSAE": BatchTopKSAE(D, L, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, L, K, [8, 16]),
    }
    for name, ae in cases.items():
        randomise(ae)
        if "threshold" in dict(ae.named_buffers()) and name != "AutoEncoderTopK":
            ae.threshold.fill_(0.7)
        folder = HERE / "dictionary_learning" / name / "trainer_0"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(ae.state_dict(), folder / "ae.pt")
        kind = name.split("-")[0]
        trainer = {"dict_class": kind, "activation_dim": D, "dict_size": L, "k": K, "layer": 3}
        config = {
            "trainer": {**trainer, "lm_name": "tiny", "submodule_name": "resid_post_layer_3"},
            "buffer": {"ctx_len": 128},
        }
        (folder / "config.json").write_text(json.dumps(config))
        if name == "AutoEncoder":  # As it is when its library loads it.
            ae = kinds.AutoEncoder.from_pretrained(folder / "ae.pt")
        phi = ae.encode(H, use_threshold=True) if name.endswith("-threshold") else ae.encode(H)
        expect(folder, phi, ae.decode(phi))


def openai(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("openai_model", repository / "sparse_autoencoder" / "model.py")
    module: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    for name, activation in {"relu": torch.nn.ReLU(), "topk": module.TopK(K)}.items():
        ae = module.Autoencoder(L, D, activation=activation, normalize=name == "topk")
        randomise(ae)
        folder = HERE / "openai" / name / "resid_post_mlp_v5_32k" / "autoencoders"
        folder.mkdir(parents=True, exist_ok=True)
        # Newer torch also lists what the activation's own state_dict says; the published files do not hold it.
        torch.save({k: v for k, v in ae.state_dict().items() if not k.startswith("activation.")}, folder / "3.pt")
        again = module.Autoencoder.from_state_dict(torch.load(folder / "3.pt"))
        phi, info = again.encode(H)
        expect(folder, phi, None if name == "topk" else again.decode(phi, info))


def llama_scope(repository: Path) -> None:
    """By the code that made them: lm_saes at the end of 2024, of which only the SAE's own module is imported."""
    config = {
        "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post",
        "d_model": D,
        "d_sae": L,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 9.0, "out": 9.0},
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.7,
        "top_k": K,
    }
    source = (repository / "src" / "lm_saes" / "sae.py").read_text().splitlines()

    def method(name: str) -> Any:
        """One method of its SparseAutoEncoder, as a function."""
        start = max(i for i, line in enumerate(source) if line.startswith(f"    def {name}("))
        end = next(i for i in range(start + 1, len(source)) if source[i].startswith(("    def ", "    @")))
        scope: dict[str, Any] = {"torch": torch, "math": __import__("math")}
        body = "\n".join(line[4:] for line in source[start:end])
        exec("from __future__ import annotations\n" + body, scope)
        return scope[name]

    generator = torch.Generator().manual_seed(2)
    shapes = {"encoder.weight": (L, D), "encoder.bias": (L,), "decoder.weight": (D, L), "decoder.bias": (D,)}
    weights = {name: torch.randn(shape, generator=generator) * 0.6 for name, shape in shapes.items()}
    folder = HERE / "llama_scope" / "Llama3_1-8B-Base-L3R-8x"
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "hyperparams.json").write_text(json.dumps(config))
    save_file(weights, folder / "checkpoints" / "final.safetensors")
    me = types.SimpleNamespace(cfg=types.SimpleNamespace(**config, dtype=torch.float32, device="cpu"))
    w = method("standardize_parameters_of_dataset_activation_scaling")(me, {k: v.clone() for k, v in weights.items()})
    w = method("transform_to_unit_decoder_norm")(me, w)
    me.activation_function = method("activation_function_factory")(me, me.cfg)
    me.compute_norm_factor = lambda x, hook_point: method("compute_norm_factor")(me, x, hook_point)
    me.encoder = lambda x: x @ w["encoder.weight"].T + w["encoder.bias"]
    me.hook_hidden_pre = me.hook_feature_acts = lambda x: x
    phi = method("encode")(me, H)
    expect(folder, phi, phi @ w["decoder.weight"].T + w["decoder.bias"])


def by_saelens_loaders() -> None:
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.saes.sae import SAEMetadata  # noqa: F401

    generator = torch.Generator().manual_seed(3)
    W_enc, W_dec = torch.randn(D, L, generator=generator) * 0.6, torch.randn(L, D, generator=generator) * 0.6
    b_enc, b_dec = torch.randn(L, generator=generator) * 0.3, torch.randn(D, generator=generator) * 0.3
    threshold = torch.rand(L, generator=generator)
    linear = {
        "encoder{}.weight": W_enc.T,
        "decoder{}.weight": W_dec.T,
        "encoder{}.bias": b_enc,
        "decoder{}.bias": b_dec,
    }

    def run(loader: Any, repo: str, folder: str, file: Path, **overrides: Any) -> None:
        loaders.hf_hub_download = lambda repo_id=None, filename=None, **_: str(
            file if str(filename).endswith(file.name) else file.with_name("config.json")
        )
        loaders.get_safetensors_tensor_shapes = lambda *_: {"w_enc": [D, L], "w_dec": [L, D]}
        config, state, _ = loader(repo, folder, "cpu", False, {"d_in": D, "d_sae": L, "dtype": "float32", **overrides})
        config = loaders.handle_config_defaulting(config)
        cls = SAE.get_sae_config_class_for_architecture(config["architecture"])
        sae = SAE.get_sae_class_for_architecture(config["architecture"])(cls.from_dict(config))
        sae.load_state_dict({k: v.float() for k, v in state.items()})
        phi = sae.encode(H)
        expect(file.parent, phi, sae.decode(phi))

    one = HERE / "gemma_scope_1" / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_71"
    one.mkdir(parents=True, exist_ok=True)
    arrays = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
    np.savez(one / "params.npz", **{k: v.numpy() for k, v in arrays.items()})
    where = "layer_3/width_16k/average_l0_71"
    run(loaders.gemma_2_sae_huggingface_loader, "google/gemma-scope-2b-pt-res", where, one / "params.npz")

    two = HERE / "gemma_scope_2" / "resid_post" / "layer_3_width_16k_l0_small"
    two.mkdir(parents=True, exist_ok=True)
    (two / "config.json").write_text(
        json.dumps(
            {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.3.output"}
        )
    )
    save_file({k.lower(): v for k, v in arrays.items()}, two / "params.safetensors")
    where = "resid_post/layer_3_width_16k_l0_small"
    run(loaders.gemma_3_sae_huggingface_loader, "google/gemma-scope-2-1b-pt", where, two / "params.safetensors")

    goodfire = HERE / "goodfire" / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    goodfire.parent.mkdir(exist_ok=True)
    torch.save({k.format("_linear"): v for k, v in linear.items()}, goodfire)
    run(loaders.get_goodfire_huggingface_loader, "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", goodfire.name, goodfire)

    deepseek = HERE / "deepseek_r1" / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    deepseek.parent.mkdir(exist_ok=True)
    torch.save({k.format(""): v for k, v in linear.items()}, deepseek)
    run(loaders.deepseek_r1_sae_huggingface_loader, "qresearch/x", deepseek.name, deepseek)

    qwen = HERE / "qwen_scope" / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}" / "layer3.sae.pt"
    qwen.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"W_enc": W_enc.T.contiguous(), "W_dec": W_dec.T.contiguous(), "b_enc": b_enc, "b_dec": b_dec}, qwen)
    run(loaders.qwen_scope_sae_huggingface_loader, f"Qwen/{qwen.parent.name}", qwen.name, qwen)


if __name__ == "__main__":
    subprocess.run(["git", "-C", sys.argv[2], "rev-parse", "HEAD"], check=True)
    saelens()
    by_saelens_loaders()
    sparsify()
    openai(Path(sys.argv[1]))
    llama_scope(Path(sys.argv[2]))
    dictionary_learning()
