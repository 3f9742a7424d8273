"""Every way through the scheduler leads to the same steered answer, with a whole proof, and leaves nothing behind in the worker.

What is not here: chunks (`test_edits`), the prefix cache (`test_prefix_cache`), streams and beam search over HTTP (`tests/e2e`).
"""

from typing import Any

import pytest

from tests.parity.cases import PROMPTS, edit, gate, window
from tests.parity.engine import Answer, Engine, answer
from tests.parity.rows import bundles
from tests.parity.test_edits import BY_HASH, TOLERANCE, apart
from trimtab.server.engine import proof
from trimtab.server.engine.proof import KEY
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

pytestmark = pytest.mark.filterwarnings("ignore")


def plan(*edits: dict[str, object]) -> Plan:
    return compile_plan(parse_steering({"edits": list(edits)}), bundles())


ADD = plan(edit("add", 60.0))
CLAMP = plan(edit("clamp", 50.0, scope="completion"), edit("ablate", at=3))
TAIL = plan(edit("add", 80.0, window=window(-5, 4, "prompt_end")))
ONWARD = plan(edit("clamp", 60.0, gate=gate(106, 10.0, mode="onward")), edit("scale", 3.0, latent=101))
N_TOKENS = 8
PLANS = (None, ADD, CLAMP, TAIL, ONWARD)


def same(a: Answer, b: Answer) -> bool:
    return a.tokens == b.tokens and apart(a.logprobs, b.logprobs) <= TOLERANCE


def check(answer: Answer, wanted: Plan | None) -> None:
    if wanted is None:
        assert answer.proof is None
    else:
        proof.verify(wanted, answer.proof, len(answer.prompt), [len(answer.tokens)])


def in_use(engine: Engine) -> list[int]:
    """Requests, slots and open gates that the worker still holds, once it has heard how the last request ended."""
    engine.ask([(PROMPTS["one"], None)], n_tokens=1)
    (report,) = engine.llm.collective_rpc("trimtab_handshake")
    return [report[name] for name in ("requests", "slots", "gates")]


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[Plan | None, Answer]:
    """Each plan on the long prompt, alone and cold."""
    found = {}
    for wanted in PLANS:
        engine.cold()
        (found[wanted],) = engine.ask([(PROMPTS["long"], wanted)], n_tokens=N_TOKENS)
    return found


class Steps:
    """Requests taken through the engine step by step, by ids of our own choice."""

    def __init__(self, engine: Engine) -> None:
        self.core: Any = engine.llm.llm_engine
        self.outputs: dict[str, Any] = {}

    def add(self, request_id: str, prompt: str, wanted: Plan | None, **params: Any) -> None:
        from vllm import SamplingParams

        fields: dict[str, Any] = {"temperature": 0.0, "max_tokens": N_TOKENS, "logprobs": 0, "ignore_eos": True}
        extra = {KEY: wanted.wire()} if wanted else None
        self.core.add_request(request_id, prompt, SamplingParams(**{**fields, **params}, extra_args=extra))

    def step(self, n: int) -> None:
        """n outputs of the engine; it waits for ever when it has nothing to do."""
        for _ in range(n):
            assert self.core.has_unfinished_requests()
            for output in self.core.step():
                if output.finished:
                    self.outputs[output.request_id] = output

    def finish(self) -> dict[str, Any]:
        while self.core.has_unfinished_requests():
            self.step(1)
        return self.outputs


@pytest.mark.parametrize("steps", [1, 8], ids=["mid-prefill", "mid-decode"])
def test_a_batch_that_is_preempted_at_any_step_is_as_if_undisturbed(
    engine: Engine, alone: dict[Plan | None, Answer], steps: int
) -> None:
    """All requests are thrown out at once, mid-prefill or mid-decode, their cache blocks too, and computed again."""
    engine.cold()
    running = Steps(engine)
    for i, wanted in enumerate(PLANS):
        running.add(f"r{i}", PROMPTS["long"], wanted)
    running.step(steps)
    assert running.core.reset_prefix_cache(reset_running_requests=True)
    outputs = running.finish()
    for i, wanted in enumerate(PLANS):
        found = answer(outputs[f"r{i}"])
        assert same(found, alone[wanted]), f"request {i}"
        check(found, wanted)
    assert in_use(engine) == [0, 0, 0]


