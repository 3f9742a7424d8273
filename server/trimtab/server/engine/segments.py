"""A plan resolved for one request: disjoint segments of absolute positions, each with one set of rows. Pure.

A segment's digest is canonical in its rows alone, so requests of different prompt lengths share slots and cache blocks wherever
the same rows touch the same positions, and nowhere else.
"""

import hashlib
import json
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from trimtab.server.plan import Plan, PlanRow

__all__ = ["END", "Segment", "block_key", "decode", "segments"]

END = 1 << 62
"""Stands for "no end": larger than any position."""


class Segment(NamedTuple):
    """Positions [lo, hi) on which exactly `rows` apply."""

    lo: int
    hi: int
    rows: tuple[PlanRow, ...]
    digest: str
    """Canonical in the rows without their windows."""


@lru_cache(maxsize=1024)
def decode(wire: str) -> Plan:
    """`Plan.from_wire`, remembered: one plan serves many requests."""
    return Plan.from_wire(wire)


@lru_cache(maxsize=4096)
def segments(plan: Plan, n_prompt: int) -> tuple[Segment, ...]:
    """The non-empty segments of a plan for a prompt of `n_prompt` tokens, ascending."""
    spans = []
    for row in plan.rows:
        lo, hi = row.window.bounds(n_prompt)
        spans.append((lo, END if hi is None else hi, row))
    cuts = sorted({cut for lo, hi, _ in spans if lo < hi for cut in (lo, hi)})
    found: list[Segment] = []
    for lo, hi in pairwise(cuts):
        rows = tuple(row for a, b, row in spans if a <= lo and hi <= b)
        if not rows:
            continue
        digest = _digest(rows)
        if found and found[-1].hi == lo and found[-1].digest == digest:
            found[-1] = found[-1]._replace(hi=hi)
        else:
            found.append(Segment(lo, hi, rows, digest))
    return tuple(found)


def block_key(found: tuple[Segment, ...], start: int, end: int) -> str | None:
    """What names the edits on positions [start, end) of a cache block; None when no position in it is edited.

    The chain of block hashes carries the edits of earlier blocks, so this names only the block's own.
    """
    parts = [
        f"{max(s.lo, start) - start}-{min(s.hi, end) - start}:{s.digest}" for s in found if s.lo < end and start < s.hi
    ]
    return ";".join(parts) or None


def _digest(rows: tuple[PlanRow, ...]) -> str:
    canonical = sorted((row.layer, *row[2:]) for row in rows)
    return hashlib.sha256(json.dumps(canonical, separators=(",", ":"), allow_nan=False).encode()).hexdigest()[:32]
