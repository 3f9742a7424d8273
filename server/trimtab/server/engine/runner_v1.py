"""Adapter to vLLM's V1 model runner (`v1/worker/gpu_model_runner.py`): the one that runs on CPU, and the fallback on CUDA.

Methods of the runner's instance are wrapped, never of its class:

    _update_states    requests come and go; also in steps without tokens, which never reach _prepare_inputs
    _prepare_inputs   the rows of the step: req_ids in batch order, absolute positions from num_computed_tokens_cpu
    sample_tokens     the step's proofs ride on its output
    _dummy_run        profiling and warm-up edit nothing

Where there are CUDA graphs, both variants of each (`graphs`): the dispatcher's keys, and

    _warmup_and_capture    the graph that is captured next is that of its key
"""

from typing import Any

from torch import Tensor

from trimtab.server.engine.device_path import DevicePath
from trimtab.server.engine.edit_state import EditState
from trimtab.server.engine.probe import PROBE
from trimtab.server.engine.proof import KEY, Reports, attach
from trimtab.server.errors import Unsupported

__all__ = ["arrivals", "hand_over", "install", "require", "token_ids"]


def install(runner: Any, state: EditState) -> None:
    """Wrap the methods of this runner instance."""
    require(runner, "_update_states", "_prepare_inputs", "sample_tokens", "_dummy_run", "input_batch")
    update_states, prepare_inputs = runner._update_states, runner._prepare_inputs
    sample_tokens, dummy_run = runner.sample_tokens, runner._dummy_run
    on_host = runner.device.type == "cpu"

    def _update_states(scheduler_output: Any) -> Any:
        if scheduler_output.finished_req_ids:
            state.finish(scheduler_output.finished_req_ids)
        if scheduler_output.scheduled_new_reqs:
            arrivals(scheduler_output, state)
        return update_states(scheduler_output)

    def _prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        if not state.rests:
            batch = runner.input_batch
            n = batch.num_reqs
            starts = batch.num_computed_tokens_cpu[:n].tolist()
            drafts = {r: len(ids) for r, ids in scheduler_output.scheduled_spec_decode_tokens.items()}
            state.prepare(batch.req_ids[:n], starts, num_scheduled_tokens.tolist(), drafts)
        return prepare_inputs(scheduler_output, num_scheduled_tokens)

    def _sample_tokens(grammar_output: Any) -> Any:
        generators = runner.input_batch.generators
        held = _unsampled(runner, generators) if generators and on_host else {}
        try:
            output = sample_tokens(grammar_output)
        finally:
            generators.update(held)
        return hand_over(output, state)

    def _dummy_run(*args: Any, **kwargs: Any) -> Any:
        state.idle()
        return dummy_run(*args, **kwargs)

    state.token_ids = token_ids(runner)
    runner._update_states = _update_states
    runner._prepare_inputs = _prepare_inputs
    runner.sample_tokens = _sample_tokens
    runner._dummy_run = _dummy_run
    if state.path is not None:
        _fork(runner, state.path)


def token_ids(runner: Any) -> Tensor:
    """The persistent buffer that the model reads its tokens from.

    Raises:
        Unsupported: there is none.
    """
    require(runner, "input_ids")
    ids: Tensor = runner.input_ids.gpu
    return ids


def _unsampled(runner: Any, generators: dict[int, Any]) -> dict[int, Any]:
    """The generators of requests in mid-prefill, taken out of the batch: what is sampled for these is thrown away.

    vLLM lets them sample and then winds their generators back by an offset, which those of a CPU do not have: a request with a
    seed whose prompt takes more than one step would end the engine.
    """
    discarded = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    return {i: generators.pop(i) for i in list(generators) if discarded[i]}


def _fork(runner: Any, path: DevicePath) -> None:
    from trimtab.server.engine.graphs import SteeredBatch, fork_dispatcher

    require(runner, "_warmup_and_capture", "cudagraph_dispatcher")
    fork_dispatcher(runner.cudagraph_dispatcher, path)
    warmup_and_capture = runner._warmup_and_capture

    def _warmup_and_capture(desc: Any, *args: Any, **kwargs: Any) -> None:
        path.capturing = isinstance(desc, SteeredBatch)
        try:
            warmup_and_capture(desc, *args, **kwargs)
        finally:
            path.capturing = None

    runner._warmup_and_capture = _warmup_and_capture


def require(runner: Any, *names: str) -> None:
    """Nothing, when the runner has all that is wrapped.

    Raises:
        Unsupported: it has not.
    """
    for name in names:
        if not hasattr(runner, name):
            raise Unsupported(
                f"{type(runner).__name__} has no {name}, which trimtab wraps; install the pinned vLLM release"
            )


def arrivals(scheduler_output: Any, state: EditState) -> None:
    """Tell the state of requests that carry a plan or a probe."""
    for new in scheduler_output.scheduled_new_reqs:
        extra = new.sampling_params.extra_args if new.sampling_params is not None else None
        if extra and KEY in extra:
            state.arrive(new.req_id, extra[KEY], new.prompt_len)
        if extra and PROBE in extra:
            state.probes.arrive(new.req_id, extra[PROBE], new.prompt_len)


def hand_over(output: Any, state: EditState) -> Any:
    """The runner's output with the step's reports; on an asynchronous one they are put when its result is taken."""
    reports = state.collect()
    if reports is Reports or output is None:
        return output
    if not state.speaks:
        from trimtab.server.engine.ranks import Apart  # an engine of one rank needs none

        return Apart(reports)
    if not hasattr(output, "get_output"):
        attach(output, reports())
        return output
    get_output = output.get_output

    def _get_output() -> Any:
        result = get_output()
        attach(result, reports())
        return result

    output.get_output = _get_output
    return output
