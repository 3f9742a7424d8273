"""How many functions a decode step of a real engine calls, and how many more with steering: exact, whatever the machine does.

Counted by Python's profiler in one process that runs front end, engine core and worker. Plain is vLLM without the plugin, in a
process of its own; `aside` is the other engine with its plugin aside, as in `within`, which is measured by it. A call is short,
so this is no time; but what is not called takes none.

The program prints its finding; `step_calls` runs it.
"""

import os
import statistics
import sys
from typing import Any

from tests.bench.conditions import CELLS, plan, prompts
from tests.bench.engines import sampling, vllm
from tests.bench.within import EDITS, ENVIRONMENT, Turns, worker_of
from tests.parity.program import found, say
from trimtab.server.engine.proof import KEY

__all__ = ["step_calls"]

FIRST, N_STEPS = 8, 9
"""Of a run's steps: where counting begins, and how many are counted."""


def step_calls() -> dict[str, dict[str, float]]:
    """By condition, `plain` and `aside` among them, the calls of the model's `forward` and of all of a step: medians over the
    steps."""
    plain = found("tests.bench.calls", **ENVIRONMENT | {"VLLM_PLUGINS": ""})
    return plain | found("tests.bench.calls", **ENVIRONMENT)


class _Counts:
    """The calls of each step of a run, and of those in the model's forward."""

    def __init__(self, llm: Any) -> None:
        self.steps: list[tuple[int, int]] = []
        self._n = self._in_forward = 0
        runner = worker_of(llm).model_runner
        step, forward = llm.llm_engine.step, runner._model_forward

        def counted() -> Any:
            self._n = 0
            sys.setprofile(self._count)
            try:
                return step()
            finally:
                sys.setprofile(None)
                self.steps.append((self._in_forward, self._n))

        def counted_forward(*args: Any, **kwargs: Any) -> Any:
            before = self._n
            try:
                return forward(*args, **kwargs)
            finally:
                self._in_forward = self._n - before

        llm.llm_engine.step, runner._model_forward = counted, counted_forward

    def _count(self, _frame: Any, event: str, _arg: Any) -> None:
        self._n += event in ("call", "c_call")

    def end(self) -> dict[str, float]:
        """Medians of the run that ended."""
        forward, everything = zip(*self.steps[FIRST : FIRST + N_STEPS], strict=True)
        self.steps.clear()
        return {"forward": statistics.median(forward), "step": statistics.median(everything)}


def main() -> int:
    """Runs each condition once and prints its counts; plain vLLM, where the environment names no plugin, has but one."""
    cell = CELLS["turns-16"]._replace(n_tokens=FIRST + N_STEPS + 1)
    steers = bool(os.environ["VLLM_PLUGINS"])
    llm = vllm(steers=steers)
    turns = Turns(llm) if steers else None
    counts = _Counts(llm)
    called = {}
    for name, edit in ({"aside": None, **EDITS} if turns else {"plain": None}).items():
        if turns:
            turns.step_aside(name == "aside")
        extras = [None if edit is None else {KEY: plan(edit, i).wire()} for i in range(cell.n)]
        asked: Any = [{"prompt_token_ids": ids} for ids in prompts(cell, name, 0)]
        llm.generate(asked, sampling(cell, extras), use_tqdm=False)
        called[name] = counts.end()
    say(called)
    return 0


if __name__ == "__main__":
    sys.exit(main())
