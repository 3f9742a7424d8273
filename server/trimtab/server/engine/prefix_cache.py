"""The prefix cache: a block's key names the edits on its own positions, and the chain of keys carries those before it.

    block [s, e) of a request   key += ("trimtab", ((lo, hi, segment key), …))      when segments overlap it
                                key += ("trimtab.request", a word of its own)       when one of them is gated `onward`

So blocks wholly before the first edited position are shared with everybody, and a block is shared between two requests exactly
when the same rows touched the same positions of the same tokens. (A key of the plan's hash alone would be wrong: with scope
`prompt` the answer of one turn is prompt in the next.)

An edit at the last layer touches no key or value, so it is in no block's key. A gate of mode `onward` must see every position of
its scope, whose blocks are therefore shared with no other request; a request that was preempted finds its own again, and the
worker remembers where its gates opened.
"""

import sys
from functools import partial, wraps
from typing import Any
from uuid import uuid4

from trimtab.server.engine.proof import KEY
from trimtab.server.engine.wire import segments, stop
from trimtab.server.plan import Segment, block_key

__all__ = ["patch"]

_IMPORTERS = ("vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")
"""Modules that hold the function under its own name; those imported later take it from the first."""


last_layers: set[int] = set()
"""Of the models whose schedulers run in this process; the last layer's edits are keyed all the same unless that is one."""


def extra_keys(original: Any, request: Any, start: int, end: int, start_mm: int) -> tuple[tuple[Any, ...] | None, int]:
    """`generate_block_hash_extra_keys` with the edit's key appended."""
    keys, next_mm = original(request, start, end, start_mm)
    found = _segments(request)
    key = block_key(found, start, end)
    if not key:
        return keys, next_mm
    own = (
        ((f"{KEY}.request", _word(request)),)
        if any(s.is_onward and s.lo < end and start < stop(s) for s in found)
        else ()
    )
    return (*(keys or ()), (KEY, key), *own), next_mm


def _segments(request: Any) -> tuple[Segment, ...]:
    params = request.sampling_params
    wire = params.extra_args.get(KEY) if params is not None and params.extra_args else None
    if wire is None:
        return ()
    return segments(wire, request.num_prompt_tokens, max(last_layers) if len(last_layers) == 1 else None)


def _word(request: Any) -> str:
    """A word that no other request has; ids may be a client's choice, and come again."""
    word: str = request.__dict__.setdefault(f"_{KEY}_word", uuid4().hex)
    return word


def patch() -> None:
    """EngineCore: every module's `generate_block_hash_extra_keys` knows edits."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler

    init = Scheduler.__init__

    @wraps(init)
    def started(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        last_layers.add(vllm_config.model_config.hf_text_config.num_hidden_layers - 1)
        init(self, vllm_config, *args, **kwargs)

    Scheduler.__init__ = started  # type: ignore[method-assign]
    patched = partial(extra_keys, kv_cache_utils.generate_block_hash_extra_keys)
    for name in _IMPORTERS:
        if name in sys.modules:
            sys.modules[name].generate_block_hash_extra_keys = patched  # type: ignore[attr-defined]
