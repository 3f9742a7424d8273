"""A plan: one request's edits, resolved against the loaded bundles and validated. Pure: no I/O, no clock, no vLLM.

    Steering ── compile_plan ──► Plan ── wire ──► the string that rides in SamplingParams.extra_args

A plan names rows by (content hash of the bundle, row), never by vector: the rows are already in every worker. Its `hash` is
canonical: the same edits spelt differently are the same plan, share cache blocks, and share a slot in the engine's tables.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from trimtab.attribution.bundle import Bundle, RecommendedEdit
from trimtab.attribution.edit import coefficients
from trimtab.server import steering as asked
from trimtab.server.errors import InvalidSteering, UnknownBundle, Violation
from trimtab.server.steering import Edit, GateMode, Scope, Steering
from trimtab.server.window import EVERYWHERE, Window

__all__ = ["Gate", "Plan", "PlanRow", "Segment", "Window", "block_key", "compile_plan"]

LARGEST = 3.4e38
"""Coefficients are fp32 in the engine."""


class Gate(NamedTuple):
    """What opens a row: e · h + b > above, read from the unedited stream at the row's own layer."""

    bundle: str
    """Content hash."""
    row: int
    """Row of a latent in the bundle's tensors."""
    above: float
    """In SAE units, and no less than the latent's own threshold: below it the latent does not fire."""
    mode: GateMode


class PlanRow(NamedTuple):
    """One row of the formula: α and β are final, e, b, θ and d are the worker's copy of the bundle's row."""

    layer: int
    """resid_post of this 0-based block."""
    window: Window
    bundle: str
    """Content hash."""
    source: Literal["latent", "project", "vector", "project_vector"]
    """Where e and d come from: a latent's own rows, its unit direction, or a dense vector."""
    row: int
    """Row in the bundle's tensors."""
    alpha: float
    beta: float
    exclude_special: bool
    """Special tokens are left alone."""
    gate: Gate | None

    @property
    def is_onward(self) -> bool:
        """Whether what it does at one position depends on earlier ones of the same request."""
        return self.gate is not None and self.gate.mode == "onward"

    @property
    def is_conditional(self) -> bool:
        """Whether it depends on the token that it meets."""
        return self.gate is not None or self.exclude_special


class Segment(NamedTuple):
    """A run of positions of one request under the same edits; segments are disjoint and ascending."""

    lo: int
    hi: int | None
    """[lo, hi) in absolute positions; None is the end."""
    rows: tuple[PlanRow, ...]
    key: str
    """Digest of what the rows do, whatever windows brought them here: equal keys are equal edits. Rows gated `onward` keep their
    window, which says where their gate began to watch."""

    @property
    def is_onward(self) -> bool:
        """Whether a row's effect depends on earlier positions of the same request."""
        return any(row.is_onward for row in self.rows)


