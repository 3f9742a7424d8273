"""Plans as they ride in `SamplingParams.extra_args`, decoded and resolved once: one plan serves many requests. Pure."""

from functools import lru_cache

from trimtab.server.plan import Plan, Segment

__all__ = ["END", "decode", "segments", "stop"]

END = 1 << 62
"""Stands for "no end": larger than any position."""


@lru_cache(maxsize=1024)
def decode(wire: str) -> Plan:
    """`Plan.from_wire`.

    Raises:
        InvalidSteering: the text is no plan.
    """
    return Plan.from_wire(wire)


@lru_cache(maxsize=4096)
def segments(
    wire: str, n_prompt: int, without: int | None = None, only: tuple[int, ...] | None = None
) -> tuple[Segment, ...]:
    """`Plan.segments` of a plan on the wire; the edits of layer `without` are left out, but for gates that stay open, and those
    of other layers than `only`."""
    plan = decode(wire)
    if only is not None and only != plan.layers:
        plan = Plan.of(row for row in plan.rows if row.layer in only)
    if without in plan.layers:
        plan = Plan.of(row for row in plan.rows if row.layer != without or row.is_onward)
    return plan.segments(n_prompt)


def stop(segment: Segment) -> int:
    """The end of a segment as a number."""
    return END if segment.hi is None else segment.hi
