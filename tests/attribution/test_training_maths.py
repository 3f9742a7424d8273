"""The trainer's sparse arithmetic against dense autograd, on a case small enough to see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab.attribution.training.corpus import is_held_out
from trimtab.attribution.training.dictionary import (
    Dictionary,
    add_auxiliary,
    batch_top_k,
    decode,
    entry_products,
    gradients,
)
from trimtab.attribution.training.jumprelu import JumpReLU, fold
from trimtab.attribution.training.plan import TrainPlan
from trimtab.attribution.training.train import Run, Store, train

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
T, D, L, K = 32, 16, 64, 5


@pytest.fixture
def case() -> tuple[Dictionary, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(T, D, generator=generator)
    dictionary = Dictionary.from_data(x_TD, L, 0.5, generator)
    dictionary.b_enc = 0.1 * torch.randn(L, generator=generator)
    dictionary.b_dec = 0.1 * torch.randn(D, generator=generator)
    return dictionary, x_TD


@pytest.mark.parametrize("near", [0.0, 1e-6, 0.9, 50.0])
def test_batch_top_k_keeps_the_k_largest_whatever_the_guess(case: tuple[Dictionary, torch.Tensor], near: float) -> None:
    dictionary, x_TD = case
    z_TL = dictionary.encode(x_TD)
    a, lowest = batch_top_k(z_TL, K, near)
    expected = z_TL.flatten().topk(K * T).values
    assert torch.equal(a.value.sort(descending=True).values, expected)
    assert lowest == float(expected[-1])
    dense = torch.zeros(T, L)
    dense[a.token, a.latent] = a.value
    assert torch.equal(dense, z_TL * (z_TL >= lowest))


def test_batch_top_k_never_keeps_what_is_not_positive() -> None:
    a, lowest = batch_top_k(torch.full((4, 8), -1.0), 2, 0.5)
    assert len(a.value) == 0
    assert lowest == 0.0


def test_gradients_equal_dense_autograd(case: tuple[Dictionary, torch.Tensor]) -> None:
    dictionary, x_TD = case
    a, lowest = batch_top_k(dictionary.encode(x_TD), K, 0.0)
    error_TD, loss, grads = gradients(dictionary, x_TD, a)
    W_enc, b_enc, W_dec, b_dec = leaves = [p.clone().requires_grad_() for p in dictionary.parameters()]
    z_TL = x_TD @ W_enc.T + b_enc
    dense_error = (z_TL * (z_TL >= lowest)) @ W_dec + b_dec - x_TD
    dense_loss = dense_error.square().sum() / x_TD.square().sum()
    dense_loss.backward()
    torch.testing.assert_close(error_TD, dense_error.detach())
    torch.testing.assert_close(loss, dense_loss.detach())
    for leaf, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, leaf.grad)


def test_the_auxiliary_gradient_equals_dense_autograd(case: tuple[Dictionary, torch.Tensor]) -> None:
    dictionary, x_TD = case
    silent = torch.tensor([3, 17, 40, 41])
    error_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    grads = [torch.zeros_like(p) for p in dictionary.parameters()]
    z_TS = dictionary.encode(x_TD)[:, silent]
    add_auxiliary(dictionary, grads, x_TD, z_TS, error_TD, silent, 2, 0.25)
    leaves = [p.clone().requires_grad_() for p in dictionary.parameters()]
    z = (x_TD @ leaves[0].T + leaves[1])[:, silent]
    kept = torch.zeros_like(z).scatter(1, z.topk(2).indices, 1.0)
    explained = (z.relu() * kept) @ leaves[2][silent]
    (0.25 * (explained + error_TD).square().sum() / error_TD.square().sum()).backward()
    for leaf, grad in zip(leaves[:3], grads[:3], strict=True):
        torch.testing.assert_close(grad, leaf.grad)


def test_sparse_products_equal_dense_ones(case: tuple[Dictionary, torch.Tensor]) -> None:
    dictionary, x_TD = case
    a, _ = batch_top_k(dictionary.encode(x_TD), K, 0.0)
    dense = torch.zeros(T, L)
    dense[a.token, a.latent] = a.value
    torch.testing.assert_close(decode(a, dictionary.W_dec), dense @ dictionary.W_dec)
    torch.testing.assert_close(
        entry_products(a, x_TD, dictionary.W_dec), (x_TD @ dictionary.W_dec.T)[a.token, a.latent]
    )


def _tiny_run(tmp_path: Path, steps: int) -> tuple[Run, Store, list[float]]:
    torch.manual_seed(0)
    atoms = torch.randn(24, D)
    h = 40.0 + 10.0 * ((torch.rand(2048, 24) < 0.1) * torch.rand(2048, 24)) @ atoms
    store = Store(tmp_path)
    store.refresh = lambda first=(): len(h)  # type: ignore[method-assign] # No shards: the activations are given.
    store._h, store.n_tokens = h.half(), len(h)
    plan = TrainPlan(
        n_latents=L, k=3, k_first=6, k_falls=20, batch=256, steps=steps, warmup=5, lr=5e-3, encoder_gain=0.3
    )
    seen: list[float] = []
    return train(plan, store, tmp_path / "run", lambda _run, fvu, _silent: seen.append(fvu)), store, seen


def test_training_learns_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    run, _, seen = _tiny_run(tmp_path, 100)
    assert seen[-1] < 0.5 * seen[0]
    assert run.step == len(seen) == 100
    torch.testing.assert_close(run.dictionary.W_dec.norm(dim=1), torch.ones(L))
    again, _, more = _tiny_run(tmp_path, 120)
    assert again.step == 120
    assert len(more) == 20


def test_folding_keeps_the_reconstruction(tmp_path: Path) -> None:
    run, store, _ = _tiny_run(tmp_path, 40)
    h_TD = store.rows(torch.arange(64))
    x_TD = (h_TD - run.mean) / run.scale
    z_TL = run.dictionary.encode(x_TD)
    a, _ = batch_top_k(z_TL, 3, 0.0)
    between = float(z_TL.flatten().topk(3 * 64 + 1).values[-2:].mean())
    expected = run.mean + run.scale * (decode(a, run.dictionary.W_dec) + run.dictionary.b_dec)
    sae = fold(run, between)
    torch.testing.assert_close(sae.decode(sae.encode(h_TD)), expected, rtol=1e-3, atol=1e-2)
    sae.save(tmp_path / "sae")
    read = JumpReLU.load(tmp_path / "sae")
    torch.testing.assert_close(read.W_dec, sae.W_dec, rtol=1e-3, atol=1e-3)
    assert torch.equal(read.b_enc, sae.b_enc)


def test_one_group_in_forty_is_held_out_for_ever() -> None:
    held = [i for i in range(4000) if is_held_out(f"group {i}")]
    assert 60 < len(held) < 140
    assert held[:3] == [i for i in range(held[2] + 1) if is_held_out(f"group {i}")]
