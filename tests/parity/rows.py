"""The bundles of the parity tests: random rows that fire on real activations, and real latents of the shipped SAE."""

from functools import lru_cache

import numpy as np

from trimtab.attribution.bundle import (
    Bundle,
    Header,
    LatentRecord,
    ModelIdentity,
    RecommendedEdit,
    SAEIdentity,
    VectorRecord,
)
from trimtab.attribution.sae import SAE, shipped_sae

N_LATENTS = 8
N_REAL = 24
N_LAYERS = 30
MODEL = ModelIdentity(
    id="embedded",
    architecture="LlamaForCausalLM",
    d_model=576,
    n_layers=N_LAYERS,
    fingerprint="sha256:any",
    tokenizer="sha256:any",
)
RESID_NORM = {layer: 15.0 if layer == 0 else 60.0 if layer < 9 else 160.0 for layer in range(N_LAYERS)}
"""Typical ‖h‖ of the embedded model, by layer, roughly."""


def steering_bundle(name: str, layer: int, seed: int) -> Bundle:
    """Random rows that fire on real activations: readers near their own directions, thresholds of a JumpReLU."""
    rng = np.random.default_rng(seed)
    scale = RESID_NORM[layer] / 160.0
    decoder = rng.standard_normal((N_LATENTS, MODEL.d_model)).astype(np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    encoder = (0.9 * decoder + 0.01 * rng.standard_normal(decoder.shape)).astype(np.float32)
    vectors = rng.standard_normal((2, MODEL.d_model)).astype(np.float32)
    latents = tuple(
        LatentRecord(latent=100 + i, attribution=0.1, max_activation=20.0 * scale) for i in range(N_LATENTS)
    )
    header = Header(
        name=name,
        behaviour="random rows, for parity",
        created="2026-11-22T00:00:00Z",
        model=MODEL,
        sae=SAEIdentity(id="random", digest="sha256:random", d_sae=1000),
        layer=layer,
        resid_norm=RESID_NORM[layer],
        latents=latents,
        vectors=tuple(
            VectorRecord(name=v, source="random", norm=float(np.linalg.norm(vectors[i]))) for i, v in enumerate("uv")
        ),
        edits=(
            RecommendedEdit(latent=100, operation="add", amount=0.3, unit="resid_norm"),
            RecommendedEdit(latent=101, operation="clamp", amount=1.5, unit="max_act", scope="completion"),
            RecommendedEdit(vector="u", operation="project", scope="prompt"),
        ),
    )
    return Bundle(
        header,
        decoder=decoder,
        encoder=encoder,
        bias=np.full(N_LATENTS, -0.2 * scale, np.float32),
        threshold=np.linspace(0, 2 * scale, N_LATENTS, dtype=np.float32),
        baseline=rng.standard_normal(N_LATENTS).astype(np.float32) * scale,
        vectors=vectors,
    )


def sae_bundle() -> Bundle:
    """The shipped SAE's latents that fire most often, but for those that fire on every other token."""
    sae = SAE.load(shipped_sae())
    if sae.stats is None:
        raise FileNotFoundError(f"{shipped_sae()} has no stats.safetensors")
    density_L = sae.stats.density_L.masked_fill(sae.stats.density_L > 0.5, 0.0)
    chosen = density_L.topk(N_REAL).indices.sort().values
    d_KD = sae.d_LD[chosen]
    header = Header(
        name="sae",
        behaviour="the busiest latents of the shipped SAE, for parity",
        created="2026-11-22T00:00:00Z",
        model=MODEL,
        sae=SAEIdentity(id=sae.id, digest=sae.digest, d_sae=sae.d_sae),
        layer=sae.layer,
        resid_norm=sae.stats.resid_norm,
        latents=tuple(
            LatentRecord(latent=int(i), attribution=0.0, max_activation=float(sae.stats.max_activation_L[i]))
            for i in chosen
        ),
        edits=tuple(RecommendedEdit(latent=int(i), operation="ablate") for i in chosen),
    )
    return Bundle(
        header,
        decoder=d_KD.numpy(),
        encoder=sae.e_LD[chosen].numpy(),
        bias=sae.b_L[chosen].numpy(),
        threshold=sae.theta_L[chosen].numpy(),
        baseline=(d_KD @ sae.stats.mean_D / d_KD.norm(dim=-1)).numpy(),
    )


@lru_cache
def bundles() -> dict[str, Bundle]:
    """The bundles of the cases, by name."""
    random = {f"l{layer}": steering_bundle(f"l{layer}", layer, layer) for layer in RESID_NORM}
    return {**random, "sae": sae_bundle()}


@lru_cache
def real_latents() -> tuple[int, ...]:
    """The SAE's latents in the bundle `sae`."""
    return tuple(record.latent for record in bundles()["sae"].header.latents)
