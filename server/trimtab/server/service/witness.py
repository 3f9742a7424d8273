"""The witness: stands where vLLM's serving code expects the engine client, for one steered request, and keeps each proof.

The proof arrives in `kv_transfer_params` of the outputs. vLLM passes that on to non-streaming replies only, and for one prompt
only, so it is taken here, where every output passes; it never reaches a reply's body as it is.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from trimtab.server.engine.proof import KEY
from trimtab.server.errors import NotApplied
from trimtab.server.service.admission import OnFailure
from trimtab.server.service.applied import Run

__all__ = ["Witness"]


class Witness:
    """An engine client for one request: everything is the real client's but `generate`."""

    def __init__(self, client: EngineClient, on_failure: OnFailure) -> None:
        self._client = client
        self._on_failure = on_failure
        self.n_started = 0
        """Prompts that were given to the engine."""
        self.runs: list[Run] = []
        """Those that finished."""
        self.failure: NotApplied | None = None
        """Why the request was ended before it finished: a worker could not apply its plan."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """The engine's outputs for one prompt, the proof taken off."""
        self.n_started += 1
        return self._watch(self._client.generate(prompt, sampling_params, request_id, **options), sampling_params)

    async def _watch(
        self, outputs: AsyncGenerator[RequestOutput, None], params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        proof: Any = None
        lengths = [0] * params.n
        async with aclosing(outputs):
            async for output in outputs:
                carried = dict(output.kv_transfer_params or {})
                proof = carried.pop(KEY, proof)
                output.kv_transfer_params = carried or None
                # A failure is told with the first output after it: no token of an unsteered run is passed on.
                if self._on_failure == "closed" and proof is not None and proof.get("failure"):
                    self.failure = NotApplied(f"the engine could not apply the plan: {proof['failure']}")
                    raise self.failure
                for sample in output.outputs:
                    n_new = len(sample.token_ids)
                    grown = params.output_kind is RequestOutputKind.DELTA
                    lengths[sample.index] = lengths[sample.index] + n_new if grown else n_new
                if output.finished:
                    self.runs.append(Run(len(output.prompt_token_ids or ()), tuple(lengths), proof))
                yield output
