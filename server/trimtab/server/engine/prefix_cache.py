"""The prefix cache: a block's key names the edits on its own positions, and the chain of keys carries those before it.

    block [s, e) of a request   key += ("trimtab", ((lo, hi, segment key), …))   when segments overlap it

So blocks wholly before the first edited position are shared with everybody, and a block is shared between two requests exactly
when the same rows touched the same positions of the same tokens. (A key of the plan's hash alone would be wrong: with scope
`prompt` the answer of one turn is prompt in the next.) An edit at the last layer touches no key or value at all; it is keyed
like any other.
"""

import sys
from functools import partial
from typing import Any

from trimtab.server.engine.proof import KEY
from trimtab.server.engine.wire import segments
from trimtab.server.plan import Segment, block_key

__all__ = ["patch"]

_IMPORTERS = ("vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")
"""Modules that hold the function under its own name; those imported later take it from the first."""


def extra_keys(original: Any, request: Any, start: int, end: int, start_mm: int) -> tuple[tuple[Any, ...] | None, int]:
    """`generate_block_hash_extra_keys` with the edit's key appended."""
    keys, next_mm = original(request, start, end, start_mm)
    found = _segments(request)
    key = block_key(found, start, end)
    return (keys if not key else (*(keys or ()), (KEY, key))), next_mm


def _segments(request: Any) -> tuple[Segment, ...]:
    params = request.sampling_params
    wire = params.extra_args.get(KEY) if params is not None and params.extra_args else None
    return segments(wire, request.num_prompt_tokens) if wire is not None else ()


def patch() -> None:
    """EngineCore: every module's `generate_block_hash_extra_keys` knows edits."""
    from vllm.v1.core import kv_cache_utils

    patched = partial(extra_keys, kv_cache_utils.generate_block_hash_extra_keys)
    for name in _IMPORTERS:
        if name in sys.modules:
            sys.modules[name].generate_block_hash_extra_keys = patched  # type: ignore[attr-defined]
