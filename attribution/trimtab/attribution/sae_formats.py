"""SAEs as other libraries save them, each said in the terms of one formula.

    φ_i(h) = x if x > θ_i else 0,  x = e_i · n(h) + b_i        Δh = φ_i d_i

| format | files | folded into e, b, θ, d |
|---|---|---|
| SAELens | cfg.json, sae_weights.safetensors | b_dec, gates, decoder norms, a centred stream |
| Gemma Scope 1 | params.npz | – |
| Gemma Scope 2 | config.json, params.safetensors | – |
| sparsify | cfg.json, sae.safetensors | b_dec |
| Llama Scope | hyperparams.json, checkpoints/final.safetensors | the data set's norm, b_dec, decoder norms |
| dictionary_learning | config.json, ae.pt | b_dec, gates, decoder norms |
| OpenAI, Qwen-Scope, Goodfire, DeepSeek-R1 | one .pt | pre_bias |

Gates fold because both paths share their rows: with s = exp(r), φ = s x + b_mag where x > −b_gate, that is where φ exceeds
b_mag − s b_gate. n is the identity, or a normalisation per token that no row can hold; top-k has no threshold. Both are kept as
they are (`SAE` says what follows), and whatever else is not exactly this formula is refused. The definitions are those of the
libraries' own code.

Axes: D d_model, L latents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from trimtab.attribution.errors import SAEError
from trimtab.attribution.matrix import Stored, blocks, norms
from trimtab.attribution.sae_files import PICKLES, document, npz, pickled, safetensors

__all__ = ["Normalisation", "Read", "read"]

Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]
"""What is done to each token before the encoder; SAELens' names."""


@dataclass(frozen=True)
class Read:
    """One SAE in the formula's terms."""

    files: tuple[Path, ...]
    """What it was read from; its identity is their digest."""
    layer: int
    """0-based; resid_post of this block."""
    e_LD: Stored
    b_L: Tensor
    theta_L: Tensor
    d_LD: Stored
    b_dec_D: Tensor
    k: int | None
    """Only the k largest activations of a token count; None where θ says which."""
    normalisation: Normalisation
    notes: tuple[str, ...]
    """What was done to read it, for people."""


def read(path: Path, *, layer: int | None = None, pickles: bool = False) -> Read:
    """The SAE in a folder or file, of whichever format; `layer` where the format does not name its block.

    Raises:
        SAEError: no known format, a pickle where `pickles` is false, damage, or something that the formula cannot say exactly.
    """
    has = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if "sae_weights.safetensors" in has:
        return _saelens(path, layer)
    if {"cfg.json", "sae.safetensors"} <= has:
        return _sparsify(path, layer)
    if {"config.json", "params.safetensors"} <= has:
        return _gemma_scope_2(path, layer)
    if "params.npz" in has:
        return _gemma_scope_1(path, layer)
    if "hyperparams.json" in has:
        return _llama_scope(path, layer)
    files = sorted(path / name for name in has if name.endswith(PICKLES))
    file = path if path.is_file() else files[0] if len(files) == 1 else None
    if file is not None and file.suffix in PICKLES:
        if not pickles:
            _refuse(f"{file} is a pickle, which is never read here; run `trimtab sae convert {file} FOLDER` once")
        return _pickled(file, layer)
    if file is None and files:
        _refuse(f"{path} holds {len(files)} pickles; name one of them: `trimtab sae convert {files[0]} FOLDER`")
    if not path.exists() or (path.is_dir() and has.isdisjoint({"cfg.json", "config.json"})):
        _refuse(f"{path} holds no SAE of a known format; give a SAELens folder, or one of the formats in the README")
    raise SAEError(f"{path} holds no weights beside its configuration; give the whole folder")


