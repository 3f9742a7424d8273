"""What was applied, from the worker that applied it to the reply, without an RPC.

    worker      `attach`: counts of the step ride on the `ModelRunnerOutput`
    EngineCore  `Scheduler.update_from_output`: on a request's finishing output they become `kv_transfer_params["trimtab"]`
    front end   `RequestState.make_request_output`: the children of a request with n > 1 are summed

A proof is {"plan": hash, "samples": n, "failure": None or a sentence, "hook_points": {"blocks.14.resid_post": {"prompt_tokens",
"completion_tokens", "cached_prompt_tokens", "max_relative_norm"}}}. Tokens are counted by absolute position, each once however
often it was computed. Position n_prompt − 1 and later are completion tokens; the last sampled token is never run, so with scope
`completion` there are exactly as many as tokens were generated. Cached positions came out of blocks that were edited alike.

Every step's output carries a `Report` of each steered request, for it is not known in the worker which one finishes: packed
arrays, which are read only when a request ends. Drafts of speculative decoding ride in it apart, until the scheduler knows which
were kept.
"""

from typing import Any, NamedTuple

import numpy as np

from trimtab.server.engine.wire import stop
from trimtab.server.errors import NotApplied
from trimtab.server.plan import Plan

__all__ = ["KEY", "Report", "attach", "expected", "merge", "patch_front_end", "patch_scheduler", "settled", "verify"]

KEY = "trimtab"
"""The key of plans in `SamplingParams.extra_args` and of proofs in `kv_transfer_params`."""

_COUNTS = ("prompt_tokens", "completion_tokens", "cached_prompt_tokens")


class Report(NamedTuple):
    """What one worker has applied of one request so far."""

    plan: str
    failure: str | None
    layers: tuple[int, ...]
    """Of the plan, ascending."""
    counts: bytes
    """Tokens by kind and layer, int32 [3, L], in the order of a proof's counts."""
    norms: bytes
    """Largest ‖Δ‖/‖h‖ by layer, float32 [L]."""
    drafts: tuple[tuple[int, int, float], ...]
    """(layer, position, ‖Δ‖/‖h‖) of the last step's edited drafts."""


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
        point = points.get(name, dict.fromkeys(_COUNTS, 0))
        prompt = sum(counts[name][0] for counts in wanted)
        completion = sum(counts[name][1] for counts in wanted)
        got = point["prompt_tokens"] + point["cached_prompt_tokens"]
        if (got, point["completion_tokens"]) != (prompt, completion):
            raise NotApplied(
                f"at {name} the engine edited {got} prompt and {point['completion_tokens']} completion tokens "
                f"where the plan asks for {prompt} and {completion}"
            )


def merge(proofs: list[dict[str, Any]]) -> dict[str, Any]:
    """One proof for several samples of one request: counts are summed, norms maximised, the first failure kept."""
    points: dict[str, dict[str, Any]] = {}
    for proof in proofs:
        for name, point in proof["hook_points"].items():
            total = points.setdefault(name, {**dict.fromkeys(_COUNTS, 0), "max_relative_norm": 0.0})
            for count in _COUNTS:
                total[count] += point[count]
            total["max_relative_norm"] = max(total["max_relative_norm"], point["max_relative_norm"])
    return {
        "plan": proofs[0]["plan"],
        "samples": sum(proof["samples"] for proof in proofs),
        "failure": next((proof["failure"] for proof in proofs if proof["failure"]), None),
        "hook_points": points,
    }


def settled(report: Report, end: int) -> dict[str, Any]:
    """The proof of a report, with the drafts below position `end` counted and the others dropped."""
    counts_KL = np.frombuffer(report.counts, np.int32).reshape(len(_COUNTS), -1)
    norms_L = np.frombuffer(report.norms, np.float32)
    points = {
        f"blocks.{layer}.resid_post": {
            **dict(zip(_COUNTS, counts_KL[:, i].tolist(), strict=True)),
            "max_relative_norm": float(norms_L[i]),
        }
        for i, layer in enumerate(report.layers)
    }
    for layer, at, norm in report.drafts:
        if at < end:
            point = points[f"blocks.{layer}.resid_post"]
            point["completion_tokens"] += 1
            point["max_relative_norm"] = max(point["max_relative_norm"], norm)
    return {"plan": report.plan, "samples": 1, "failure": report.failure, "hook_points": points}


def attach(output: Any, reports: dict[str, Report]) -> None:
    """Put the reports of a step on a `ModelRunnerOutput`: a plain dataclass, pickled with all its attributes."""
    output.trimtab = reports


def patch_scheduler() -> None:
    """EngineCore: finishing outputs carry their request's proof."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler.update_from_output

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        reports: dict[str, Report] = getattr(model_runner_output, "trimtab", None) or {}
        # A stop string is found in the front end, after the fact, and a failure should not wait for the end of a stream: such
        # a request carries its proof on every output.
        watched = {
            r
            for r, report in reports.items()
            if report.failure or ((request := self.requests.get(r)) and request.sampling_params.stop)
        }
        requests = {r: self.requests.get(r) for r in reports}
        result = original(self, scheduler_output, model_runner_output)
        if reports:
            for batch in result.values():
                for output in batch.outputs:
                    report = reports.get(output.request_id)
                    request = requests.get(output.request_id)
                    if report and request and (output.finish_reason is not None or output.request_id in watched):
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
