"""What steering adds to the steps of a real engine, within one process: it takes turns with itself.

Two processes of one plain vLLM differ for as long as they live, by as much as idle's bar is about and more (pages.py). So here
one engine runs, and every few steps the plugin steps aside: the runner's own methods, no hook on any layer, nothing prepared
and nothing reported. What is left of it then is a look for arrivals and for reports, microseconds. The first steps of a turn
are not counted, for the other one has left its traces in them; a stretch of steered steps is held against the two beside it.

A step is timed in three parts: before the model's forward, in it and the logits, and elsewhere after it. The model is nearly all
of a step and as restless as the machine's memory; what is around it is Python, and shows hundredths of a millisecond.

The program prints its finding; `within_seconds` runs it.
"""

import statistics
import sys
import time
from typing import Any, NamedTuple

from tests.bench.conditions import CELLS, plan, prompts, turned
from tests.bench.engines import sampling, vllm
from tests.parity.program import found, say
from trimtab.server.engine.proof import KEY

__all__ = ["EDITS", "ENVIRONMENT", "Step", "Turns", "within_seconds", "worker_of"]

EDITS = {"idle": None, "add": "add", "clamp8": "clamp8", "add30": "add30"}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "trimtab",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",  # as the worker computes in the other cells, and so that its CPU time is that of one thread
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
N_RUNS, TURN, LEFT_OUT = 24, 4, 2
"""Of 64 tokens each; steps; of these, the first ones."""


class Step(NamedTuple):
    """CPU seconds of a step of the engine."""

    before: float
    """Scheduling, and preparing the batch."""
    model: float
    """Its forward and its logits."""
    after: float
    """Sampling and the step's output."""

    @property
    def around(self) -> float:
        """All but the model's."""
        return self.before + self.after


def within_seconds() -> dict[str, list[list[list[float]]]]:
    """By condition, (plain, steered) mean steps of each stretch of steered ones, as JSON has a `Step`."""
    return found("tests.bench.within", **ENVIRONMENT)


def worker_of(llm: Any) -> Any:
    """The worker of an engine that is one process."""
    return llm.llm_engine.model_executor.driver_worker.worker


class Turns:
    """An engine whose plugin works and steps aside by turns, and what each step took."""

    def __init__(self, llm: Any) -> None:
        self._worker = worker_of(llm)
        self._runner = self._worker.model_runner
        self._wrapped = {name: vars(self._runner)[name] for name in ("_prepare_inputs", "sample_tokens")}
        self.aside = False
        self.took: list[tuple[bool, Step]] = []
        """(whether it had stepped aside, what it took) of each step of the run."""

    def time(self, llm: Any) -> None:
        """Take turns from now on, and time each step."""
        step, model = llm.llm_engine.step, self._runner.model
        calls: list[tuple[float, float]] = []

        def noted(function: Any) -> Any:
            def called(*args: Any, **kwargs: Any) -> Any:
                begun = time.thread_time()
                try:
                    return function(*args, **kwargs)
                finally:
                    calls.append((begun, time.thread_time()))

            return called

        def timed() -> Any:
            self.step_aside((len(self.took) // TURN) % 2 == 1)
            calls.clear()
            start = time.thread_time()
            outputs = step()
            end = time.thread_time()
            before = (calls[0][0] if calls else end) - start
            of_model = sum(done - begun for begun, done in calls)
            self.took.append((self.aside, Step(before, of_model, end - start - before - of_model)))
            return outputs

        self._runner._model_forward = noted(self._runner._model_forward)
        model.compute_logits = noted(model.compute_logits)
        llm.llm_engine.step = timed

    def step_aside(self, aside: bool) -> None:
        """The plugin steps aside, or works again."""
        if aside == self.aside:
            return
        self.aside = aside
        state = self._worker.trimtab.state
        for name, method in self._wrapped.items():
            if aside:
                delattr(self._runner, name)
            else:
                setattr(self._runner, name, method)
        if aside:
            state.prepare((), (), ())

    def end(self) -> list[tuple[Step, Step]]:
        """(plain, steered) mean steps, of each stretch of steered steps between plain ones, of the run that ended."""
        stretches = []
        for start in range(0, len(self.took) - TURN + 1, TURN):
            part = self.took[start + LEFT_OUT : start + TURN]
            stretches.append((part[0][0], _mean([step for _, step in part])))
        self.took.clear()
        self.step_aside(aside=False)
        return [
            (_mean([before, after]), steered)
            for (_, before), (aside, steered), (_, after) in zip(stretches, stretches[1:], stretches[2:], strict=False)
            if not aside
        ]


def _mean(steps: list[Step]) -> Step:
    return Step(*(statistics.mean(part) for part in zip(*steps, strict=True)))


def main() -> int:
    """Runs all conditions, in an order that rotates, and prints what they took."""
    cell = CELLS["turns-16"]
    llm = vllm(steers=True)
    turns = Turns(llm)
    turns.time(llm)
    took: dict[str, list[tuple[Step, Step]]] = {name: [] for name in EDITS}
    for run in range(N_RUNS):
        for name in turned(list(EDITS), run):
            edit = EDITS[name]
            extras = [None if edit is None else {KEY: plan(edit, i).wire()} for i in range(cell.n)]
            asked: Any = [{"prompt_token_ids": ids} for ids in prompts(cell, name, run)]
            llm.generate(asked, sampling(cell, extras), use_tqdm=False)
            took[name] += turns.end()
    say(took)
    return 0


if __name__ == "__main__":
    sys.exit(main())
