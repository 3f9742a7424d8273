"""An engine without the plugin, in a process of its own: its answers to the unsteered cases, as one line of JSON.

It must also be refused by the handshake: run with VLLM_PLUGINS set and not naming trimtab.
"""

import json
import sys
from typing import Any

from tests.parity.cases import PROMPTS, UNSTEERED
from tests.parity.engine import ENGINE, N_TOKENS
from trimtab.attribution.embedded import model_path
from trimtab.server.engine.handshake import prove_llm
from trimtab.server.errors import Unsupported


def main() -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(model_path()), **ENGINE)
    params = SamplingParams(temperature=0.0, max_tokens=N_TOKENS, logprobs=0, ignore_eos=True)
    outputs = llm.generate([PROMPTS[case.prompt] for case in UNSTEERED], params, use_tqdm=False)
    answers: dict[str, Any] = {}
    for case, output in zip(UNSTEERED, outputs, strict=True):
        sample = output.outputs[0]
        steps: Any = sample.logprobs
        logprobs = [step[token].logprob for step, token in zip(steps, sample.token_ids, strict=True)]
        answers[case.name] = {"tokens": list(sample.token_ids), "logprobs": logprobs}
    try:
        prove_llm(llm)
    except Unsupported as e:
        answers["refusal"] = e.message
    llm.llm_engine.engine_core.shutdown()
    sys.stdout.write("\n" + json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