class Plan(NamedTuple):
    """A request's rows in canonical order, and their hash."""

    rows: tuple[PlanRow, ...]
    hash: str
    """`sha256:` and 32 hex digits of `text`."""
    text: str
    """The canonical rows as compact JSON, written once: what is hashed, and what goes on the wire."""

    @classmethod
    def of(cls, rows: Iterable[PlanRow]) -> "Plan":
        """The canonical plan of these rows: alike ones are summed, and those that do nothing are dropped."""
        ordered, text = _canonical(rows)
        return cls(ordered, _digest(text), text)

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, ascending."""
        return tuple(sorted({row.layer for row in self.rows}))

    def segments(self, n_prompt: int) -> tuple[Segment, ...]:
        """The plan resolved for a prompt of `n_prompt` tokens: at each position at most one segment, so one slot per row."""
        bounds = [row.window.bounds(n_prompt) for row in self.rows]
        cuts = sorted({lo for lo, _ in bounds} | {hi for _, hi in bounds if hi is not None})
        segments = []
        ends: list[int | None] = [*cuts[1:], None]
        for lo, hi in zip(cuts, ends, strict=False):  # without rows there are no cuts, and an end too many
            here = (row for row, (a, b) in zip(self.rows, bounds, strict=True) if a <= lo and (b is None or lo < b))
            # The window is not part of what the rows do here: blanked, so that prompt, completion and all share slots and blocks.
            rows, text = _canonical(row if row.is_onward else row._replace(window=EVERYWHERE) for row in here)
            if rows:
                segments.append(Segment(lo, hi, rows, _digest(text)))
        return tuple(segments)

    def wire(self) -> str:
        """The plan as compact JSON text."""
        return f'{{"hash":"{self.hash}","rows":{self.text}}}'

    @classmethod
    def from_wire(cls, text: str) -> "Plan":
        """The plan of `wire()`, its rows as they were put in order there.

        Raises:
            InvalidSteering: the text is no plan, or its hash is not that of its rows.
        """
        try:
            document = json.loads(text)
            plan = cls(tuple(map(_read, document["rows"])), document["hash"], text[_ROWS:-1])
            for row in plan.rows:
                if not all(map(math.isfinite, (row.alpha, row.beta, row.gate.above if row.gate else 0))):
                    raise ValueError("a coefficient is not finite")
            if plan.wire() != text or plan.hash != _digest(plan.text):
                raise ValueError("the hash does not match the rows")
        except (ArithmeticError, KeyError, TypeError, ValueError) as e:
            raise InvalidSteering([Violation("trimtab", f"not a plan ({e}); make one with compile_plan")]) from e
        return plan


def block_key(segments: tuple[Segment, ...], start: int, end: int) -> tuple[tuple[int, int, str], ...]:
    """What the edits do to the cache block of positions [start, end), as (offset, offset, segment key) triples.

    Empty for a block with no edited position: it keeps the plain key, and the chain of block hashes carries whatever was edited
    before it. Offsets are part of the key because a window may end inside a block: a prompt-scoped plan edits [1, n − 1), so the
    same text under the same plan is edited further in a longer prompt, and its blocks must not be taken for the shorter one's.
    """
    key = []
    for segment in segments:
        lo, hi = max(segment.lo, start), end if segment.hi is None else min(segment.hi, end)
        if lo < hi:
            key.append((lo - start, hi - start, segment.key))
    return tuple(key)


def _canonical(rows: Iterable[PlanRow]) -> tuple[tuple[PlanRow, ...], str]:
    """The rows in canonical order, alike ones summed and those that do nothing dropped; and as JSON."""
    once: dict[tuple[str, str], PlanRow] = {}
    alike: dict[tuple[str, str], list[PlanRow]] = {}
    for row in rows:
        around = _around(row)
        if around in once:
            alike.setdefault(around, [once[around]]).append(row)
        else:
            once[around] = row
    for around, same in alike.items():  # the formula is linear in (α, β), and fsum does not depend on the order
        alpha, beta = math.fsum(row.alpha for row in same), math.fsum(row.beta for row in same)
        once[around] = once[around]._replace(alpha=alpha, beta=beta)
    texts = {
        f"{before}{row.alpha + 0.0!r},{row.beta + 0.0!r}{after}": row  # + 0.0 turns -0.0 into 0.0
        for (before, after), row in once.items()
        if row.alpha or row.beta
    }
    ordered = sorted(texts)
    return tuple(texts[text] for text in ordered), f"[{','.join(ordered)}]"


def _digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


_ROWS = len(f'{{"hash":"{_digest("")}","rows":')
"""Where the rows begin on the wire."""


def _around(row: PlanRow) -> tuple[str, str]:
    """What stands before and after α and β in a row as compact JSON: what `json.dumps` writes, several times as fast."""
    layer, window, bundle, source, at, _, _, special, gate = row
    opens = "null"
    if gate is not None:
        opens = f"[{_string(gate.bundle)},{gate.row},{gate.above + 0.0!r},{_string(gate.mode)}]"
    return (
        f"[{layer},{_window_text(window)},{_string(bundle)},{_string(source)},{at},",
        f",{'true' if special else 'false'},{opens}]",
    )


_string = json.encoder.encode_basestring_ascii


@lru_cache(maxsize=1024)
def _window_text(window: Window) -> str:
    return json.dumps(window, separators=(",", ":"))


def _read(values: Any) -> PlanRow:
    """The row that was written as this list."""
    layer, window, bundle, source, row, alpha, beta, special, gate = values
    opens = None
    if gate is not None:
        of, latent, above, mode = gate
        opens = Gate(of, int(latent), float(above), mode)
    return PlanRow(
        int(layer), _window(*window), bundle, source, int(row), float(alpha), float(beta), bool(special), opens
    )


@lru_cache(maxsize=1024)
def _window(lo: Any, lo_end: Any, hi: Any, hi_end: Any) -> Window:
    return Window(int(lo), *(None if x is None else int(x) for x in (lo_end, hi, hi_end)))


def compile_plan(steering: Steering, bundles: Mapping[str, Bundle]) -> Plan:
    """The plan of a validated `steering` field; `bundles` maps the names that a request may use to loaded bundles.

    Raises:
        UnknownBundle: a bundle that is not loaded.
        InvalidSteering: a latent or vector outside its bundle, a scope that no token can be in, a gate at another layer, an
            amount that is too large, or two operations on one latent.
    """
    named, whole = steering.edits is not None, steering.bundle or ""
    held: dict[str, Bundle] = {}  # each is looked up once

    def find(name: str, field: str) -> Bundle:
        if name not in held:
            held[name] = _find(name, bundles, field)
        return held[name]

    edits = steering.edits if steering.edits is not None else _recommended(whole, find(whole, _BUNDLE))
    rows: list[PlanRow] = []
    violations: list[Violation] = []
    seen: dict[tuple[str, int | str], list[tuple[int, Window]]] = {}
    for i, edit in enumerate(edits):
        where = f"steering.edits[{i}]" if named else _BUNDLE
        bundle = find(edit.bundle, f"{where}.bundle" if named else where)
        window = Window.of(edit.scope)
        found = _unknown(edit, bundle, where)
        reader = bundle
        if edit.gate is not None:
            if edit.gate.bundle is not None:
                reader = find(edit.gate.bundle, f"{where}.gate.bundle")
            found += _gate_violations(edit, edit.gate, bundle, reader, where)
        if window.example() is None:
            found.append(Violation(f"{where}.scope", _EMPTY))
        if found:
            violations += found
            continue
        row = _row(edit, window, bundle, _gate(edit.gate, reader), steering.strength * edit.strength)
        if not (abs(row.alpha) <= LARGEST and abs(row.beta) <= LARGEST):
            violations.append(
                Violation(where, f"its strength comes to {row.alpha or row.beta:.3g}; no number above {LARGEST:g}")
            )
            continue
        rows.append(row)
        if edit.operation != "add":
            others = seen.setdefault((row.bundle, _direction(edit)), [])
            for j, other in others:
                if (n := other.meet(window).example()) is not None:
                    violations.append(_conflict(where, j, edit, n))
            others.append((i, window))
    if violations:
        raise InvalidSteering(violations)
    return Plan.of(rows)


_BUNDLE = "steering.bundle"
_EMPTY = (
    "holds no token of any prompt: its window and its `tokens` do not meet, or it is position 0 alone, which needs "
    "`first_token`"
)


def _conflict(where: str, j: int, edit: Edit, n_prompt: int) -> Violation:
    return Violation(
        where,
        f"edits[{j}] already edits {_direction(edit)!r} on the same tokens (in a prompt of length {n_prompt}, for one), and only "
        "`add` can be combined; keep one of the two, or give them windows that never meet",
    )


def _direction(edit: Edit) -> int | str:
    return edit.latent if edit.latent is not None else edit.vector or ""


def _unknown(edit: Edit, bundle: Bundle, where: str) -> list[Violation]:
    kind: Literal["latent", "vector"] = "latent" if edit.latent is not None else "vector"
    if _direction(edit) in (bundle.row_of if kind == "latent" else bundle.vector_of):
        return []
    return [Violation(f"{where}.{kind}", _absent(kind, _direction(edit), edit.bundle, bundle))]


def _gate_violations(edit: Edit, gate: asked.Gate, bundle: Bundle, reader: Bundle, where: str) -> list[Violation]:
    if reader.header.layer != bundle.header.layer:
        return [
            Violation(
                f"{where}.gate.bundle",
                f"reads layer {reader.header.layer} and the edit is at layer {bundle.header.layer}; a gate is a latent of the "
                "edit's own layer",
            )
        ]
    if gate.latent not in reader.row_of:
        name = gate.bundle or edit.bundle
        return [Violation(f"{where}.gate.latent", _absent("latent", gate.latent, name, reader))]
    return []


def _gate(gate: asked.Gate | None, reader: Bundle) -> Gate | None:
    if gate is None:
        return None
    row = reader.row_of[gate.latent]
    largest = reader.header.latents[row].max_activation if gate.unit == "max_act" else 1.0
    above = max(gate.above * largest, float(reader.threshold[row]))
    return Gate(reader.content_hash, row, above + 0.0, gate.mode)


def _recommended(name: str, bundle: Bundle) -> tuple[Edit, ...]:
    value_field = {"add": "amount", "clamp": "target", "scale": "factor"}

    def edit(recommended: RecommendedEdit) -> Edit:
        fields = recommended.model_dump(exclude={"amount", "scope", "exclude_special"}, exclude_none=True)
        if recommended.amount is not None:
            fields[value_field[recommended.operation]] = recommended.amount
        scope = Scope(tokens=recommended.scope, exclude_special=recommended.exclude_special)
        return Edit(bundle=name, scope=scope, **fields)

    return tuple(edit(recommended) for recommended in bundle.header.edits)


def _find(name: str, bundles: Mapping[str, Bundle], field: str) -> Bundle:
    try:
        return bundles[name]
    except KeyError:
        known = ", ".join(sorted(bundles)) or "none"
        raise UnknownBundle(
            f"bundle {name!r} is not loaded (loaded: {known}); GET /v1/steering/bundles lists them", field=field
        ) from None


def _absent(kind: str, key: int | str, name: str, bundle: Bundle) -> str:
    held: list[Any] = sorted(bundle.row_of) if kind == "latent" else sorted(bundle.vector_of)
    shown = ", ".join(map(str, held[:8])) + (", …" if len(held) > 8 else "")
    return (
        f"{kind} {key} is not in bundle {name!r}, which holds {len(held)} ({shown or 'none'}); "
        f"GET /v1/steering/bundles/{name} lists them"
    )


def _row(edit: Edit, window: Window, bundle: Bundle, gate: Gate | None, strength: float) -> PlanRow:
    header = bundle.header
    is_project = edit.operation == "project"
    source: Literal["latent", "project", "vector", "project_vector"]
    per_unit, baseline = 1.0, 0.0
    if edit.latent is not None:
        row = bundle.row_of[edit.latent]
        source = "project" if is_project else "latent"
        if is_project:
            baseline = float(bundle.baseline[row])
    else:
        row = bundle.vector_of[edit.vector or ""]
        source = "project_vector" if is_project else "vector"
    match edit.unit:
        case "max_act":
            per_unit = header.latents[row].max_activation
        case "resid_norm":
            direction = (bundle.decoder if edit.latent is not None else bundle.vectors)[row]
            per_unit = header.resid_norm / math.sqrt(float(direction @ direction))
    alpha, beta = coefficients(edit.operation, amount=edit.value * per_unit, strength=strength, baseline=baseline)
    special = edit.scope.exclude_special
    return PlanRow(header.layer, window, bundle.content_hash, source, row, alpha, beta, special, gate)
