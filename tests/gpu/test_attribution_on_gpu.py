"""Attribution on CUDA: in fp32 the CPU's scores, in bf16 the same leaders. Not yet run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.attribution.embedded import EMBEDDED_MODEL
from trimtab.attribution.gradients import Tracing, batches, trace
from trimtab.attribution.model import SplitModel, load_tokenizer
from trimtab.attribution.moments import Firings, Moments
from trimtab.attribution.pairs import load_pairs, shipped_pairs, tokenise
from trimtab.attribution.sae import SAE, shipped_sae
from trimtab.attribution.scores import Scores, score

pytestmark = pytest.mark.cuda


def scores(dtype: torch.dtype, monkeypatch: Any, device: str) -> Scores:
    monkeypatch.setattr("trimtab.attribution.model.compute_device", lambda: torch.device(device))
    model = SplitModel.load(EMBEDDED_MODEL, 14, dtype=dtype)
    sae = SAE.load(shipped_sae()).on(model.device)
    assert sae.stats is not None
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    completions = [c for pair in load_pairs(shipped_pairs()).pairs[:4] for c in tokenise(tokenizer, pair)]
    tracing = Tracing("completion", {14: sae.stats.resid_norm})
    passes = [trace(model, completions, batch, tracing).factors[14] for batch in batches(completions)]
    mean_D, amounts = sae.stats.mean_D, torch.zeros(sae.d_sae, device=model.device)
    return score(Moments.over(passes, mean_D, 4), Firings.over(passes, sae, 4), sae, "ablate", amounts, mean_D)


def test_the_scores_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = scores(torch.float32, monkeypatch, "cpu"), scores(torch.float32, monkeypatch, "cuda")
    for method, score_L in cpu.by.items():
        assert float((cuda.by[method].cpu() - score_L).abs().max() / score_L.abs().max()) < 1e-3


def test_bf16_keeps_the_leaders(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = scores(torch.float32, monkeypatch, "cpu"), scores(torch.bfloat16, monkeypatch, "cuda")
    leaders = [set(found.operation_L.topk(20).indices.tolist()) for found in (cpu, cuda)]
    assert len(leaders[0] & leaders[1]) >= 15
