"""What every rank applied: brought to the scheduler, compared, and put together to one report of the whole model.

    worker      a rank whose output nobody reads answers with its reports alone (`Apart`)
    EngineCore  the executor asks every rank, not the output rank alone, for the output of a step with steered requests;
                `assembled` makes one report of theirs: ranks of one pipeline stage must say the same, its stages add up

Rank = stage · n_tensor + tensor rank, as vLLM numbers the workers of one engine. A step without steered requests is answered by
one rank, as without the plugin.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from trimtab.server.engine.proof import COUNTS, KEY, Report, Reports, attach

__all__ = ["Apart", "Gather", "Steered", "assembled", "patch"]

NORM_TOLERANCE = 1e-3
"""Of ‖Δ‖/‖h‖ between the ranks of a stage, relative. They add the same parts of h, on some fabrics in another order."""

ByRank = Sequence[Mapping[str, Report]]
"""Request → what the rank has applied of it, by rank."""


class Apart(AsyncModelRunnerOutput):
    """The output of a rank that samples nothing which is read: its reports, once its device is done."""

    def __init__(self, reports: Callable[[], Reports]) -> None:
        self._reports = reports

    def get_output(self) -> ModelRunnerOutput:
        """An empty output that carries the reports."""
        output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
        attach(output, self._reports())
        return output


class Gather:
    """Puts the reports of all ranks on the output of one; an aggregator as those of vLLM's KV connectors."""

    def aggregate(self, outputs: Sequence[Any], output_rank: int = 0) -> Any:
        """The output of that rank, with the reports by rank."""
        spoken = outputs[output_rank]
        if spoken is not None:
            spoken.trimtab = list(chain.from_iterable(getattr(output, KEY, None) or (Reports(),) for output in outputs))
        return spoken


class Steered:
    """The steered requests of an executor: those that carry a plan and have not ended."""

    def __init__(self) -> None:
        self._requests: set[str] = set()

    def follow(self, scheduler_output: Any) -> bool:
        """Whether the step that begins runs a steered request."""
        self._requests.difference_update(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            extra = new.sampling_params.extra_args if new.sampling_params is not None else None
            if extra and KEY in extra:
                self._requests.add(new.req_id)
        return bool(self._requests) and not self._requests.isdisjoint(scheduler_output.num_scheduled_tokens)


def assembled(by_rank: ByRank, request_id: str, n_ranks: int, n_tensor: int) -> Report:
    """What all ranks together have applied of a request; its failure says so if they did not act as one."""
    found = [report for reports in by_rank if (report := reports.get(request_id)) is not None]
    if len(by_rank) == n_ranks == len(found) == 1:
        return found[0]
    failure = next((report.failure for report in found if report.failure), None)
    if len(by_rank) != n_ranks or len(found) != n_ranks:
        return _one(found, failure or f"{len(found)} of {n_ranks} ranks told what they applied")
    stages = [found[i : i + n_tensor] for i in range(0, n_ranks, n_tensor)]
    for stage, peers in enumerate(stages):
        for tensor_rank, peer in enumerate(peers):
            if failure is None and not _alike(peers[0], peer):
                failure = f"tensor-parallel ranks 0 and {tensor_rank} of pipeline stage {stage} did not edit alike"
    firsts = [peers[0] for peers in stages]
    layers = [layer for report in firsts for layer in report.layers]
    if failure is None and (len(set(layers)) < len(layers) or len({report.plan for report in firsts}) > 1):
        failure = "two pipeline stages edited one layer, or different plans"
    return _one(firsts, failure)


def _alike(a: Report, b: Report) -> bool:
    if (a.plan, a.layers, a.counts) != (b.plan, b.layers, b.counts) or len(a.drafts) != len(b.drafts):
        return False
    if a.norms == b.norms and a.drafts == b.drafts:
        return True
    norms_a, norms_b = (np.concatenate([np.frombuffer(r.norms), [draft[2] for draft in r.drafts]]) for r in (a, b))
    places_a, places_b = ([(layer, at, flags) for layer, at, _, flags in r.drafts] for r in (a, b))
    return places_a == places_b and np.allclose(norms_a, norms_b, rtol=NORM_TOLERANCE, atol=1e-6)


def _one(reports: Sequence[Report], failure: str | None) -> Report:
    """The reports side by side: their layers ascend from stage to stage."""

    def joined(arrays: Iterable[bytes], dtype: Any, n_rows: int) -> bytes:
        return np.concatenate([np.frombuffer(array, dtype).reshape(n_rows, -1) for array in arrays], axis=1).tobytes()

    return Report(
        reports[0].plan,
        failure,
        tuple(layer for report in reports for layer in report.layers),
        joined((report.counts for report in reports), np.int32, len(COUNTS)),
        joined((report.norms for report in reports), np.float64, 2),
        tuple(draft for report in reports for draft in report.drafts),
    )


def patch() -> None:
    """EngineCore: executors of several ranks ask all of them for the output of a step with steered requests."""
    execute_model, sample_tokens = MultiprocExecutor.execute_model, MultiprocExecutor.sample_tokens

    def _execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self.world_size > 1:
            steered: Steered = self.__dict__.setdefault("_trimtab_steered", Steered())
            self._trimtab_gathers = steered.follow(scheduler_output)
        return execute_model(self, scheduler_output, *args, **kwargs)

    def _sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "_trimtab_gathers", False):
            return sample_tokens(self, *args, **kwargs)
        # It is read while the call is made, so what was there may come back before the answer does.
        before, self.kv_output_aggregator = self.kv_output_aggregator, Gather()
        try:
            return sample_tokens(self, *args, **kwargs)
        finally:
            self.kv_output_aggregator = before

    MultiprocExecutor.execute_model = _execute_model  # type: ignore[method-assign]
    MultiprocExecutor.sample_tokens = _sample_tokens  # type: ignore[method-assign]
