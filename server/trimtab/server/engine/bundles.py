"""Loading bundles into every worker, and the front end's list of what is loaded.

The bytes of the bundle's file travel, never a path: workers may run on other nodes. The front end admits a plan only when its
bundles are listed here, and lists a bundle only after every worker has confirmed its content hash.

    async   await load_bundle(engine_client, bundle);  await unload_bundle(engine_client, content_hash)
    sync    register_bundle(llm, bundle)                the same for the offline `vllm.LLM`
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.attribution.bundle import Bundle
from trimtab.server.errors import Unsupported

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.protocol import EngineClient

__all__ = ["Loaded", "load_bundle", "loaded", "register_bundle", "unload_bundle"]


class Loaded(NamedTuple):
    """What admission needs to know of a loaded bundle."""

    name: str
    layer: int
    d_model: int
    n_latents: int
    n_vectors: int


_loaded: dict[str, Loaded] = {}


def loaded() -> dict[str, Loaded]:
    """The bundles that every worker of this process's engine holds, by content hash."""
    return dict(_loaded)


async def load_bundle(engine: "EngineClient", bundle: Bundle) -> str:
    """The content hash of a bundle that is now in every worker; loading it again changes nothing.

    Raises:
        Unsupported: a worker cannot hold it (no plugin, another width or depth, a layer that cannot be hooked).
    """
    _confirm(await engine.collective_rpc("trimtab_load_bundle", args=(bundle.to_bytes(),)), bundle)
    return bundle.content_hash


async def unload_bundle(engine: "EngineClient", content_hash: str) -> None:
    """Forget a bundle: new plans that name it are refused at once; requests that run on it fail closed."""
    _loaded.pop(content_hash, None)
    await engine.collective_rpc("trimtab_unload_bundle", args=(content_hash,))


def register_bundle(llm: "LLM", bundle: Bundle) -> str:
    """`load_bundle` for the offline `vllm.LLM`."""
    _confirm(llm.collective_rpc("trimtab_load_bundle", args=(bundle.to_bytes(),)), bundle)
    return bundle.content_hash


def _confirm(answers: list[Any], bundle: Bundle) -> None:
    for answer in answers:
        if answer != bundle.content_hash:
            raise Unsupported(f"bundle {bundle.header.name!r} cannot be loaded: {answer}")
    header = bundle.header
    _loaded[bundle.content_hash] = Loaded(
        header.name, header.layer, header.model.d_model, len(header.latents), len(header.vectors)
    )
