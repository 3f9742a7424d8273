"""A batch that decodes on is counted as a whole, and its proofs are those of requests that are counted one by one."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.engine.test_edit_state import (
    ALL,
    BOTH,
    COMPLETION,
    LAYERS,
    PROMPT,
    D,
    edit,
    fresh,
    gated,
    plan,
    state,
)
from trimtab.server.engine import edit_state, proof
from trimtab.server.engine.edit_state import EditState
from trimtab.server.engine.proof import Reports
from trimtab.server.engine.steady import Steady

__all__ = ["state"]

PLANS = {
    "all": ALL,
    "prompt": PROMPT,
    "completion": COMPLETION,
    "two layers": plan(edit(), edit(bundle="kind")),
    "one scope each": BOTH,
    "gate": plan(gated(above=0.0)),
    "gate onward": plan(gated("onward", above=0.0, scope="completion")),
}


def forward(state: EditState, requests: list[tuple[str, int, int]], seed: int) -> Any:
    """Run (request, first position, tokens) as one step; what gives its reports."""
    ids, starts, lengths = (list(column) for column in zip(*requests, strict=True))
    state.prepare(ids, starts, lengths)
    g = torch.Generator().manual_seed(seed)
    for layer in LAYERS:
        state.run(layer, torch.randn(sum(lengths), D, generator=g) * 8, None)
    return state.collect()


def proofs(reports: Reports) -> dict[str, Any]:
    return {request: proof.settled(report, 1000) for request, report in reports.items()}


class Batch:
    """Requests that come, decode, are preempted, wait and go, the same in two states."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        self.n_prompt: dict[str, int] = {}
        self.aside: set[str] = set()
        """Requests that no step runs for now."""

    def arrive(self, name: str, n_prompt: int) -> None:
        self.at[name], self.n_prompt[name] = 0, n_prompt

    def step(self) -> list[tuple[str, int, int]]:
        running = [name for name in self.at if name not in self.aside] or list(self.at)
        ran = [(name, self.at[name], max(1, self.n_prompt[name] - self.at[name])) for name in running]
        for name, at, n in ran:
            self.at[name] = at + n
        return ran


@pytest.mark.parametrize("graphs", [False, True], ids=("host", "device"))
@pytest.mark.parametrize("late", [False, True], ids=("at once", "late"))
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from([*PLANS, "none"]), st.integers(1, 4)), min_size=1, max_size=4),
    st.lists(st.sampled_from(["step"] * 8 + ["come", "go", "preempt", "aside"]), max_size=30),
)
def test_counting_together_is_counting_one_by_one(
    graphs: bool, late: bool, first: list[tuple[str, int]], events: list[str]
) -> None:
    """With asynchronous scheduling the reports of a step are made after the next one was prepared (`late`)."""
    told: list[list[dict[str, Any]]] = []
    for together in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(edit_state._log, "exception", pytest.fail)
            if not together:
                patch.setattr(Steady, "after", staticmethod(lambda *_: None))
            state, batch, found = fresh(64, graphs=graphs), Batch(), []
            waiting: Any = None

            def come(name: str, wanted: str, n_prompt: int, state: EditState = state, batch: Batch = batch) -> None:
                if wanted != "none":
                    state.arrive(name, PLANS[wanted].wire(), n_prompt)
                batch.arrive(name, n_prompt)

            for i, (wanted, n_prompt) in enumerate(first):
                come(f"r{i}", wanted, n_prompt)
            for i, event in enumerate(events):
                if event == "come":
                    come(f"late{i}", list(PLANS)[i % len(PLANS)], 3)
                elif event == "go" and len(batch.at) > 1:
                    gone = next(iter(batch.at))
                    state.finish([gone])
                    del batch.at[gone]
                elif event == "aside":
                    batch.aside ^= {next(iter(batch.at))}
                elif event == "preempt":
                    batch.at[next(reversed(batch.at))] = 0
                else:
                    reports = forward(state, batch.step(), seed=i)
                    if waiting is not None:
                        found.append(proofs(waiting()))
                    waiting = reports
                    if not late:
                        found.append(proofs(waiting()))
                        waiting = None
            told.append(found)
    assert told[0] == told[1]


