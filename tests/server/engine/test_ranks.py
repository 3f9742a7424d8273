"""What several ranks applied is one proof when they act as one, and a failure when they do not."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trimtab.server.engine.proof import COUNTS, KEY, Report, Reports, settled
from trimtab.server.engine.ranks import Apart, Gather, Steered, assembled

SAME = np.ones(len(COUNTS), np.int32)


def report(*layers: int, norm: float = 0.5, counts: Any = SAME, drafts: Any = (), **changes: Any) -> Report:
    counts_KL = np.repeat(np.asarray(counts, np.int32)[:, None], len(layers), axis=1)
    norms_2L = np.full((2, len(layers)), norm)
    return Report("sha256:p", None, layers, counts_KL.tobytes(), norms_2L.tobytes(), drafts)._replace(**changes)


def proof(*reports: Report | None, n_ranks: int | None = None, n_tensor: int = 1) -> dict[str, Any]:
    by_rank = [Reports({} if found is None else {"r": found}) for found in reports]
    return settled(assembled(by_rank, "r", n_ranks or len(reports), n_tensor), 100)


def test_the_report_of_one_rank_is_the_proof() -> None:
    assert proof(report(1, 2)) == settled(report(1, 2), 100)


def test_the_layers_of_all_stages_are_in_the_proof() -> None:
    first, second = report(0, 1), report(3, norm=0.25, counts=2 * SAME, drafts=((3, 7, 0.75, 0), (3, 200, 9.0, 0)))
    found = proof(first, second)
    assert found["failure"] is None
    assert list(found["hook_points"]) == [f"blocks.{layer}.resid_post" for layer in (0, 1, 3)]
    point = found["hook_points"]["blocks.3.resid_post"]
    assert (point["prompt_tokens"], point["completion_tokens"], point["max_relative_norm"]) == (2, 3, 0.75)


def test_a_stage_without_an_edited_layer_adds_nothing() -> None:
    assert proof(report(0, 1), report()) == proof(report(0, 1))


def test_tensor_parallel_ranks_that_agree_are_one() -> None:
    assert proof(report(1), report(1), n_tensor=2) == proof(report(1))
    # Fabrics that sum in another order on each rank differ in rounding.
    assert proof(report(1), report(1, norm=0.5001), n_tensor=2)["failure"] is None


@pytest.mark.parametrize(
    "other",
    [
        report(1, counts=2 * SAME),
        report(1, norm=0.51),
        report(1, norm=float("nan")),
        report(2),
        report(1, plan="sha256:q"),
        report(1, drafts=((1, 7, 0.5, 0),)),
    ],
    ids=["counts", "norms", "nan", "layers", "plan", "drafts"],
)
@pytest.mark.parametrize("stage", [0, 1])
def test_tensor_parallel_ranks_that_differ_fail_the_request(other: Report, stage: int) -> None:
    reports = [report(5), report(5), report(5), report(5)]
    reports[2 * stage : 2 * stage + 2] = report(1), other
    found = proof(*reports, n_tensor=2)
    assert found["failure"] == f"tensor-parallel ranks 0 and 1 of pipeline stage {stage} did not edit alike"


@pytest.mark.parametrize(
    ("reports", "n_ranks", "failure"),
    [
        ([report(0), None], 2, "1 of 2 ranks told what they applied"),
        ([report(0)], 2, "1 of 2 ranks told what they applied"),
        ([report(0), report(0)], 1, "2 of 1 ranks"),
        ([report(0), report(0)], 2, "two pipeline stages edited one layer"),
        ([report(0), report(1, plan="sha256:q")], 2, "different plans"),
        ([report(0), report(1, failure="the sky fell")], 2, "the sky fell"),
        ([None, report(1, failure="the sky fell")], 2, "the sky fell"),
    ],
)
def test_what_is_not_the_work_of_all_ranks_fails_the_request(
    reports: list[Report | None], n_ranks: int, failure: str
) -> None:
    assert failure in proof(*reports, n_ranks=n_ranks)["failure"]


class Output:
    """As much of a `ModelRunnerOutput` as carries reports."""

    def __init__(self, *reports: Reports) -> None:
        if reports:
            self.trimtab = list(reports)


def test_reports_are_gathered_by_rank_onto_the_output_that_is_read() -> None:
    mine, theirs = Reports({"r": report(2)}), Reports({"r": report(0)})
    output = Gather().aggregate([Output(theirs), None, Output(), Output(mine)], output_rank=3)
    assert output.trimtab == [theirs, {}, {}, mine]
    assert Gather().aggregate([Output(theirs), None], output_rank=1) is None


def test_a_rank_that_samples_nothing_answers_with_an_output_of_its_own() -> None:
    """vLLM returns one and the same empty output there: a report put on it would ride on every later step."""
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    output: Any = Apart(lambda: Reports({"r": report(0)})).get_output()
    assert output.trimtab == [{"r": report(0)}]
    assert output is not EMPTY_MODEL_RUNNER_OUTPUT
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, KEY)


def scheduled(*running: str, new: tuple[tuple[str, Any], ...] = (), finished: tuple[str, ...] = ()) -> Any:
    """A step, as far as it says whose tokens it runs."""
    requests = [SimpleNamespace(req_id=r, sampling_params=SimpleNamespace(extra_args=extra)) for r, extra in new]
    return SimpleNamespace(
        scheduled_new_reqs=requests, finished_req_ids=set(finished), num_scheduled_tokens=dict.fromkeys(running, 1)
    )


def test_every_rank_is_asked_in_steps_that_run_a_steered_request_alone() -> None:
    steered = Steered()
    assert not steered.follow(scheduled("a", new=(("a", None),)))
    assert steered.follow(scheduled("a", "b", new=(("b", {KEY: "{}"}),)))
    assert not steered.follow(scheduled("a"))  # b is preempted, or its prompt is under way in another step
    assert steered.follow(scheduled("b"))
    assert not steered.follow(scheduled(finished=("b",)))
    assert not steered.follow(scheduled("b", new=(("b", None),)))
