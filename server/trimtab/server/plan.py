"""A plan: one request's edits, resolved against the loaded bundles and validated. Pure: no I/O, no clock, no vLLM.

    Steering ── compile_plan ──► Plan ── wire ──► the string that rides in SamplingParams.extra_args

A plan names rows by (content hash of the bundle, row), never by vector: the rows are already in every worker. Its `hash` is
canonical: the same edits spelt differently are the same plan, share cache blocks, and share a slot in the engine's tables.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from trimtab.attribution.bundle import Bundle, RecommendedEdit
from trimtab.attribution.edit import coefficients
from trimtab.server.errors import InvalidSteering, UnknownBundle, Violation
from trimtab.server.steering import Edit, Scope, ScopeTokens, Steering

__all__ = ["Plan", "PlanRow", "Segment", "Window", "block_key", "compile_plan"]


class Window(NamedTuple):
    """A half-open window of positions, resolved per request by `bounds`."""

    tokens: ScopeTokens
    first_token: bool

    def bounds(self, n_prompt: int) -> tuple[int, int | None]:
        """[lo, hi) in absolute positions of a request whose prompt has `n_prompt` tokens; hi None is the end."""
        sink = 0 if self.first_token else 1
        match self.tokens:
            case "prompt":
                return sink, max(sink, n_prompt - 1)
            case "completion":
                return max(sink, n_prompt - 1), None
            case "all":
                return sink, None


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


class Segment(NamedTuple):
    """A run of positions of one request under the same edits; segments are disjoint and ascending."""

    lo: int
    hi: int | None
    """[lo, hi) in absolute positions; None is the end."""
    rows: tuple[PlanRow, ...]
    key: str
    """Digest of what the rows do, whatever windows brought them here: equal keys are equal edits."""


class Plan(NamedTuple):
    """A request's rows in canonical order, and their hash."""

    rows: tuple[PlanRow, ...]
    hash: str
    """`sha256:` and 32 hex digits of the canonical rows."""

    @classmethod
    def of(cls, rows: list[PlanRow]) -> "Plan":
        """The canonical plan of these rows; rows that do nothing are dropped."""
        kept = tuple(sorted(row for row in rows if row.alpha or row.beta))
        return cls(kept, _digest(kept))

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
            rows = tuple(sorted(row._replace(window=_ANYWHERE) for row in here))
            if rows:
                segments.append(Segment(lo, hi, rows, _digest(rows)))
        return tuple(segments)

    def wire(self) -> str:
        """The plan as compact JSON text."""
        return json.dumps({"hash": self.hash, "rows": [_plain(row) for row in self.rows]}, separators=(",", ":"))

    @classmethod
    def from_wire(cls, text: str) -> "Plan":
        """The plan of `wire()`.

        Raises:
            InvalidSteering: the text is no plan, or its hash is not that of its rows.
        """
        try:
            document = json.loads(text)
            rows = [
                PlanRow(int(layer), Window(tokens, bool(first)), bundle, source, int(row), float(alpha), float(beta))
                for layer, tokens, first, bundle, source, row, alpha, beta in document["rows"]
            ]
            if not all(math.isfinite(x) for row in rows for x in (row.alpha, row.beta)):
                raise ValueError("a coefficient is not finite")
            plan = cls.of(rows)
            if plan.hash != document["hash"]:
                raise ValueError("the hash does not match the rows")
        except (ValueError, TypeError, KeyError) as e:
            raise InvalidSteering([Violation("trimtab", f"not a plan ({e}); make one with compile_plan")]) from e
        return plan


_ANYWHERE = Window("all", False)


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


