"""Which positions an edit touches: a scope of the request, in one canonical form. Pure.

    positions p with  max(lo, n + lo_end) <= p < min(hi, n + hi_end)      n tokens in the prompt, hence known per request only

Every scope is such a pair of bounds, so the same tokens spelt differently are one window: `completion` is the window that starts
at the prompt's end − 1, and the completion's token j, which is predicted at position n − 1 + j, is the prompt's end + j − 1. Two
windows meet in a window, so whether two edits can ever touch one token is decided exactly, for all prompt lengths at once.
"""

from typing import NamedTuple

from trimtab.server.steering import Scope

__all__ = ["EVERYWHERE", "Window"]


class Window(NamedTuple):
    """A half-open run of positions; None is no such bound."""

    lo: int
    """From the start."""
    lo_end: int | None
    """From the end of the prompt."""
    hi: int | None
    hi_end: int | None

    @classmethod
    def of(cls, scope: Scope) -> "Window":
        """The window of a scope; position 0 is in it only when the scope says so."""
        found = cls(0 if scope.first_token else 1, None, None, None)
        match scope.tokens:
            case "prompt":
                found = found.meet(cls(0, None, None, -1))
            case "completion":
                found = found.meet(cls(0, -1, None, None))
            case "all":
                pass
        if (window := scope.window) is None:
            return found
        match window.origin:
            case "start":
                return found.meet(cls(window.start or 0, None, window.stop, None))
            case "prompt_end":
                return found.meet(cls(0, window.start, None, window.stop))
            case "completion":
                start, stop = (None if j is None else j - 1 for j in (window.start or 0, window.stop))
                return found.meet(cls(0, start, None, stop))

    def meet(self, other: "Window") -> "Window":
        """The positions that are in both, bounds that never bind left out."""
        lo, hi = max(self.lo, other.lo), _least(self.hi, other.hi)
        lo_end = max((x for x in (self.lo_end, other.lo_end) if x is not None), default=None)
        hi_end = _least(self.hi_end, other.hi_end)
        if lo_end is not None and 1 + lo_end >= lo:
            lo = 0
        if hi is not None and hi_end is not None and 1 + hi_end >= hi:
            hi_end = None
        return Window(lo, lo_end, hi, hi_end)

    def bounds(self, n_prompt: int) -> tuple[int, int | None]:
        """[lo, hi) in absolute positions of a request whose prompt has `n_prompt` tokens; hi None is the end."""
        lo = self.lo if self.lo_end is None else max(self.lo, n_prompt + self.lo_end)
        hi = _least(self.hi, None if self.hi_end is None else n_prompt + self.hi_end)
        return lo, None if hi is None else max(lo, hi)

    def example(self) -> int | None:
        """The shortest prompt, in tokens, of which the window holds a position; None if there is none."""
        if self.hi is not None and self.lo >= self.hi:
            return None
        if self.lo_end is not None and self.hi_end is not None and self.lo_end >= self.hi_end:
            return None
        shortest = 1 if self.hi_end is None else max(1, self.lo - self.hi_end + 1)
        if self.hi is not None and self.lo_end is not None and shortest > self.hi - self.lo_end - 1:
            return None
        return shortest


EVERYWHERE = Window(0, None, None, None)


def _least(a: int | None, b: int | None) -> int | None:
    return min((x for x in (a, b) if x is not None), default=None)