def test_a_batch_that_decodes_on_looks_nothing_up_and_reports_as_one(state: EditState) -> None:
    for name in ("a", "b"):
        state.arrive(name, ALL.wire(), 2)
    forward(state, [("a", 0, 2), ("b", 0, 2)], 0)()
    looked_up: list[Any] = []
    slot = state.tables.slot
    state.tables.slot = lambda segment: looked_up.append(segment) or slot(segment)  # type: ignore[method-assign,func-returns-value]
    sizes = []
    for at in range(2, 6):
        reports = forward(state, [("a", at, 1), ("b", at, 1)], at)()
        sizes.append(len(looked_up))
    assert sizes == [2, 2, 2, 2]
    assert len(reports._together) == 1
    again: Reports = pickle.loads(pickle.dumps(reports))
    assert dict(again) == dict(reports)
    assert len(again) == 2
    for name in again:
        proof.verify(ALL, proof.settled(again[name], 1000), 2, [5])
    with pytest.raises(KeyError):
        again["c"]


@pytest.mark.parametrize("bad", ["nan", "not called"])
def test_a_failure_in_a_steady_step_is_that_requests_alone(state: EditState, bad: str) -> None:
    state.arrive("a", ALL.wire(), 2)
    state.arrive("b", plan(edit(bundle="kind")).wire(), 2)
    forward(state, [("a", 0, 2), ("b", 0, 2)], 0)()
    for at in (2, 3):
        forward(state, [("a", at, 1), ("b", at, 1)], at)()
    state.prepare(["a", "b"], [4, 4], [1, 1])
    hidden = torch.ones(2, D)
    hidden[0] = torch.nan if bad == "nan" else 1.0
    for layer in LAYERS[2:] if bad == "not called" else LAYERS:
        state.run(layer, hidden.clone(), None)
    reports = state.collect()()
    assert ("NaN" if bad == "nan" else "not called") in (reports["a"].failure or "")
    assert reports.failed == ["a"]
    proof.verify(plan(edit(bundle="kind")), proof.settled(reports["b"], 1000), 2, [4])
    reports = forward(state, [("a", 5, 1), ("b", 5, 1)], 5)()
    assert reports.failed == ["a"]
    proof.verify(plan(edit(bundle="kind")), proof.settled(reports["b"], 1000), 2, [5])


def test_a_step_without_the_steered_request_is_no_error(state: EditState, caplog: pytest.LogCaptureFixture) -> None:
    state.arrive("r", ALL.wire(), 2)
    for requests in ([("r", 0, 2), ("a", 0, 1)], [("a", 1, 1)], [("r", 2, 1), ("a", 2, 1)], [("r", 3, 1), ("a", 3, 1)]):
        reports = forward(state, requests, 0)()
    proof.verify(ALL, proof.settled(reports["r"], 1000), 2, [3])
    assert not caplog.records


def test_a_request_of_the_same_name_is_another_one(state: EditState) -> None:
    state.arrive("r", ALL.wire(), 2)
    forward(state, [("r", 0, 2)], 0)()
    for at in (2, 3):
        forward(state, [("r", at, 1)], at)()
    state.finish(["r"])
    state.arrive("r", PROMPT.wire(), 9)
    reports = forward(state, [("r", 4, 1)], 4)()  # its prompt up to here came out of the prefix cache
    counts_KL = np.frombuffer(reports["r"].counts, np.int32).reshape(len(proof.COUNTS), -1)
    assert reports["r"].plan == PROMPT.hash
    assert counts_KL[:3, 0].tolist() == [1, 0, 3]