def _saelens(folder: Path, layer: int | None) -> Read:
    config, w = document(folder / "cfg.json"), safetensors(folder / "sae_weights.safetensors")
    metadata = config.get("metadata") or {}
    architecture = config.get("architecture", "standard")
    kwargs = config.get("activation_fn_kwargs") or {}
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    if architecture == "standard" and activation != "relu":
        architecture = activation  # SAELens before version 6.
    if architecture not in ("standard", "jumprelu", "gated", "topk", "batchtopk"):
        _refuse(f"{folder} has architecture {architecture!r}; standard, gated, jumprelu and topk can be read")
    normalisation: Any = config.get("normalize_activations") or "none"
    if normalisation not in ("none", "layer_norm", "constant_norm_rescale"):
        _refuse(
            f"{folder} was trained with normalize_activations {normalisation!r} and does not hold its statistics; "
            "fold it into the weights with SAELens and save with 'none'"
        )
    if config.get("reshape_activations") not in (None, "none"):
        _refuse(f"{folder} reshapes its input ({config['reshape_activations']}); only the residual stream can be read")
    if config.get("finetuning_scaling_factor"):
        _refuse(f"{folder} has a fine-tuned scaling factor; fold it into W_dec and save without")
    k = config.get("k", kwargs.get("k")) if architecture == "topk" else None
    theta = w.get("threshold", w.get("topk_threshold"))
    if architecture in ("jumprelu", "batchtopk") and theta is None:
        _refuse(f"{folder} is a {architecture} SAE without a `threshold` tensor; fetch it again")
    if architecture == "topk" and theta is None and not isinstance(k, int):
        _refuse(f"{folder} is a topk SAE that does not say its k; fetch it again")
    hook = metadata.get("hook_name") or config.get("hook_name") or config.get("hook_point") or ""
    kwargs = metadata.get("model_from_pretrained_kwargs") or config.get("model_from_pretrained_kwargs") or {}
    gate = architecture == "gated"
    with _tensors(folder):
        return _assemble(
            folder,
            (folder / "cfg.json", folder / "sae_weights.safetensors"),
            _resid(hook, layer, folder),
            W_enc_LD=w["W_enc"].T,
            W_dec_LD=w["W_dec"],
            b_enc_L=w["b_mag"] if gate else w["b_enc"],
            b_dec_D=w["b_dec"],
            theta=None if architecture == "standard" else theta,
            k=k,
            subtracts_b_dec=config.get("apply_b_dec_to_input", True),  # Older SAELens did not write it, and did it.
            gate=(w["r_mag"], w["b_gate"]) if gate else None,
            by_decoder_norm=bool(config.get("rescale_acts_by_decoder_norm")),
            centred=bool(kwargs.get("center_writing_weights")),
            normalisation=normalisation,
        )


def _sparsify(folder: Path, layer: int | None) -> Read:
    config, w = document(folder / "cfg.json"), safetensors(folder / "sae.safetensors")
    if config.get("transcode") or config.get("skip_connection") or "W_skip" in w:
        _refuse(f"{folder} is a transcoder, which reconstructs another place than it reads; give an SAE")
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        what = "signed top-k" if config.get("signed") else config["activation"]
        _refuse(f"{folder} chooses its latents by {what}, which one threshold cannot say; give a top-k SAE")
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h)[._](\d+)", folder.name)
    with _tensors(folder):
        return _assemble(
            folder,
            (folder / "cfg.json", folder / "sae.safetensors"),
            _block(None if match is None else int(match[1]), layer, folder),
            W_enc_LD=w["encoder.weight"],
            W_dec_LD=w["W_dec"],
            b_enc_L=w["encoder.bias"],
            b_dec_D=w["b_dec"],
            k=int(config["k"]),
            subtracts_b_dec=True,
        )


def _gemma_scope_1(folder: Path, layer: int | None) -> Read:
    w = {("W_" + name[2:] if name.startswith("w_") else name): t for name, t in npz(folder / "params.npz").items()}
    where = str(folder)
    for word in ("-mlp", "-att", "transcoder", "embedding"):
        if word in where:
            _refuse(f"{folder} does not read the residual stream after a block ({word.strip('-')}); give one of -res")
    if "scaling_factor" in w and not torch.allclose(w["scaling_factor"], torch.ones_like(w["scaling_factor"])):
        _refuse(f"{folder} has a scaling_factor per latent, which Gemma Scope does not explain; give another SAE")
    match = re.search(r"layer_(\d+)", where)
    with _tensors(folder):
        return _assemble(
            folder,
            (folder / "params.npz",),
            _block(None if match is None else int(match[1]), layer, folder),
            W_enc_LD=w["W_enc"].T,
            W_dec_LD=w["W_dec"],
            b_enc_L=w["b_enc"],
            b_dec_D=w["b_dec"],
            theta=w["threshold"],
            subtracts_b_dec=False,
        )


