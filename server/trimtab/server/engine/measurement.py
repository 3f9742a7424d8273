"""Which kind a decoder layer is, measured: what the rest of the model makes of a change to what the layer returns.

With h and r the two tensors of a tuple, e a random direction as long as the longer of them in each row, and f the model's last
hidden states, the same prompt is run once as it is, and three times for each layer:

    a = ‖f(h + e, r) − f‖ / ‖f‖        pair    c = 0: only h + r is read
    b = ‖f(h, r + e) − f‖ / ‖f‖        decoy   b = 0: r is not read
    c = ‖f(h + e, r − e) − f‖ / ‖f‖

One tensor, alone, in a tuple, or with a batch in front, is told by its shape; a must not be 0. Whatever else is measured, a
partial sum of one rank, rows that are missing, several streams, is no kind. That the stream is also transformers' is for
a parity test to show.

The worker holds a `Measurement` while `handshake` asks `n_requests` times for one token after `PROMPT`: each is one forward. The
model runs as it is loaded, but not compiled; nothing is left behind.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.server.engine.kinds import Kind
from trimtab.server.engine.layers import class_name, decoder_layers

__all__ = ["PROMPT", "Measurement", "Reading", "verdict"]

PROMPT = [5, 9, 2, 7, 1, 8, 3, 6]
_SMALL, _SOME = 0.1, 1e-3
"""A change c below a tenth of a and b is rounding, of bf16 too; a change a above the second is one."""
_Change = Literal["a", "b", "c"]


class Reading(NamedTuple):
    """What was measured of one layer."""

    layer: int
    name: str
    """Of its class."""
    kind: Kind | None
    """None: no kind that can be steered."""
    why: str
    """The shape, or a, b and c."""


class _Form(NamedTuple):
    """What a layer returned in the undisturbed run."""

    parts: tuple[Any, ...]
    """Shapes, and None for what is no tensor."""
    is_tuple: bool
    e: Tensor | None
    """The direction, of the shape of the first tensor."""


class Measurement:
    """The measurement of one model, while it lasts."""

    def __init__(self, model: nn.Module, d_model: int) -> None:
        self._layers, self._d_model = decoder_layers(model), d_model
        self._forms: dict[int, _Form] = {}
        self._before: Tensor | None = None
        self._moved: dict[tuple[int, _Change], float] = {}
        changes: tuple[_Change, ...] = ("a", "b", "c")
        self._left: list[tuple[int, _Change]] = [(layer, change) for layer, _ in self._layers for change in changes]
        self.n_requests = 1 + len(self._left)
        self._handles = [model.register_forward_hook(self._after_model)]
        for layer, module in self._layers:
            self._handles.append(module.register_forward_hook(self._after_layer(layer)))
        self._compiled = [module for module in model.modules() if getattr(module, "do_not_compile", None) is False]
        self._compile(False)

    def end(self) -> list[Reading]:
        """Leave the model as it was; a reading of every decoder layer that this rank owns."""
        for handle in self._handles:
            handle.remove()
        self._compile(True)
        return [Reading(layer, class_name(module), *self._read(layer)) for layer, module in self._layers]

    def _compile(self, wanted: bool) -> None:
        """A graph that was compiled, or is yet to be, must know nothing of the changes."""
        for module in self._compiled:
            module.do_not_compile = not wanted  # type: ignore[assignment]

    def _after_layer(self, layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if self._before is None:
                self._forms[layer] = _form(output)
            elif self._left and self._left[0][0] == layer:
                return _changed(output, self._left[0][1], self._forms[layer].e)
            return None

        return hook

    def _after_model(self, _module: nn.Module, _args: Any, output: Any) -> None:
        last = output[0] if isinstance(output, tuple) else output
        if not isinstance(last, Tensor) or last.flatten(0, -2).shape[0] < len(PROMPT):
            return  # Another forward than ours, or a pipeline stage without last hidden states.
        f = last.detach().float().flatten(0, -2)[: len(PROMPT)].clone()
        if self._before is None:
            self._before = f
        elif self._left:
            self._moved[self._left.pop(0)] = float((f - self._before).norm() / self._before.norm())

    def _read(self, layer: int) -> tuple[Kind | None, str]:
        form = self._forms.get(layer)
        if form is None or self._left:
            return (
                None,
                "the prompts did not run through it; measure with --enforce-eager, without pipeline parallelism",
            )
        h, n = form.parts[0], len(PROMPT)
        if form.e is None or h not in ((n, self._d_model), (1, n, self._d_model)):
            return None, f"it returns {_shapes(form)} for {n} rows of width {self._d_model}"
        a, b, c = (self._moved[layer, change] for change in ("a", "b", "c"))
        if not a > _SOME:
            return None, f"what it returns is not read (a = {a:.1e})"
        if not form.is_tuple:
            return ("single" if len(h) == 2 else "batched"), f"a = {a:.1e}"
        if len(h) == 2 and form.parts[1:] == (None,):
            return "alone", f"a = {a:.1e}"
        if len(h) != 2 or form.parts[1:] != (h,):
            return None, f"it returns {_shapes(form)}"
        why = f"a = {a:.1e}, b = {b:.1e}, c = {c:.1e}"
        if b <= _SOME * a:
            return "decoy", why
        return ("pair" if c <= _SMALL * min(a, b) else None), why


def verdict(readings: list[Reading]) -> str:
    """The readings in a few words: each class, its kind, and the measures of one of its layers."""
    by_class: dict[str, list[Reading]] = {}
    for reading in readings:
        by_class.setdefault(reading.name, []).append(reading)
    parts = []
    for name, found in by_class.items():
        kinds = {reading.kind for reading in found}
        shown = next((reading for reading in found if reading.kind is None), found[0])
        what = repr(shown.kind) if shown.kind and len(kinds) == 1 else "no kind that can be steered"
        parts.append(f"{name.rpartition('.')[2]} measures as {what} (layer {shown.layer}: {shown.why})")
    return "; ".join(parts)


def _form(output: Any) -> _Form:
    parts = output if isinstance(output, tuple) else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    e = _direction(tensors) if tensors and isinstance(parts[0], Tensor) else None
    shapes = tuple(tuple(part.shape) if isinstance(part, Tensor) else None for part in parts)
    return _Form(shapes, isinstance(output, tuple), e)


def _direction(tensors: list[Tensor]) -> Tensor:
    """e: in each row as long as the longest of the tensors, or 1 where all are zero; the same on every rank."""
    h = tensors[0]
    e = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h.device)
    length = torch.zeros(*h.shape[:-1], 1, device=h.device)
    for tensor in tensors:
        if tensor.shape == h.shape:
            length = torch.maximum(length, tensor.float().norm(dim=-1, keepdim=True))
    length = torch.where(length > 0, length, torch.ones_like(length))
    scaled: Tensor = (e / e.norm(dim=-1, keepdim=True) * length).to(h.dtype)
    return scaled


def _changed(output: Any, change: _Change, e: Tensor | None) -> Any:
    """`output` under a change; itself where it has nothing to change."""
    if not isinstance(output, tuple):
        return output + e if change == "a" and e is not None and output.shape == e.shape else output
    h, *rest = output
    r = rest[0] if rest else None
    if e is None or h.shape != e.shape:
        return output
    match change:
        case "a":
            return (h + e, *rest)
        case "b" if isinstance(r, Tensor) and r.shape == e.shape:
            return (h, r + e, *rest[1:])
        case "c" if isinstance(r, Tensor) and r.shape == e.shape:
            return (h + e, r - e, *rest[1:])
    return output


def _shapes(form: _Form) -> str:
    shapes = [list(part) if part is not None else None for part in form.parts]
    return str(tuple(shapes)) if form.is_tuple else str(shapes[0])
