"""What was applied, from the worker that applied it to the reply, without an RPC.

    worker      `attach`: counts of the step ride on the `ModelRunnerOutput`
    EngineCore  `ranks`: those of all ranks are put together
                `Scheduler.update_from_output`: on a request's finishing output they become `kv_transfer_params["trimtab"]`
    front end   `RequestState.make_request_output`: the children of a request with n > 1 are summed

A proof is {"plan": hash, "samples": n, "failure": None or a sentence, "hook_points": {"blocks.14.resid_post": {…}}}, and of a
hook point

    prompt_tokens, completion_tokens   positions in the scope of an edit, run by this request; each once however often it was
                                       computed. From n_prompt − 1 on they are completion tokens; the last sampled token is never
                                       run, so with scope `completion` there are exactly as many as tokens were generated
    cached_prompt_tokens               positions in scope out of cache blocks that were edited alike; at the last layer, whose
                                       edits touch no key or value, out of any block: there was nothing left to edit
    gate_firings, special_tokens       of the positions that were run: a gate was open; an edit left alone a special token
    max_, mean_relative_norm           ‖Δ‖/‖h‖ over the positions that were run; 0 where no gate was open

The first three are exact, and compared with the plan. What the gates found is told, not judged: a plan whose gate never opened
is applied, and its proof says 0.

Every step's output carries the `Reports` on its steered requests, for it is not known in the worker which one finishes: packed
arrays, one for all of a batch that decodes on, which are read only when a request ends. Drafts of speculative decoding ride in
them apart, until the scheduler knows which were kept.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from trimtab.server.engine.wire import stop
from trimtab.server.errors import NotApplied
from trimtab.server.plan import Plan

__all__ = [
    "COUNTS",
    "GATE",
    "KEY",
    "SPECIAL",
    "Report",
    "Reports",
    "Together",
    "attach",
    "combined",
    "expected",
    "merge",
    "patch_front_end",
    "patch_scheduler",
    "settled",
    "verify",
]

KEY = "trimtab"
"""The key of plans in `SamplingParams.extra_args` and of proofs in `kv_transfer_params`."""

COUNTS = ("prompt_tokens", "completion_tokens", "cached_prompt_tokens", "gate_firings", "special_tokens")


GATE, SPECIAL = 1, 2
"""Flags of an edited row: a gate was open on it; an edit left it alone because its token is special."""


class Report(NamedTuple):
    """What one worker has applied of one request so far."""

    plan: str
    failure: str | None
    layers: tuple[int, ...]
    """Of the plan, ascending."""
    counts: bytes
    """By kind and layer, int32 [K, L], in the order of `COUNTS`."""
    norms: bytes
    """Largest and summed ‖Δ‖/‖h‖ by layer, float64 [2, L]."""
    drafts: tuple[tuple[int, int, float, int], ...]
    """(layer, position, ‖Δ‖/‖h‖, flags) of the last step's edited drafts."""


class Together(NamedTuple):
    """Of requests whose counts one worker keeps in one array; none has failed or drafts."""

    requests: tuple[str, ...]
    plans: tuple[str, ...]
    layers: tuple[int, ...]
    counts: bytes
    """int32 [P, K, L]."""
    norms: bytes
    """float64 [P, 2, L]."""

    def report(self, i: int) -> Report:
        """Of one of them."""
        return Report(self.plans[i], None, self.layers, self._part(self.counts, i), self._part(self.norms, i), ())

    def _part(self, array: bytes, i: int) -> bytes:
        n = len(array) // len(self.requests)
        return array[i * n : (i + 1) * n]


class Reports(Mapping[str, Report]):
    """What one worker tells after a step, by request."""

    def __init__(self, apart: dict[str, Report] | None = None, together: tuple[Together, ...] = ()) -> None:
        self._apart = apart or {}
        self._together = together

    @property
    def failed(self) -> list[str]:
        """The requests whose report is of a failure."""
        return [request for request, report in self._apart.items() if report.failure]

    def __getitem__(self, request: str) -> Report:
        if request in self._apart:
            return self._apart[request]
        for some in self._together:
            if request in some.requests:
                return some.report(some.requests.index(request))
        raise KeyError(request)

    def __iter__(self) -> Iterator[str]:
        return chain(self._apart, *(some.requests for some in self._together))

    def __len__(self) -> int:
        return len(self._apart) + sum(len(some.requests) for some in self._together)


def expected(plan: Plan, n_prompt: int, n_completion: int) -> dict[str, tuple[int, int]]:
    """Hook point → (prompt, completion) tokens that a plan must have edited, cached ones included."""
    end = n_prompt - 1 + n_completion
    counts: dict[str, tuple[int, int]] = {f"blocks.{layer}.resid_post": (0, 0) for layer in plan.layers}
    for segment in plan.segments(n_prompt):
        lo, hi = segment.lo, min(stop(segment), end)
        if lo >= hi:
            continue
        prompt = max(0, min(hi, n_prompt - 1) - lo)
        for layer in {row.layer for row in segment.rows}:
            p, c = counts[f"blocks.{layer}.resid_post"]
            counts[f"blocks.{layer}.resid_post"] = (p + prompt, c + (hi - lo) - prompt)
    return counts


