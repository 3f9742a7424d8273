"""Admission: a plan is checked in the front end, before the scheduler knows of it, so no worker meets one that it cannot run.

A refusal is vLLM's own `VLLMValidationError`, which its HTTP layer answers with 400.
"""

import math
from collections import Counter
from functools import wraps
from typing import Any, get_args

from trimtab.server.engine import bundles
from trimtab.server.engine.buffers import MAX_ROWS
from trimtab.server.engine.proof import KEY
from trimtab.server.engine.wire import decode
from trimtab.server.errors import InvalidSteering
from trimtab.server.plan import Plan, PlanRow
from trimtab.server.steering import GateMode

__all__ = ["obstacle", "patch", "refusal", "unsteerable", "uses_graphs"]


def obstacle(config: Any) -> str | None:
    """Why an engine of this `VllmConfig` cannot steer at all; None when it can."""
    parallel = config.parallel_config
    if config.model_config.runner_type != "generate":
        return f"the model is served as {config.model_config.runner_type!r}; only text generation can be steered"
    if parallel.world_size > 1 and not _asks_every_rank(parallel.distributed_executor_backend):
        return (
            f"the executor {parallel.distributed_executor_backend!r} brings the output of one rank only, so the others prove "
            "nothing; start with --distributed-executor-backend mp, or with ray and VLLM_USE_RAY_V2_EXECUTOR_BACKEND unset"
        )
    if parallel.enable_dbo:
        return "dual-batch overlap splits the rows of a step; start without --enable-dbo"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "prefill context parallelism re-partitions the rows of a step; start without it"
    if config.cache_config.kv_sharing_fast_prefill:
        return "fast prefill runs the upper layers on part of a step's rows; start without --kv-sharing-fast-prefill"
    if config.speculative_config is not None and config.scheduler_config.async_scheduling:
        return (
            "with asynchronous scheduling a step starts before it is known which drafts of the last one were accepted, so the "
            "proof cannot count them; start with --no-async-scheduling, or without --speculative-config"
        )
    if config.kv_transfer_config is not None:
        return "an external KV store does not see the edit in its keys; start without --kv-transfer-config"
    return None


def _asks_every_rank(backend: Any) -> bool:
    """Whether it is an executor of the kind that `ranks` patches."""
    import vllm.envs

    return backend == "mp" or (backend == "ray" and bool(vllm.envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND))


def refusal(wire: Any, config: Any) -> str | None:
    """Why this plan cannot be served by this engine; None when it can."""
    blocked = obstacle(config)
    if blocked:
        return f"steering is not available on this engine: {blocked}"
    if not isinstance(wire, str):
        return f"the plan must be the string of Plan.wire(), not {type(wire).__name__}"
    try:
        plan = decode(wire)
    except InvalidSteering as e:
        return e.message
    return _misfit(plan, config)


def _misfit(plan: Plan, config: Any) -> str | None:
    known = bundles.loaded()
    model = config.model_config
    n_layers, d_model, longest = model.hf_text_config.num_hidden_layers, model.get_hidden_size(), model.max_model_len
    for row in plan.rows:
        if row.bundle not in known:
            return f"bundle {row.bundle} is not loaded in this engine (loaded: {len(known)}); load it with load_bundle first"
        bundle = known[row.bundle]
        if row.layer != bundle.layer:
            return f"the plan edits layer {row.layer} with bundle {bundle.name!r}, which is for layer {bundle.layer}"
        if bundle.layer >= n_layers or bundle.d_model != d_model:
            return (
                f"bundle {bundle.name!r} is for layer {bundle.layer} of width {bundle.d_model}; this model has "
                f"{n_layers} layers of width {d_model}"
            )
        if row.source not in ("latent", "project", "vector", "project_vector"):
            return f"the plan has a row of source {row.source!r}; make it with compile_plan"
        n = bundle.n_latents if row.source in ("latent", "project") else bundle.n_vectors
        if not 0 <= row.row < n:
            return f"the plan names {row.source} row {row.row} of bundle {bundle.name!r}, which holds {n} (0..{n - 1})"
        if row.source == "vector" and row.beta:
            return f"the plan reads an activation of a dense vector of bundle {bundle.name!r}, which has none"
        if not all(map(math.isfinite, (row.alpha, row.beta))):
            return f"the plan has an impossible row {row}; make it with compile_plan"
        if row.exclude_special and model.skip_tokenizer_init:
            return "this engine has no tokenizer to know special tokens by; start without --skip-tokenizer-init"
        if row.gate is not None and (reason := _gate_misfit(row, known)):
            return reason
        if row.window.lo >= longest:
            return f"the plan edits positions from {row.window.lo} on; this engine stops at {longest}"
    most = max(Counter(row.layer for row in plan.rows).values(), default=0)
    if most > MAX_ROWS and uses_graphs(config):
        return (
            f"the plan has {most} rows at one hook point; with CUDA graphs at most {MAX_ROWS} fit: name fewer, or start "
            "with --enforce-eager"
        )
    return None


def _gate_misfit(row: PlanRow, known: dict[str, bundles.Loaded]) -> str | None:
    gate = row.gate
    if gate is None:
        return None
    if gate.bundle not in known:
        return (
            f"bundle {gate.bundle} is not loaded in this engine (loaded: {len(known)}); load it with load_bundle first"
        )
    bundle = known[gate.bundle]
    if bundle.layer != row.layer or not 0 <= gate.row < bundle.n_latents:
        return (
            f"the plan has a gate on row {gate.row} at layer {row.layer}; bundle {bundle.name!r} holds {bundle.n_latents} "
            f"latents of layer {bundle.layer}"
        )
    if gate.mode not in get_args(GateMode) or not math.isfinite(gate.above):
        return f"the plan has an impossible gate {gate}; make it with compile_plan"
    return None


def uses_graphs(config: Any) -> bool:
    """Whether an engine of this `VllmConfig` computes the edit as a CUDA graph needs it; `{"trimtab": {"graphs": true}}` in
    `additional_config` asks for it where there is no GPU, to test it.
    """
    asked = (config.additional_config or {}).get("trimtab", {}).get("graphs", False)
    return bool(asked) or (config.device_config.device_type != "cpu" and not config.model_config.enforce_eager)


def unsteerable(request: Any) -> str | None:
    """Why this request, as the engine would get it, cannot be steered whatever its plan; None when it can."""
    if request.resumable:
        return "its prompt arrives in pieces, so the plan's positions move under it; send the whole prompt at once"
    if request.prompt_embeds is not None:
        return "its prompt is made of embeddings, whose tokens nobody knows; send text or tokens"
    return None


def patch() -> None:
    """Front end: `InputProcessor` refuses what `refusal` and `unsteerable` refuse."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs

    @wraps(original)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        extra = getattr(params, "extra_args", None) or {}
        if KEY not in extra:
            return original(self, request_id, prompt, params, *args, **kwargs)
        if (reason := refusal(extra[KEY], self.vllm_config)) is not None:
            raise VLLMValidationError(reason, parameter=KEY)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if (reason := unsteerable(request)) is not None:
            raise VLLMValidationError(f"this request cannot be steered: {reason}", parameter=KEY)
        return request

    InputProcessor.process_inputs = process_inputs  # type: ignore[method-assign]
