"""An engine that answers from a script, and the least serving code around it.

Why a fake here: the real engine does not fail to apply a plan, and what the service does when it did is what is tested.
"""

import json
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from trimtab.server.keys.guard import Guard
from trimtab.server.keys.key import Key
from trimtab.server.keys.limits import Limits
from trimtab.server.keys.secret import Secret
from trimtab.server.service.gate import Drain, Gate

N_PROMPT = 6
WORDS = ("so", "it", "goes")


class ScriptedEngine:
    """Says the same three words to everybody, with the proof that it is given, or fails with the error that it is given."""

    def __init__(self, proof: dict[str, Any] | None = None, error: Exception | None = None) -> None:
        self.proof = proof
        self.error = error
        self.errored = False

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """One output per word."""
        for i, word in enumerate(WORDS):
            if self.error is not None:
                raise self.error
            last = i == len(WORDS) - 1
            tells = self.proof is not None and (last or self.proof["failure"] is not None)
            yield RequestOutput(
                request_id=request_id,
                prompt=None,
                prompt_token_ids=list(range(N_PROMPT)),
                prompt_logprobs=None,
                outputs=[CompletionOutput(0, word, [i], None, None, finish_reason="stop" if last else None)],
                finished=last,
                kv_transfer_params={"trimtab": self.proof} if tells else None,
            )


class ScriptedServing:
    """vLLM's serving object as far as the service uses it."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine_client: Any = engine

    async def create_completion(self, ask: CompletionRequest) -> CompletionResponse | AsyncGenerator[str, None]:
        """The words as a reply, or as a stream."""
        params = SamplingParams(output_kind=RequestOutputKind.DELTA)
        outputs = self.engine_client.generate(ask.prompt, params, ask.request_id)
        if ask.stream:
            return self._stream(outputs)
        said = [output async for output in outputs]
        text = " ".join(output.outputs[0].text for output in said)
        choice = CompletionResponseChoice(index=0, text=text, finish_reason="stop")
        passed_on = said[-1].kv_transfer_params
        return CompletionResponse(model="m", choices=[choice], usage=UsageInfo(), kv_transfer_params=passed_on)

    async def _stream(self, outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[str, None]:
        try:
            async for output in outputs:
                said = output.outputs[0]
                chunk = {"choices": [{"index": 0, "text": said.text, "finish_reason": said.finish_reason}]}
                yield f"data: {json.dumps(chunk)}\n\n"
        except Exception as e:  # noqa: BLE001 — vLLM's own stream tells its reader of every error.
            yield f"data: {json.dumps({'error': {'message': str(e), 'param': None, 'code': 500}})}\n\n"
        yield "data: [DONE]\n\n"


def gate(operator_key: str | None = None, drain: Drain | None = None, keys: Iterable[Key] = ()) -> Gate:
    """A gate of a server without a database; nothing of it is scripted."""
    guard = Guard(Secret("s" * 32), operator_key=operator_key)
    guard.know(keys)
    return Gate(guard, Limits(100), drain or Drain())


class NoReplica:
    """In the place of a replica where no route of administration is called; one needs a shelf, and so an engine."""

    registry = experiments = None

    class measurements:
        """Nothing was measured."""

        exposures = outcomes = None

    class follower:
        """The database was heard of just now."""

        is_stale = False
