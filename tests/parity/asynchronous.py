"""Asynchronous scheduling in the real engine on the host, beside transformers: run as a program, prints its findings.

    python -m tests.parity.asynchronous

Step k + 1 is scheduled and prepared before the tokens of step k are known. vLLM turns this off on a CPU as "not required"; here
it is turned on again. What the runner asks of CUDA is a stream to copy on and an event to wait for: on the host everything has
happened already, and vLLM's own stand-ins for streams on a CPU do nothing either.
"""

import contextlib
import os
from typing import Any

import torch

from tests.parity.cases import PROMPTS, STEERED, UNSTEERED, Case
from tests.parity.generated import cases
from tests.parity.program import say
from tests.parity.rows import bundles

N_GENERATED = 40
N_TOKENS = 24


class Done:
    """A stream, or an event, of a device that has done everything already."""

    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass


def turn_on() -> None:
    """The environment and the patches of this process, before vLLM is imported."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = Done
    cuda.current_stream = Done
    cuda.stream = lambda _: contextlib.nullcontext()
    from vllm.platforms.cpu import CpuPlatform

    check: Any = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[assignment]


def compare() -> dict[str, Any]:
    """Cases of every kind in one batch that outgrows its cache, beside transformers."""
    from tests.parity.engine import Engine
    from tests.parity.reference import Reference
    from trimtab.server.engine.proof import verify

    engine = Engine(num_gpu_blocks_override=20, max_model_len=256, max_num_seqs=12, disable_log_stats=False)
    core: Any = engine.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    chosen: list[Case] = [*UNSTEERED, *STEERED, *cases()[:N_GENERATED]]
    by_hash = {bundle.content_hash: bundle for bundle in bundles().values()}
    answers = engine.ask([(PROMPTS.get(case.prompt, case.prompt), case.plan) for case in chosen], n_tokens=N_TOKENS)
    reference = Reference()
    worst, different = 0.0, []
    for case, answer in zip(chosen, answers, strict=True):
        wanted = reference(case.plan, by_hash, answer.prompt, answer.tokens)
        worst = max(worst, *(abs(a - b) for a, b in zip(answer.logprobs, wanted.logprobs, strict=True)))
        if answer.tokens != wanted.tokens:
            different.append(case.name)
        if case.plan is not None:
            verify(case.plan, answer.proof, len(answer.prompt), [len(answer.tokens)])
    # A request that stops by itself: the step after its last is under way already, and must not be counted.
    plan = next(case.plan for case in chosen if case.name == "two layers")
    assert plan is not None
    for params in (
        {"ignore_eos": False, "stop_token_ids": answers[0].tokens[3:4]},
        {"stop": ["the"]},
        {"max_tokens": 1},
    ):
        (answer,) = engine.ask([(PROMPTS["long"], plan)], n_tokens=60, **params)
        verify(plan, answer.proof, len(answer.prompt), [len(answer.tokens)])
    engine.ask([(PROMPTS["one"], None)], n_tokens=1)  # its step tells the worker that the one before has ended
    (report,) = engine.llm.collective_rpc("trimtab_handshake")
    metrics: Any = engine.llm.get_metrics()
    return {
        "scheduler": type(core.scheduler).__name__,
        "batches_at_once": core.batch_queue_size,
        "requests": len(chosen),
        "different": different,
        "worst": worst,
        "preemptions": sum(int(m.value) for m in metrics if m.name == "vllm:num_preemptions"),
        "in_use": [report[name] for name in ("requests", "slots", "gates")],
    }


if __name__ == "__main__":
    turn_on()
    say(compare())
