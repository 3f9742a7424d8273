"""A batch that decodes on: the same requests as in the step before, each a token further in the same segment, or still in none.

Its layout stays, and what such a step counts is known; so nothing is looked up again, and all is counted at once. It is most of
what a worker does.
"""

from collections.abc import Mapping, Sequence

from trimtab.server.engine.counting import Block, Count, Group, Request
from trimtab.server.engine.wire import stop

__all__ = ["Steady"]


class Steady:
    """What the steps have in common. A request that comes or goes ends it."""

    def __init__(
        self, request_ids: Sequence[str], starts: Sequence[int], step: Sequence[tuple[str, Request]], left: int
    ) -> None:
        self.step = step
        """The steered requests among them."""
        self._request_ids, self._starts, self._ones = list(request_ids), list(starts), [1] * len(starts)
        self._left = left
        """So many steps until one of them comes to an edge of its segments."""
        self.counts: list[Count] = []
        self.blocks: list[Block | None] = []
        """Of the layout's groups."""

    @staticmethod
    def after(
        request_ids: Sequence[str],
        starts: Sequence[int],
        lengths: Sequence[int],
        step: Sequence[tuple[str, Request]],
        groups: Sequence[Group],
        counts: Sequence[Count],
    ) -> "Steady | None":
        """What may follow a step with these spans; None when that is not known."""
        if not step or any(n != 1 for n in lengths):
            return None
        at = dict(zip(request_ids, starts, strict=True))
        left = min(_edge(request, at[request_id]) - at[request_id] - 1 for request_id, request in step)
        recent = all(request.high_water == at[r] + 1 and at[r] + 2 >= request.n_prompt for r, request in step)
        if left <= 0 or not recent or any(request.failure is not None for _, request in step):
            return None
        steady = Steady(request_ids, starts, step, left)
        steady.counts = [Count(count.request, 0, 0, 1, range(0)) for count in counts]
        ids = {id(request): request_id for request_id, request in step}
        members = [(ids[id(count.request)], count.request) for count in counts]
        steady.blocks = [Block.of(group, [members[i] for i in group.members]) for group in groups]
        return steady

    def goes_on(
        self, request_ids: Sequence[str], starts: Sequence[int], lengths: Sequence[int], drafts: Mapping[str, int]
    ) -> bool:
        """Whether this step is the next one; it is taken."""
        if self._left <= 0 or drafts or list(lengths) != self._ones or list(request_ids) != self._request_ids:
            return False
        following = [start + 1 for start in self._starts]
        if list(starts) != following or any(request.failure is not None for _, request in self.step):
            return False
        self._starts = following
        self._left -= 1
        for _, request in self.step:
            request.high_water += 1
            request.drafted = request.high_water
        return True


def _edge(request: Request, at: int) -> int:
    """The first position beyond `at` where a segment begins or ends."""
    edges = (edge for segment in request.segments for edge in (segment.lo, stop(segment)) if edge > at)
    return min(edges, default=at + 2**31)