@pytest.mark.parametrize("steps", [1, 3, 6], ids=["mid-prefill", "prefilled", "mid-decode"])
def test_an_aborted_request_leaves_blocks_that_are_right_and_nothing_else(
    engine: Engine, alone: dict[Plan | None, Answer], steps: int
) -> None:
    for wanted in (ADD, ONWARD):
        engine.cold()
        running = Steps(engine)
        running.add("doomed", PROMPTS["long"], wanted)
        running.step(steps)
        running.core.abort_request(["doomed"])
        (again,) = engine.ask([(PROMPTS["long"], wanted)], n_tokens=N_TOKENS)
        assert same(again, alone[wanted])
        check(again, wanted)
        assert (again.cached > 0) == (wanted is not ONWARD)
    assert in_use(engine) == [0, 0, 0]


def test_an_aborted_parent_takes_its_samples_along(engine: Engine) -> None:
    running = Steps(engine)
    running.add("doomed", PROMPTS["long"], ONWARD, n=3, temperature=1.0, seed=1)
    running.add("other", PROMPTS["story"], ADD)
    running.step(4)
    running.core.abort_request(["doomed"])
    outputs = running.finish()
    check(answer(outputs["other"]), ADD)
    assert in_use(engine) == [0, 0, 0]


def test_an_id_may_come_again_at_once(engine: Engine, alone: dict[Plan | None, Answer]) -> None:
    running = Steps(engine)
    for wanted in (ADD, None, ONWARD):
        running.add("mine", PROMPTS["long"], wanted)
        found = answer(running.finish()["mine"])
        assert same(found, alone[wanted])
        check(found, wanted)


def test_samples_are_what_each_would_be_alone(engine: Engine) -> None:
    """vLLM gives sample i the seed of the request plus i. Symptom: a request with a seed whose prompt was prefilled in chunks
    ended the engine, for everybody: vLLM rewinds its generator by an offset, which generators on a CPU do not have.
    """
    for wanted in (ADD, ONWARD):
        engine.cold()
        sampled: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95}
        (together,) = engine.generate([(PROMPTS["long"], wanted)], n_tokens=N_TOKENS, n=2, seed=5, **sampled)
        for i in range(2):
            engine.cold()
            (single,) = engine.ask([(PROMPTS["long"], wanted)], n_tokens=N_TOKENS, seed=5 + i, **sampled)
            assert same(answer(together, i), single)
            check(single, wanted)
        lengths = [len(sample.token_ids) for sample in together.outputs]
        proof.verify(wanted, together.kv_transfer_params[KEY], len(together.prompt_token_ids), lengths)


