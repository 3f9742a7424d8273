"""Two variants of every CUDA graph, so that a step without edits launches nothing: one captured with the operator's kernels, and
one without.

The variant is part of the key that vLLM captures and replays a graph by, as the number of active LoRA adapters is:

    V1   `BatchDescriptor`              the steered twin is of a subclass: the same fields, another key
    V2   `BatchExecutionDescriptor`     the steered twin counts `num_active_loras` from above the largest real count

A step that must run without one (`DevicePath.graphless`) is dispatched to none.

Both dispatch after the rows of the step are known (`DevicePath.armed`), and both capture each key of either kind. A graph of the
wrong variant would edit nothing or write no ratio; ratios are cleared to −1 before each steered step, so the reply fails closed.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from trimtab.server.engine.device_path import DevicePath

__all__ = ["SteeredBatch", "fork_dispatcher", "fork_manager", "lora_cases"]


@dataclass(frozen=True)
class SteeredBatch(BatchDescriptor):
    """The key of a graph with the operator's kernels; never equal to a `BatchDescriptor`."""


def fork_dispatcher(dispatcher: Any, path: DevicePath) -> None:
    """Give a V1 `CudagraphDispatcher` both variants of each key; must come before its keys are made."""
    add, dispatch = dispatcher.add_cudagraph_key, dispatcher.dispatch

    def _add(runtime_mode: CUDAGraphMode, batch_descriptor: BatchDescriptor) -> None:
        add(runtime_mode, batch_descriptor)
        add(runtime_mode, _twin(batch_descriptor))

    def _dispatch(*args: Any, **kwargs: Any) -> tuple[CUDAGraphMode, BatchDescriptor]:
        if path.graphless:
            kwargs |= {"valid_modes": {CUDAGraphMode.NONE}, "invalid_modes": None}
        mode, batch = dispatch(*args, **kwargs)
        return mode, batch if mode == CUDAGraphMode.NONE or not path.armed else _twin(batch)

    dispatcher.add_cudagraph_key, dispatcher.dispatch = _add, _dispatch


def lora_cases(cases: list[int]) -> list[int]:
    """V2's capture cases with their steered twins."""
    return [*cases, *(n + _offset(cases) for n in cases)]


def fork_manager(manager: Any, path: DevicePath, cases: list[int]) -> None:
    """Make a V2 `CudaGraphManager` pick and capture both variants; `cases` are those before `lora_cases`."""
    offset, dispatch, capture = _offset(cases), manager.dispatch, manager.capture

    def _dispatch(num_reqs: int, num_tokens: int, *args: Any, num_active_loras: int, **kwargs: Any) -> Any:
        shift = offset if path.armed else 0
        batch = dispatch(num_reqs, num_tokens, *args, num_active_loras=num_active_loras + shift, **kwargs)
        if path.graphless:
            batch = replace(
                batch,
                cg_mode=CUDAGraphMode.NONE,
                num_tokens=num_tokens,
                num_reqs=num_reqs,
                uniform_token_count=None,
                max_query_len=None,
            )
        # Without a graph the batch is an ordinary one.
        return replace(batch, num_active_loras=num_active_loras) if batch.cg_mode == CUDAGraphMode.NONE else batch

    def _capture(*args: Any, lora_capture_hook: Any = None, **kwargs: Any) -> None:
        def hook(num_active_loras: int, num_reqs: int, num_tokens: int) -> None:
            path.capturing = num_active_loras >= offset
            if lora_capture_hook is not None:
                lora_capture_hook(num_active_loras % offset, num_reqs, num_tokens)

        try:
            capture(*args, lora_capture_hook=hook, **kwargs)
        finally:
            path.capturing = None

    manager.dispatch, manager.capture = _dispatch, _capture


def _twin(batch: BatchDescriptor) -> SteeredBatch:
    return SteeredBatch(**{field.name: getattr(batch, field.name) for field in fields(batch)})


def _offset(cases: list[int]) -> int:
    return max(cases) + 1
