"""Loading bundles into every worker while the engine runs, and the front end's list of what is loaded.

    async   await load_bundle(engine, bundle);   retire_bundle(content_hash);   await release_bundle(engine, …) → bool
    sync    register_bundle(llm, bundle);         unregister_bundle(llm, content_hash) → bool

The bytes of the bundle's file travel, never a path: workers may run on other nodes. The front end admits a plan only when its
bundles are listed here, and lists a bundle only after every worker has confirmed its content hash.

A plan in flight keeps its rows, also one that was admitted by name and is on its way: a retired bundle is refused only when such
plans have had time to arrive. Its rows go when no request that waits or runs names it any more, which EngineCore decides between
two steps: it knows them all. It looks through its requests, so there is no count that could leak when one of them ends badly.
"""

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.attribution.bundle import Bundle
from trimtab.server.engine.probe import PROBE
from trimtab.server.engine.proof import KEY
from trimtab.server.errors import Unsupported

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.protocol import EngineClient

__all__ = [
    "Loaded",
    "everywhere",
    "load_bundle",
    "loaded",
    "patch",
    "register_bundle",
    "release_bundle",
    "retire_bundle",
    "unregister_bundle",
    "users",
]

_ADMITTED_SECONDS = 1.0
"""A request that was admitted just before its bundle was retired reaches the engine within this time, or is refused there."""
_POLL_SECONDS = 0.1


class Loaded(NamedTuple):
    """What admission needs to know of a loaded bundle."""

    name: str
    layer: int
    d_model: int
    n_latents: int
    n_vectors: int


_loaded: dict[str, Loaded] = {}
_wanted: set[str] = set()
"""Bundles that are listed or on their way into the workers: these are not released."""


def loaded() -> dict[str, Loaded]:
    """The bundles that every worker of this process's engine holds, by content hash."""
    return dict(_loaded)


async def load_bundle(engine: "EngineClient", bundle: Bundle) -> str:
    """The content hash of a bundle that is now in every worker; loading it again changes nothing.

    Raises:
        Unsupported: a worker cannot hold it (no plugin, another width or depth, a layer that cannot be hooked).
    """
    data = await asyncio.to_thread(bundle.to_bytes)
    _wanted.add(bundle.content_hash)
    try:
        _confirm(await everywhere(engine, "collective_rpc", "trimtab_load_bundle", None, (data,)), bundle)
    except BaseException:
        _wanted.discard(bundle.content_hash)
        raise
    return bundle.content_hash


def retire_bundle(content_hash: str) -> None:
    """Let nobody name a bundle any more, then call this; `release_bundle` refuses its plans and drops its rows."""
    _wanted.discard(content_hash)


async def release_bundle(engine: "EngineClient", content_hash: str) -> bool:
    """Whether the rows of a retired bundle are gone, after the last request that names it; False if it was loaded again."""
    await asyncio.sleep(_ADMITTED_SECONDS)
    # Messages to EngineCore are answered in order: a bundle that is loaded again while a release is under way is there after it.
    while content_hash not in _wanted:
        _loaded.pop(content_hash, None)
        if all(await everywhere(engine, "trimtab_release", content_hash)):
            return True
        await asyncio.sleep(_POLL_SECONDS)
    return False


def register_bundle(llm: "LLM", bundle: Bundle) -> str:
    """`load_bundle` for the offline `vllm.LLM`."""
    _confirm(llm.collective_rpc("trimtab_load_bundle", args=(bundle.to_bytes(),)), bundle)
    _wanted.add(bundle.content_hash)
    return bundle.content_hash


def unregister_bundle(llm: "LLM", content_hash: str) -> bool:
    """Whether the bundle is gone; False while a request still uses it, and then only new plans are refused: call it again."""
    _wanted.discard(content_hash)
    _loaded.pop(content_hash, None)
    core: Any = llm.llm_engine.engine_core
    if hasattr(core, "call_utility"):
        return bool(core.call_utility("trimtab_release", content_hash))
    return bool(core.engine_core.trimtab_release(content_hash))  # EngineCore in this very process.


def users(requests: Any, content_hash: str) -> list[str]:
    """Ids of the scheduler's requests, waiting ones included, whose plan or probe names the bundle."""
    found = []
    for request in requests:
        params = request.sampling_params
        extra = (params.extra_args or {}) if params is not None else {}
        if any(isinstance(wire := extra.get(key), str) and content_hash in wire for key in (KEY, PROBE)):
            found.append(str(request.request_id))
    return found


def patch() -> None:
    """EngineCore: `trimtab_release` drops a bundle's rows in every worker, unless a request names it."""
    from vllm.v1.engine.core import EngineCore

    def release(self: Any, content_hash: str) -> bool:
        if users(self.scheduler.requests.values(), content_hash):
            return False
        return all(self.collective_rpc("trimtab_unload_bundle", args=(content_hash,)))

    EngineCore.trimtab_release = release  # type: ignore[attr-defined]


async def everywhere(engine: "EngineClient", method: str, *args: Any) -> list[Any]:
    """The answers of every worker: vLLM's own `collective_rpc` tells those of the first data-parallel rank alone."""
    core: Any = getattr(engine, "engine_core", None)
    if core is None or not hasattr(core, "call_utility_all_async"):
        raise Unsupported(f"{type(engine).__name__} does not reach every worker of its engine; use vLLM's AsyncLLM")
    answers: list[Any] = await core.call_utility_all_async(method, *args)
    return [answer for part in answers for answer in part] if method == "collective_rpc" else answers


def _confirm(answers: list[Any], bundle: Bundle) -> None:
    for answer in answers:
        if answer != bundle.content_hash:
            raise Unsupported(f"bundle {bundle.header.name!r} cannot be loaded: {answer}")
    header = bundle.header
    _loaded[bundle.content_hash] = Loaded(
        header.name, header.layer, header.model.d_model, len(header.latents), len(header.vectors)
    )