def _gemma_scope_2(folder: Path, layer: int | None) -> Read:
    config, w = document(folder / "config.json"), safetensors(folder / "params.safetensors")
    if config.get("architecture") != "jump_relu":
        _refuse(f"{folder} has architecture {config.get('architecture')!r}; Gemma Scope 2 SAEs are 'jump_relu'")
    hook = str(config.get("hf_hook_point_in", ""))
    match = re.search(r"layers\.(\d+)\.output$", hook)
    if "affine_skip_connection" in w or "hf_hook_point_out" in config or (hook and match is None):
        _refuse(f"{folder} reads {hook!r} and is no SAE of the residual stream after a block; give one of resid_post")
    with _tensors(folder):
        return _assemble(
            folder,
            (folder / "config.json", folder / "params.safetensors"),
            _block(None if match is None else int(match[1]), layer, folder),
            W_enc_LD=w["w_enc"].T,
            W_dec_LD=w["w_dec"],
            b_enc_L=w["b_enc"],
            b_dec_D=w["b_dec"],
            theta=w["threshold"],
            subtracts_b_dec=False,
        )


def _llama_scope(folder: Path, layer: int | None) -> Read:
    config, file = document(folder / "hyperparams.json"), folder / "checkpoints" / "final.safetensors"
    w = safetensors(file)
    if config.get("use_glu_encoder"):
        _refuse(f"{folder} has a gated linear encoder, which no row can say; give another SAE")
    hook = str(config.get("hook_point_in", ""))
    if config.get("hook_point_out", hook) != hook:
        _refuse(f"{folder} is a transcoder, which reconstructs another place than it reads; give an SAE")
    norm = config.get("norm_activation", "dataset-wise")
    if norm not in ("dataset-wise", "token-wise", "inference", "none", None):
        _refuse(f"{folder} normalises its input {norm}, which no row can say; give another SAE")
    theta = float(config.get("jump_relu_threshold") or 0.0)
    act_fn = str(config.get("act_fn", "jumprelu")).lower()
    with _tensors(folder):
        d_model = w["decoder.weight"].shape[0]
        by_hook = config.get("dataset_average_activation_norm") or {}
        scaled = norm == "dataset-wise"
        scale_in, scale_out = (math.sqrt(d_model) / by_hook[io] if scaled else 1.0 for io in ("in", "out"))
        # As its library folds them: x is read as it is, activations come out in units of the unscaled stream.
        return _assemble(
            folder,
            (folder / "hyperparams.json", file),
            _resid(hook, layer, folder),
            W_enc_LD=w["encoder.weight"],
            W_dec_LD=w["decoder.weight"].T,
            b_enc_L=w["encoder.bias"].float() / scale_in,
            b_dec_D=w["decoder.bias"].float() / scale_out if "decoder.bias" in w else torch.zeros(d_model),
            theta=torch.tensor(theta) if theta > 0 else None,
            k=int(config["top_k"]) if act_fn == "topk" else None,
            subtracts_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder")),
            decoder_scale=scale_in / scale_out,
            by_decoder_norm=bool(config["sparsity_include_decoder_norm"]),
            normalisation="constant_norm_rescale" if norm == "token-wise" else "none",
        )


def _pickled(file: Path, layer: int | None) -> Read:
    """The formats that come as a state dict in a pickle, told apart by their keys."""
    w = pickled(file)
    if (file.parent / "config.json").is_file() and "trainer" in (config := document(file.parent / "config.json")):
        return _dictionary_learning(file, config["trainer"], w, layer)
    if "latent_bias" in w:
        return _openai(file, w, layer)
    if {"W_enc", "W_dec"} <= set(w):
        return _qwen_scope(file, w, layer)
    infix = "_linear" if "encoder_linear.weight" in w else ""  # Goodfire; without it qresearch's for DeepSeek-R1.
    match = re.search(r"l(\d+)\.\w+$", file.name)
    with _tensors(file):
        return _assemble(
            file,
            (file,),
            _block(None if match is None else int(match[1]), layer, file),
            W_enc_LD=w[f"encoder{infix}.weight"],
            W_dec_LD=w[f"decoder{infix}.weight"].T,
            b_enc_L=w[f"encoder{infix}.bias"],
            b_dec_D=w[f"decoder{infix}.bias"],
            subtracts_b_dec=False,
        )