def verify(plan: Plan, proof: dict[str, Any] | None, n_prompt: int, n_completions: list[int]) -> None:
    """Nothing, when the proof shows the whole plan applied; `n_completions` are the lengths of the samples.

    Raises:
        NotApplied: no proof, a failure in the worker, another plan, or a token that was not edited.
    """
    if proof is None:
        raise NotApplied(
            "the engine returned no proof of steering for this request; check that its workers run the plugin"
        )
    if proof.get("failure"):
        raise NotApplied(f"the engine could not apply the plan: {proof['failure']}")
    if proof.get("plan") != plan.hash:
        raise NotApplied(f"the engine applied plan {proof.get('plan')}, not {plan.hash}")
    if proof.get("samples") != len(n_completions):
        raise NotApplied(f"the engine proved {proof.get('samples')} samples of {len(n_completions)}")
    wanted = [expected(plan, n_prompt, n) for n in n_completions]
    points: dict[str, dict[str, Any]] = proof.get("hook_points", {})
    for layer in plan.layers:
        name = f"blocks.{layer}.resid_post"
        point = points.get(name, dict.fromkeys(COUNTS, 0))
        prompt = sum(counts[name][0] for counts in wanted)
        completion = sum(counts[name][1] for counts in wanted)
        got = point["prompt_tokens"] + point["cached_prompt_tokens"]
        if (got, point["completion_tokens"]) != (prompt, completion):
            raise NotApplied(
                f"at {name} the engine edited {got} prompt and {point['completion_tokens']} completion tokens "
                f"where the plan asks for {prompt} and {completion}"
            )


def merge(proofs: list[dict[str, Any]]) -> dict[str, Any]:
    """One proof for several samples of one request: counts are summed, norms combined, the first failure kept."""
    points: dict[str, list[dict[str, Any]]] = {}
    for proof in proofs:
        for name, point in proof["hook_points"].items():
            points.setdefault(name, []).append(point)
    return {
        "plan": proofs[0]["plan"],
        "samples": sum(proof["samples"] for proof in proofs),
        "failure": next((proof["failure"] for proof in proofs if proof["failure"]), None),
        "hook_points": {
            name: {count: sum(point[count] for point in found) for count in COUNTS} | combined(found)
            for name, found in points.items()
        },
    }


def combined(points: Collection[Mapping[str, Any]]) -> dict[str, float]:
    """The largest ‖Δ‖/‖h‖ of these points, and the mean over all their tokens."""
    weights = [point["prompt_tokens"] + point["completion_tokens"] for point in points]
    total = math.fsum(point["mean_relative_norm"] * n for point, n in zip(points, weights, strict=True))
    return {
        "max_relative_norm": max((point["max_relative_norm"] for point in points), default=0.0),
        "mean_relative_norm": total / max(1, sum(weights)),
    }


def settled(report: Report, end: int) -> dict[str, Any]:
    """The proof of a report, with the drafts below position `end` counted and the others dropped."""
    counts_KL = np.frombuffer(report.counts, np.int32).reshape(len(COUNTS), -1).copy()
    norms_2L = np.frombuffer(report.norms, np.float64).reshape(2, -1).copy()
    for layer, at, norm, flags in report.drafts:
        if at < end:
            i = report.layers.index(layer)
            counts_KL[:, i] += (0, 1, 0, bool(flags & GATE), bool(flags & SPECIAL))
            norms_2L[:, i] = max(norms_2L[0, i], norm), norms_2L[1, i] + norm
    points = {}
    for i, layer in enumerate(report.layers):
        prompt, completion, *_ = counts = counts_KL[:, i].tolist()
        largest, total = norms_2L[:, i].tolist()
        norms = {"max_relative_norm": largest, "mean_relative_norm": total / max(1, prompt + completion)}
        points[f"blocks.{layer}.resid_post"] = dict(zip(COUNTS, counts, strict=True)) | norms
    return {"plan": report.plan, "samples": 1, "failure": report.failure, "hook_points": points}


def attach(output: Any, reports: Reports) -> None:
    """Put the reports of a step on a `ModelRunnerOutput`: a plain dataclass, pickled with all its attributes. One rank's: see
    `ranks` for several."""
    output.trimtab = [reports]


def patch_scheduler() -> None:
    """EngineCore: finishing outputs carry their request's proof."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from trimtab.server.engine.ranks import assembled

    original = Scheduler.update_from_output

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        by_rank: list[Reports] | None = getattr(model_runner_output, KEY, None)
        if not by_rank:
            return original(self, scheduler_output, model_runner_output)
        requests = self.requests.copy()  # those that end are not there any more afterwards
        failed = {r for reports in by_rank for r in reports.failed}
        result = original(self, scheduler_output, model_runner_output)
        parallel = self.parallel_config
        for batch in result.values():
            for output in batch.outputs:
                request = requests.get(output.request_id)
                # A stop string is found in the front end, after the fact, and a failure should not wait for the end of a
                # stream: such a request carries its proof on every output.
                if request is None or not (
                    output.finish_reason is not None or request.sampling_params.stop or output.request_id in failed
                ):
                    continue
                if any(output.request_id in reports for reports in by_rank):
                    n_ranks, n_tensor = parallel.world_size, parallel.tensor_parallel_size
                    report = assembled(by_rank, output.request_id, n_ranks, n_tensor)
                    # The last token is never run, and what was sampled beyond the end is no longer the request's.
                    proof = settled(report, request.num_tokens - 1)
                    output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: proof}
        return result

    Scheduler.update_from_output = update_from_output  # type: ignore[method-assign]


def patch_front_end() -> None:
    """Front end: the proofs of a request's children (n > 1) are merged on the parent's outputs."""
    from vllm.v1.engine.output_processor import RequestState

    original = RequestState.make_request_output

    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.parent_req is not None and kv_transfer_params and KEY in kv_transfer_params:
            children: dict[str, dict[str, Any]] = self.parent_req.__dict__.setdefault(KEY, {})
            children[self.request_id] = kv_transfer_params[KEY]
            kv_transfer_params = {**kv_transfer_params, KEY: merge(list(children.values()))}
        return original(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, kv_transfer_params, *args, **kwargs
        )

    RequestState.make_request_output = make_request_output  # type: ignore[method-assign]
