"""The `vllm.general_plugins` entry point: called by vLLM in the front end, in EngineCore and in every worker."""

from trimtab.server.engine import pin

__all__ = ["register", "registered"]

_registered = False


def registered() -> bool:
    """Whether this process's vLLM is patched."""
    return _registered


def register() -> None:
    """Patch vLLM's classes, once per process.

    Raises:
        Unsupported: another vLLM release than the pinned one.
    """
    global _registered
    if _registered:
        return
    pin.check()
    from trimtab.server.engine import admission, bundles, op, orphan, prefix_cache, proof, ranks, worker

    op.define()
    admission.patch()
    bundles.patch()
    prefix_cache.patch()
    proof.patch_scheduler()
    ranks.patch()
    proof.patch_front_end()
    worker.patch()
    orphan.end_with_parent()
    _registered = True
