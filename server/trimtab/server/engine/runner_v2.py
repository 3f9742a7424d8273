"""Adapter to vLLM's V2 model runner (`v1/worker/gpu/model_runner.py`), the default on CUDA.

Run on the CPU through Triton's interpreter, where steered and unsteered requests, mixed, equal transformers; not yet on a GPU.

    finish_requests          requests go; preempted ones come back through add_requests, and keep their tallies meanwhile
    add_requests             NewRequestData.prompt_len stays the prompt's length when a preempted request returns
    gather_batch_req_state   the rows of the step, in batch order, before graph dispatch; dummy runs give no batch
    sample_tokens            the step's proofs ride on its output

Where there are CUDA graphs, both variants of each (`graphs`):

    initialize_kv_cache      makes the graph manager, once for profiling and once to stay
"""

from typing import Any

from torch import Tensor

from trimtab.server.engine.device_path import DevicePath
from trimtab.server.engine.edit_state import EditState
from trimtab.server.engine.runner_v1 import arrivals, hand_over, require

__all__ = ["install", "token_ids"]


def install(runner: Any, state: EditState) -> None:
    """Wrap the methods of this runner instance."""
    require(
        runner,
        "finish_requests",
        "add_requests",
        "gather_batch_req_state",
        "sample_tokens",
        "req_states",
    )
    finish_requests, add_requests = runner.finish_requests, runner.add_requests
    gather, sample_tokens = runner.gather_batch_req_state, runner.sample_tokens

    def _finish_requests(scheduler_output: Any) -> Any:
        state.finish(scheduler_output.finished_req_ids)
        return finish_requests(scheduler_output)

    def _add_requests(scheduler_output: Any) -> Any:
        arrivals(scheduler_output, state)
        return add_requests(scheduler_output)

    def _gather(scheduler_output: Any, dummy_run: bool) -> Any:
        batch, uniform = gather(scheduler_output, dummy_run)
        if batch is None:
            state.idle()
        elif not state.rests:
            starts = runner.req_states.num_computed_tokens_np[batch.idx_mapping_np]
            drafts = {r: len(ids) for r, ids in scheduler_output.scheduled_spec_decode_tokens.items()}
            state.prepare(batch.req_ids, starts.tolist(), batch.num_scheduled_tokens.tolist(), drafts)
        return batch, uniform

    def _sample_tokens(grammar_output: Any) -> Any:
        return hand_over(sample_tokens(grammar_output), state)

    state.token_ids = token_ids(runner)
    runner.finish_requests = _finish_requests
    runner.add_requests = _add_requests
    runner.gather_batch_req_state = _gather
    runner.sample_tokens = _sample_tokens
    if state.path is not None:
        _fork(runner, state.path)


def token_ids(runner: Any) -> Tensor:
    """The persistent buffer that the model reads its tokens from.

    Raises:
        Unsupported: there is none.
    """
    require(runner, "input_buffers")
    ids: Tensor = runner.input_buffers.input_ids
    return ids


def _fork(runner: Any, path: DevicePath) -> None:
    from trimtab.server.engine.graphs import fork_manager, lora_cases

    require(runner, "initialize_kv_cache", "lora_capture_cases")
    cases, initialize_kv_cache = runner.lora_capture_cases, runner.initialize_kv_cache
    runner.lora_capture_cases = lora_cases(cases)

    def _initialize_kv_cache(*args: Any, **kwargs: Any) -> Any:
        result = initialize_kv_cache(*args, **kwargs)
        fork_manager(runner.cudagraph_manager, path, cases)
        return result

    runner.initialize_kv_cache = _initialize_kv_cache