def _digest(rows: tuple[PlanRow, ...]) -> str:
    canonical = json.dumps([_plain(row) for row in rows], separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()[:32]


def _plain(row: PlanRow) -> list[Any]:
    return [row.layer, *row.window, *row[2:]]


def compile_plan(steering: Steering, bundles: Mapping[str, Bundle]) -> Plan:
    """The plan of a validated `steering` field; `bundles` maps the names that a request may use to loaded bundles.

    Raises:
        UnknownBundle: a bundle that is not loaded.
        InvalidSteering: a latent or vector outside its bundle, or two operations on one latent.
    """
    edits = steering.edits if steering.edits is not None else _recommended(steering.bundle or "", bundles)
    rows: list[PlanRow] = []
    violations: list[Violation] = []
    seen: dict[tuple[str, int | str], list[tuple[int, Scope]]] = {}
    for i, edit in enumerate(edits):
        where = f"steering.edits[{i}]" if steering.edits is not None else "steering.bundle"
        bundle = _find(edit.bundle, bundles, f"{where}.bundle" if steering.edits is not None else where)
        digest = bundle.content_hash
        key: int | str
        if edit.latent is not None:
            key = edit.latent
            if key not in bundle.row_of:
                violations.append(Violation(f"{where}.latent", _absent("latent", key, edit.bundle, bundle)))
                continue
        else:
            key = edit.vector or ""
            if key not in bundle.vector_of:
                violations.append(Violation(f"{where}.vector", _absent("vector", key, edit.bundle, bundle)))
                continue
        for j, other in seen.get((digest, key), []):
            if edit.operation != "add" and _overlap(edit.scope, other):
                violations.append(
                    Violation(where, f"edits[{j}] already edits {key!r} on the same tokens; keep one of the two")
                )
        if edit.operation != "add":
            seen.setdefault((digest, key), []).append((i, edit.scope))
        rows.append(_row(edit, bundle, digest, steering.strength * edit.strength))
    if violations:
        raise InvalidSteering(violations)
    return Plan.of(rows)


def _recommended(name: str, bundles: Mapping[str, Bundle]) -> tuple[Edit, ...]:
    value_field = {"add": "amount", "clamp": "target", "scale": "factor"}

    def edit(recommended: RecommendedEdit) -> Edit:
        fields = recommended.model_dump(exclude={"amount", "scope"}, exclude_none=True)
        if recommended.amount is not None:
            fields[value_field[recommended.operation]] = recommended.amount
        return Edit(bundle=name, scope=Scope(tokens=recommended.scope), **fields)

    return tuple(edit(recommended) for recommended in _find(name, bundles, "steering.bundle").header.edits)


def _find(name: str, bundles: Mapping[str, Bundle], field: str) -> Bundle:
    if name not in bundles:
        known = ", ".join(sorted(bundles)) or "none"
        raise UnknownBundle(
            f"bundle {name!r} is not loaded (loaded: {known}); GET /v1/steering/bundles lists them", field=field
        )
    return bundles[name]


def _absent(kind: str, key: int | str, name: str, bundle: Bundle) -> str:
    held: list[Any] = sorted(bundle.row_of) if kind == "latent" else sorted(bundle.vector_of)
    shown = ", ".join(map(str, held[:8])) + (", …" if len(held) > 8 else "")
    return (
        f"{kind} {key} is not in bundle {name!r}, which holds {len(held)} ({shown or 'none'}); "
        f"GET /v1/steering/bundles/{name} lists them"
    )


def _overlap(a: Scope, b: Scope) -> bool:
    return "all" in (a.tokens, b.tokens) or a.tokens == b.tokens


def _row(edit: Edit, bundle: Bundle, digest: str, strength: float) -> PlanRow:
    header = bundle.header
    baseline = 0.0
    if edit.latent is not None:
        row = bundle.row_of[edit.latent]
        norm = math.sqrt(float(bundle.decoder[row] @ bundle.decoder[row]))
        per_unit = {"raw": 1.0, "max_act": header.latents[row].max_activation, "resid_norm": header.resid_norm / norm}
        baseline = float(bundle.baseline[row])
    else:
        row = bundle.vector_of[edit.vector or ""]
        norm = math.sqrt(float(bundle.vectors[row] @ bundle.vectors[row]))
        per_unit = {"raw": 1.0, "resid_norm": header.resid_norm / norm}
    alpha, beta = coefficients(
        edit.operation, amount=edit.value * per_unit[edit.unit], strength=strength, baseline=baseline
    )
    source: Literal["latent", "project", "vector", "project_vector"]
    if edit.latent is not None:
        source = "project" if edit.operation == "project" else "latent"
    else:
        source = "project_vector" if edit.operation == "project" else "vector"
    window = Window(edit.scope.tokens, edit.scope.first_token)
    return PlanRow(header.layer, window, digest, source, row, alpha, beta)
