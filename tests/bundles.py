"""Bundles of random rows: the right shape for a model, and no meaning; for tests where meaning does not matter."""

from typing import Any

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

LATENTS = (7, 8, 9)
TINY = ModelIdentity(
    id="tiny",
    architecture="TinyForCausalLM",
    d_model=4,
    n_layers=3,
    fingerprint="sha256:tiny",
    tokenizer="sha256:words",
)


def random_bundle(
    model: ModelIdentity = TINY, *, name: str = "calm", layer: int = 1, seed: int = 0, **header: Any
) -> Bundle:
    """A bundle of three latents and the vector `mean`, which recommends to add latent 7 and to ablate 8 in the completion."""
    rng = np.random.default_rng(seed)

    def unit_rows(n: int) -> Any:
        rows = rng.standard_normal((n, model.d_model), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    decoder = unit_rows(len(LATENTS))
    fields: dict[str, Any] = {
        "name": name,
        "behaviour": "random rows, for tests",
        "created": "2026-11-22T00:00:00Z",
        "model": model,
        "sae": SAEIdentity(id="random", digest="sha256:random", d_sae=100),
        "layer": layer,
        "resid_norm": 50.0,
        "latents": tuple(LatentRecord(latent=latent, attribution=0.1, max_activation=10.0) for latent in LATENTS),
        "vectors": (VectorRecord(name="mean", source="random", norm=1.0),),
        "edits": (
            RecommendedEdit(latent=7, operation="add", amount=30.0),
            RecommendedEdit(latent=8, operation="ablate", scope="completion"),
        ),
    }
    return Bundle(
        Header(**{**fields, **header}),
        decoder=decoder,
        encoder=decoder,
        bias=np.zeros(len(LATENTS), np.float32),
        threshold=np.zeros(len(LATENTS), np.float32),
        baseline=np.zeros(len(LATENTS), np.float32),
        vectors=unit_rows(1),
    )