def _dictionary_learning(file: Path, trainer: dict[str, Any], w: dict[str, Any], layer: int | None) -> Read:
    kind, place = trainer.get("dict_class"), str(trainer.get("submodule_name") or "resid_post")
    known = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
    if kind not in (*known, "JumpReluAutoEncoder", "GatedAutoEncoder"):
        _refuse(f"{file} is a {kind}; of dictionary_learning {', '.join(known)}, JumpReLU and gated ones can be read")
    if "resid" not in place:
        _refuse(f"{file} reads {place!r}; only SAEs of the residual stream after a block can be edited")
    theta = w.get("threshold")
    if theta is not None and theta.ndim == 0 and float(theta) < 0:
        if kind != "AutoEncoderTopK":
            _refuse(f"{file} is a {kind} whose threshold was never set; train it past its threshold_start_step")
        theta = None
    with _tensors(file):
        linear = "encoder.weight" in w
        return _assemble(
            file,
            (file.parent / "config.json", file),
            _block(trainer.get("layer"), layer, file),
            W_enc_LD=w["encoder.weight"] if linear else w["W_enc"].T,
            W_dec_LD=w["decoder.weight"].T if linear else w["W_dec"],
            b_enc_L=w["mag_bias"] if kind == "GatedAutoEncoder" else w["encoder.bias" if linear else "b_enc"],
            b_dec_D=next(w[name] for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in w),
            theta=theta,
            k=int(w["k"]) if kind == "AutoEncoderTopK" else None,
            subtracts_b_dec=kind not in ("JumpReluAutoEncoder", "AutoEncoderNew"),
            gate=(w["r_mag"], w["gate_bias"]) if kind == "GatedAutoEncoder" else None,
            by_decoder_norm=kind == "AutoEncoder",  # As its library does when it loads one.
        )


def _openai(file: Path, w: dict[str, Any], layer: int | None) -> Read:
    activation, state = w.get("activation", "ReLU"), w.get("activation_state_dict") or {}
    if activation not in ("ReLU", "TopK") or state.get("postact_fn", "ReLU") != "ReLU":
        _refuse(f"{file} has the activation {activation} {state}; ReLU and TopK can be read")
    if re.search(r"resid_delta|resid_post_attn|mlp_post_act", str(file)):
        _refuse(f"{file} does not read the residual stream after a block; give one of resid_post_mlp")
    match = re.fullmatch(r"(\d+)\.pt", file.name) if "resid_post_mlp" in str(file) else None
    with _tensors(file):
        return _assemble(
            file,
            (file,),
            _block(None if match is None else int(match[1]), layer, file),
            W_enc_LD=w["encoder.weight"],
            W_dec_LD=w["decoder.weight"].T if "decoder.weight" in w else w["encoder.weight"],
            b_enc_L=w["latent_bias"],
            b_dec_D=w["pre_bias"],
            k=int(state["k"]) if activation == "TopK" else None,
            subtracts_b_dec=True,
            normalisation="layer_norm" if activation == "TopK" else "none",
        )


def _qwen_scope(file: Path, w: dict[str, Any], layer: int | None) -> Read:
    at, top = re.fullmatch(r"layer(\d+)\.sae\.pt", file.name), re.search(r"-L0_(\d+)", str(file))
    if top is None:
        _refuse(f"{file} does not say its k; keep the repository's name, which ends in -L0_K, in the path")
    with _tensors(file):
        return _assemble(
            file,
            (file,),
            _block(None if at is None else int(at[1]), layer, file),
            W_enc_LD=w["W_enc"],
            W_dec_LD=w["W_dec"].T,
            b_enc_L=w["b_enc"],
            b_dec_D=w["b_dec"],
            k=int(top[1]),
            subtracts_b_dec=False,
        )


