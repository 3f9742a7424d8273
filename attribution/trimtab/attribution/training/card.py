"""The model card of the shipped SAE, written from what was measured."""

from __future__ import annotations

from typing import Any

from trimtab.attribution.training.sources import PACKAGE, SOURCES, WHEEL_SHA256

__all__ = ["card"]


def card(metrics: dict[str, Any]) -> str:
    """README.md for the SAE folder, from `metrics.json`."""
    data, training, latents = metrics["data"], metrics["training"], metrics["latents"]
    measured = "\n".join(
        _row(name, metrics["held_out"][name], metrics["recovery"].get(name)) for name in metrics["held_out"]
    )
    n_met = latents["n_tokens"] + latents["n_sinks"]
    sources = "\n".join(f"| {name} | {source.licence} | {source.use} |" for name, source in SOURCES.items())
    return f"""# SAE of {metrics["model"]} at `{metrics["hook_name"]}`

A sparse autoencoder of {training["n_latents"]:,} latents on the residual stream after block {metrics["layer"]} (the exact
middle) of SmolLM2-135M-Instruct, in SAELens v6's folder format. Made by `make sae`
(`python -m trimtab.attribution.training`); every number below is from `metrics.json`, which that command writes.

## What it measures

On documents that training never saw. FVU is the fraction of variance unexplained, L0 the mean number of active latents per
token. *Recovered* is (CE_mean − CE_sae) / (CE_mean − CE_clean): the whole model's cross-entropy with the stream replaced at
every non-sink token by the reconstruction, against its mean. *Agreement* is |both| / |either| between the active
entries of the shipped JumpReLU and those of BatchTopK, as trained, in batches of 2,048 tokens.

| held-out | tokens | FVU | L0 | FVU (BatchTopK) | agreement | recovered | CE clean | CE spliced | CE mean |
|---|---|---|---|---|---|---|---|---|---|
{measured}

- Latents that fire on none of {latents["n_tokens"]:,} tokens (held-out and training): {latents["never_fires"]:.1%}. Silent in
  the last {training["silent_after"]} training batches of {training["batch"]:,} tokens: {training["silent"]:.1%}.
- Sinks: position 0 and tokens of norm above {metrics["sink_ratio"]:g} × the median ({latents["n_sinks"]} of {n_met:,} past
  position 0) are in no figure, mean or example. Were they let in, the strongest token would be a sink for
  {latents["topped_by_sink"]} of the 20 latents most active on chat.
- Typical norm of the stream (median): {latents["median_norm"]:.1f}.

## How it was trained

BatchTopK, k = {training["k"]}, {training["steps"]:,} steps of {training["batch"]:,} tokens: {training["seen"]:,} tokens seen,
{data["unique"]:,} of them different ({data["chat"]:.0%} chat: dialogue made from question sets and the model's own replies).

- Decoder rows start as data and keep norm 1. k falls from {training["k_first"]} to {training["k"]} in the first {training["k_falls"]} steps.
- Latents silent for {training["silent_after"]} steps get an auxiliary loss (AuxK {training["aux_k"]}, weight {training["aux_weight"]:g}) and,
  until the decay, are pointed anew at what is least explained.
- Adam {training["lr"]:g}, β2 0.99, falling to 0 over the last {training["decay"]:.0%}.
- Saved as JumpReLU with one threshold for all latents, {training["threshold"]:.2f}, at which {training["k"]} latents are active on
  average on {training["calibration_tokens"]:,} training tokens. W_enc and W_dec are fp16, the rest fp32; nothing is to be
  normalised before the encoder.

{training["note"]}

## Files

| file | content |
|---|---|
| `cfg.json`, `sae_weights.safetensors` | the SAE, SAELens v6: W_enc [576, L], W_dec [L, 576], b_enc, b_dec, threshold |
| `stats.safetensors` | of the stream: `mean_activation_vector` [576], `median_norm`; per latent [L]: `density_text`, \
`density_chat` (part of the tokens it fires on), `max_activation`, `mean_activation` (when firing) |
| `top_contexts.jsonl.gz` | per latent up to 4 excerpts: activation, tokens before, token, tokens after |
| `metrics.json` | the measurements above |

## Data

The package `{PACKAGE}` (PyPI, sha256 `{WHEEL_SHA256}`), of which only these sets are read:

| set | licence | use |
|---|---|---|
{sources}

The model's own replies: {data["n_samples"]:,} conversations (sha256 of the part files `{data["samples_sha256"]}`), sampled at
temperature 0.8-1.0 with at most {data["max_new_tokens"]} tokens. The excerpts in `top_contexts.jsonl.gz` keep the licence of
their source. The weights are Apache-2.0, as is the model.
"""


def _row(name: str, held_out: dict[str, Any], recovery: dict[str, Any] | None) -> str:
    cells = [
        name,
        f"{held_out['n_tokens']:,}",
        f"{held_out['fvu']:.3f}",
        f"{held_out['l0']:.1f}",
        f"{held_out['fvu_batch_top_k']:.3f}",
        f"{held_out['agreement']:.1%}",
    ]
    if recovery:
        cells += [f"{recovery['recovered']:.1%}"] + [f"{recovery[key]:.3f}" for key in ("clean", "sae", "mean_ablated")]
    else:
        cells += ["–"] * 4
    return "| " + " | ".join(cells) + " |"
