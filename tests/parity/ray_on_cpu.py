"""The Ray executor on two local Ray nodes, with CPU workers: run as a program, prints what it found; `make test-ray`.

    python -m tests.parity.ray_on_cpu pipeline_parallel_size

vLLM's CPU platform names no Ray resource (`ray_device_key` is empty), and so `--distributed-executor-backend ray` is refused on a
CPU. Nothing else of the executor needs a GPU. This program gives the platform the name of one, and each Ray node one GPU that is
not there; all else is vLLM's own: the executor, its placement, its message queues over TCP and shared memory, its actors.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

N_CASES, N_TOKENS = 48, 8


def pretend() -> None:
    """Give the CPU platform a Ray resource, in the driver and, as Ray's set-up hook, in every actor's process."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


def compare(folder: Path, shape: str) -> dict[str, Any]:
    """The generated cases over two nodes, beside transformers."""
    import ray
    from ray.cluster_utils import Cluster

    from tests.parity import tiny
    from tests.parity.engine import Engine
    from tests.parity.reference import Reference
    from trimtab.server.engine import proof

    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(cluster.address, runtime_env={"worker_process_setup_hook": f"{__spec__.name}.pretend"})
    tiny.save(folder)
    engine = Engine(
        folder,
        tiny.bundles(),
        distributed_executor_backend="ray",
        max_model_len=256,
        num_gpu_blocks_override=256,
        **{shape: 2},
    )
    cases = tiny.cases(N_CASES)
    answers = engine.ask([(list(prompt), plan) for prompt, plan in cases], n_tokens=N_TOKENS)
    reference = Reference(folder)
    reference.special = tiny.SPECIAL
    by_hash = {bundle.content_hash: bundle for bundle in tiny.bundles().values()}
    same, worst = True, 0.0
    for (prompt, plan), answer in zip(cases, answers, strict=True):
        expected = reference(plan, by_hash, list(prompt), answer.tokens)
        same &= answer.tokens == expected.tokens
        worst = max(worst, *(abs(a - b) for a, b in zip(answer.logprobs, expected.logprobs, strict=True)))
        if plan is not None:
            proof.verify(plan, answer.proof, len(prompt), [N_TOKENS])
    executor: Any = engine.llm.llm_engine.model_executor
    found = {
        "executor": type(executor).__name__,
        "nodes": len({handle.node_id for handle in executor.ray_worker_handles}),
        "layers": [report["layers"] for report in engine.reports],
        "requests": len(cases),
        "same": same,
        "worst": worst,
    }
    executor.shutdown()
    ray.shutdown()
    cluster.shutdown()
    return found


if __name__ == "__main__":
    # In this very process the engine core knows what `pretend` did.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    os.environ |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    pretend()
    with tempfile.TemporaryDirectory() as temporary:
        result = compare(Path(temporary), sys.argv[1])
    sys.stdout.write(f"\n{sys.argv[1]}: {json.dumps(result)}\n")
    if (result["executor"], result["nodes"], result["same"]) != ("RayExecutorV2", 2, True) or result["worst"] > 1e-4:
        raise SystemExit("two Ray nodes do not answer as transformers does")
