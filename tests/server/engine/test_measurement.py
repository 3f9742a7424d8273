"""What a layer measures as, on models of a few lines whose layers return what vLLM's do, and what vLLM's must not."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.server.engine.measurement import PROMPT, Measurement, Reading, verdict

D, N_ROWS = 16, len(PROMPT)


class Layer(nn.Module):
    """A block whose forward is the function that it is given, with a weight of its own."""

    def __init__(self, forward: Callable[[nn.Linear, Any], Any]) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)
        self.call = forward

    def forward(self, state: Any) -> Any:
        return self.call(self.mix, state)


class Model(nn.Module):
    """A stack of one kind of layer; `last` makes hidden states of what the last one returns."""

    def __init__(self, first: Callable[[Tensor], Any], layer: Any, last: Callable[[Any], Tensor], dtype: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(layer) for _ in range(3)).to(dtype)
        self.first, self.last, self.dtype = first, last, dtype

    def forward(self) -> Tensor:
        state = self.first(torch.randn(N_ROWS, D, generator=torch.Generator().manual_seed(1)).to(self.dtype))
        for layer in self.layers:
            state = layer(state)
        return _norm(self.last(state))


def _norm(x: Tensor) -> Tensor:
    return x / x.float().pow(2).mean(-1, keepdim=True).sqrt().to(x.dtype)


def measured(first: Any, layer: Any, last: Any, dtype: torch.dtype = torch.float32) -> list[Reading]:
    model = Model(first, layer, last, dtype)
    with torch.inference_mode():
        measurement = Measurement(model, D)
        for _ in range(measurement.n_requests):
            model()
        return measurement.end()


def pair(mix: nn.Linear, state: Any) -> Any:
    x = state[0] + state[1]
    return mix(_norm(x)), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "first", "layer", "last"),
    [
        ("pair", lambda x: (x, torch.zeros_like(x)), pair, lambda s: s[0] + s[1]),
        ("decoy", lambda x: (x, x), lambda mix, s: (s[0] + mix(_norm(s[0])), s[0]), lambda s: s[0]),
        ("alone", lambda x: (x, None), lambda mix, s: (s[0] + mix(_norm(s[0])), None), lambda s: s[0]),
        ("single", lambda x: x, lambda mix, x: x + mix(_norm(x)), lambda x: x),
        ("batched", lambda x: x[None], lambda mix, x: x + mix(_norm(x)), lambda x: x[0]),
    ],
)
def test_every_kind_is_told_from_the_others(kind: str, first: Any, layer: Any, last: Any, dtype: torch.dtype) -> None:
    readings = measured(first, layer, last, dtype)
    assert [(reading.layer, reading.kind) for reading in readings] == [(0, kind), (1, kind), (2, kind)]


@pytest.mark.parametrize(
    ("first", "layer", "last", "why"),
    [
        # A partial sum of one of two ranks: the next layer adds the other's.
        (lambda x: (x, x), lambda mix, s: (mix(x := 2 * s[0] + s[1]), x), lambda s: 2 * s[0] + s[1], "a = .*c = "),
        # The stream is the second tensor.
        (lambda x: (x, x), lambda mix, s: (s[0], s[1] + mix(s[1])), lambda s: s[1], "not read"),
        # Four streams side by side.
        (lambda x: x.expand(4, N_ROWS, D), lambda mix, x: x + mix(x), lambda x: x.mean(0), r"\[4, 8, 16\]"),
        # Half of the rows on each rank.
        (lambda x: x[: N_ROWS // 2], lambda mix, x: x + mix(x), lambda x: x.repeat(2, 1), r"\[4, 16\] for 8 rows"),
        (lambda x: (x, x, x), lambda mix, s: (mix(s[0]), *s[1:]), lambda s: s[0], r"\[8, 16\], \[8, 16\], \[8, 16\]"),
    ],
)
def test_what_cannot_be_steered_is_no_kind(first: Any, layer: Any, last: Any, why: str) -> None:
    readings = measured(first, layer, last)
    assert [reading.kind for reading in readings] == [None] * 3
    assert re.search(why, readings[0].why)
    assert "no kind that can be steered" in verdict(readings)


def test_forwards_of_other_shapes_are_not_taken_for_the_prompt() -> None:
    model = Model(lambda x: x, lambda mix, x: x + mix(x), lambda x: x, torch.float32)
    with torch.inference_mode():
        measurement = Measurement(model, D)
        model.last = lambda x: x[:1]
        model()
        model.last = lambda x: x
        for _ in range(measurement.n_requests - 1):
            model()
        assert {reading.kind for reading in measurement.end()} == {None}


def test_nothing_is_left_on_the_model() -> None:
    model = Model(lambda x: x, lambda mix, x: x + mix(x), lambda x: x, torch.float32)
    compiled: Any = model.layers
    compiled.do_not_compile = False
    before = model()
    measurement = Measurement(model, D)
    assert compiled.do_not_compile is True
    for _ in range(measurement.n_requests):
        model()
    assert "measures as 'single'" in verdict(measurement.end())
    assert compiled.do_not_compile is False
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model(), before)