def test_one_object_of_sampling_parameters_serves_many_prompts_many_times(engine: Engine) -> None:
    """Its windows are counted from the end of each prompt, and the caller's object is left as it was."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=N_TOKENS, logprobs=0, ignore_eos=True, extra_args={KEY: TAIL.wire()}
    )
    prompts: list[Any] = [PROMPTS[name] for name in ("story", "long", "chat", "short")]
    wanted = engine.ask([(prompt, TAIL) for prompt in prompts], n_tokens=N_TOKENS)
    for _ in range(2):
        found = [answer(output) for output in engine.llm.generate(prompts, params, use_tqdm=False)]
        for a, b in zip(found, wanted, strict=True):
            assert same(a, b)
            check(a, TAIL)
    assert (params.extra_args, params.n, params.max_tokens) == ({KEY: TAIL.wire()}, 1, N_TOKENS)
    params.extra_args = {KEY: ADD.wire()}
    (other,) = (answer(output) for output in engine.llm.generate([PROMPTS["long"]], params, use_tqdm=False))
    check(other, ADD)


@pytest.mark.parametrize("wanted", PLANS, ids=["plain", "add", "clamp", "tail", "onward"])
def test_log_probabilities_of_prompt_and_completion_are_those_of_transformers(
    engine: Engine, reference: Any, wanted: Plan | None
) -> None:
    """The prompt is prefilled in chunks and its log-probabilities come chunk by chunk; five alternatives each."""
    (output,) = engine.generate([(PROMPTS["long"], wanted)], prompt_logprobs=5, logprobs=5)
    found = answer(output)
    check(found, wanted)
    logprobs_TV, _ = reference.run(wanted, BY_HASH, found.prompt, found.tokens)
    steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    assert len(steps) == len(logprobs_TV)
    worst = max(
        abs(entry.logprob - float(logprobs_TV[t, token]))
        for t, step in enumerate(steps)
        for token, entry in step.items()
    )
    assert worst <= TOLERANCE
    for t, step in enumerate(steps):
        assert {token for token, entry in step.items() if entry.rank <= 5} == set(
            logprobs_TV[t].topk(5).indices.tolist()
        )


def test_a_grammar_takes_its_pick_of_the_steered_distribution(engine: Engine, reference: Any) -> None:
    """Four digits: at each step the likeliest digit of the steered model, which the unsteered model would not all have said."""
    from vllm.sampling_params import StructuredOutputsParams

    tokenizer = engine.llm.get_tokenizer()
    digits = [tokenizer.convert_tokens_to_ids(str(i)) for i in range(10)]
    said = {}
    for wanted in (None, ADD, CLAMP, ONWARD):
        grammar = StructuredOutputsParams(regex="[0-9]{4}")
        (output,) = engine.generate([(PROMPTS["long"], wanted)], structured_outputs=grammar, ignore_eos=False)
        found = answer(output)
        check(found, wanted)
        said[wanted] = found.text
        assert len(found.text) == 4
        logprobs_TV, _ = reference.run(wanted, BY_HASH, found.prompt, found.tokens)
        start = len(found.prompt) - 1
        likeliest = [digits[int(logprobs_TV[start + j, digits].argmax())] for j in range(4)]
        assert found.tokens[:4] == likeliest
    assert len(set(said.values())) > 1


def test_a_sequence_as_long_as_the_model_takes_is_proven(engine: Engine) -> None:
    longest = engine.llm.llm_engine.model_config.max_model_len
    (few,) = engine.ask([(PROMPTS["long"], None)], n_tokens=1)
    text = (few.prompt * 4)[: longest - 3]
    full, single = engine.ask([(text, ADD), ([*text, 5, 6], ADD)], n_tokens=20)
    assert (len(full.tokens), len(single.tokens)) == (3, 1)
    check(full, ADD)
    check(single, ADD)


def test_a_prompt_of_whole_blocks_out_of_the_cache_is_as_cold(engine: Engine) -> None:
    """vLLM computes its last block again, for the logits of its last token."""
    (few,) = engine.ask([(PROMPTS["long"], None)], n_tokens=1)
    text = few.prompt[:128]
    for wanted in (ADD, CLAMP, TAIL):
        engine.cold()
        (cold,) = engine.ask([(text, wanted)], n_tokens=N_TOKENS)
        (warm,) = engine.ask([(text, wanted)], n_tokens=N_TOKENS)
        assert (cold.cached, warm.cached) == (0, 96)
        assert same(warm, cold)
        check(warm, wanted)


def test_beam_search_has_no_place_for_a_plan() -> None:
    """Offline it takes parameters of its own, which cannot carry one; over HTTP a steered request for it is refused."""
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(TypeError, match="extra_args"):
        BeamSearchParams(beam_width=2, max_tokens=4, extra_args={KEY: ADD.wire()})  # type: ignore[call-arg]


def test_a_prompt_that_arrives_in_pieces_is_refused(engine: Engine) -> None:
    """Symptom: each piece made the prompt longer under a plan that was resolved for the first, so windows were edited at the
    wrong positions; the proof failed the request at its end instead of at its start.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    front: Any = engine.llm.llm_engine.input_processor
    params = SamplingParams(extra_args={KEY: TAIL.wire()})
    with pytest.raises(VLLMValidationError, match="arrives in pieces"):
        front.process_inputs("r", {"prompt_token_ids": [1, 2, 3]}, params, ("generate",), resumable=True)
    assert front.process_inputs("r", {"prompt_token_ids": [1, 2, 3]}, params, ("generate",)).resumable is False