def _assemble(
    path: Path,
    files: tuple[Path, ...],
    layer: int,
    *,
    W_enc_LD: Tensor,
    W_dec_LD: Tensor,
    b_enc_L: Tensor,
    b_dec_D: Tensor,
    subtracts_b_dec: bool,
    theta: Tensor | None = None,
    k: int | None = None,
    gate: tuple[Tensor, Tensor] | None = None,
    by_decoder_norm: bool = False,
    decoder_scale: float = 1.0,
    centred: bool = False,
    normalisation: Normalisation = "none",
) -> Read:
    """Fold what folds exactly; the words of the notes are what was folded."""
    n_latents, d_model = W_dec_LD.shape
    wanted = {"W_enc": (n_latents, d_model), "b_enc": (n_latents,), "b_dec": (d_model,)}
    for name, tensor in (("W_enc", W_enc_LD), ("b_enc", b_enc_L), ("b_dec", b_dec_D)):
        if tuple(tensor.shape) != wanted[name]:
            _refuse(f"{path}: {name} is {list(tensor.shape)} but W_dec asks for {list(wanted[name])}; fetch it again")
    notes: list[str] = []
    b_L, b_dec_D = b_enc_L.float(), b_dec_D.float()
    e_scale_L: Tensor | None = None
    d_scale_L = None if decoder_scale == 1.0 else torch.full((n_latents,), decoder_scale)
    if gate is not None:
        r_L, b_gate_L = gate[0].float(), gate[1].float()
        e_scale_L, theta = r_L.exp(), b_L - r_L.exp() * b_gate_L
        notes.append("the gate is folded into scale and threshold")
    if by_decoder_norm:
        norm_L = norms(Stored(W_dec_LD, d_scale_L)).clamp_min(1e-8)
        e_scale_L = norm_L if e_scale_L is None else e_scale_L * norm_L
        d_scale_L = (1.0 if d_scale_L is None else d_scale_L) / norm_L
        b_L = b_L * norm_L
        notes.append("decoder norms are folded into the encoder, so that activations are lengths in the stream")
    theta_L = torch.zeros(n_latents) if theta is None else theta.float().expand(n_latents).clamp_min(0.0)
    if theta_L.shape != (n_latents,) or (theta is not None and theta.ndim and len(theta) != n_latents):
        _refuse(f"{path}: threshold is {list(theta_L.shape)} but W_dec asks for [{n_latents}]; fetch it again")
    e_LD = Stored(W_enc_LD, e_scale_L)
    if subtracts_b_dec:
        b_L = b_L - torch.cat([e_LD[block] @ b_dec_D for block in blocks(e_LD)])
        notes.append("b_dec is folded into the bias")
    if centred:
        notes.append("its model's stream was centred, which is folded into the encoder rows")
    if k is not None and theta is not None:
        notes.append(f"read at its stored threshold, not by its top {k}")
        k = None
    return Read(
        files,
        layer,
        Stored(W_enc_LD, e_scale_L, centred),
        b_L,
        theta_L,
        Stored(W_dec_LD, d_scale_L),
        b_dec_D,
        k,
        normalisation,
        tuple(notes),
    )


@contextmanager
def _tensors(path: Path) -> Iterator[None]:
    """Turns a missing tensor or setting into a refusal that names it."""
    try:
        yield
    except (KeyError, StopIteration) as e:
        name = repr(e.args[0]) if e.args else "of its decoder's bias"
        raise SAEError(f"{path} has no tensor {name}, so it is not of the format it looks like") from e


def _resid(hook: str, layer: int | None, path: Path) -> int:
    """The block whose output a TransformerLens hook point is; the input of block N is the output of N − 1."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", hook)
    found = None if match is None else int(match[1]) - (match[2] == "pre")
    if (match is None and (hook or layer is None)) or found == -1:
        _refuse(f"{path} reads hook point {hook!r}; only blocks.N.hook_resid_post can be edited; give an SAE of that")
    return _block(found, layer, path)


def _block(found: int | None, given: int | None, path: Path) -> int:
    if found is None and given is None:
        _refuse(f"{path} does not say which block it reads; say it: `trimtab sae convert {path} FOLDER --layer N`")
    if found is not None and given is not None and found != given:
        _refuse(f"{path} reads the output of block {found}, not of {given}; leave --layer out")
    layer = given if found is None else found
    assert layer is not None  # One of the two is there.
    return layer


def _refuse(message: str) -> NoReturn:
    raise SAEError(message)
