"""The proof counts what was applied, through samples, stop strings, single tokens, aborts and failures."""

import pytest

from tests.parity.cases import PROMPTS, edit
from tests.parity.engine import Engine
from tests.parity.rows import bundles
from trimtab.server.engine import proof
from trimtab.server.errors import NotApplied
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

pytestmark = pytest.mark.filterwarnings("ignore")


def plan(*edits: dict[str, object]) -> Plan:
    return compile_plan(parse_steering({"edits": list(edits)}), bundles())


ADD = plan(edit("add", 30.0))
COMPLETION = plan(edit("add", 30.0, scope="completion"))
POINT = "blocks.14.resid_post"


@pytest.mark.parametrize("n_tokens", [1, 2, 9])
def test_completion_scope_edits_as_many_tokens_as_are_generated(engine: Engine, n_tokens: int) -> None:
    (answer,) = engine.ask([(PROMPTS["story"], COMPLETION)], n_tokens=n_tokens)
    assert answer.proof is not None
    point = answer.proof["hook_points"][POINT]
    assert (point["prompt_tokens"], point["completion_tokens"]) == (0, n_tokens)


def test_samples_of_one_request_are_summed(engine: Engine) -> None:
    (output,) = engine.generate([(PROMPTS["story"], ADD)], n=3, temperature=1.0, ignore_eos=False)
    found = output.kv_transfer_params[proof.KEY]
    assert found["samples"] == 3
    proof.verify(ADD, found, len(output.prompt_token_ids), [len(sample.token_ids) for sample in output.outputs])


def test_a_stop_string_found_in_the_front_end_keeps_its_proof(engine: Engine) -> None:
    (free,) = engine.ask([(PROMPTS["story"], ADD)])
    word = next(word for word in free.text.split()[2:] if len(word) > 1)
    (answer,) = engine.ask([(PROMPTS["story"], ADD)], stop=[word])
    assert len(answer.tokens) < len(free.tokens)
    proof.verify(ADD, answer.proof, len(answer.prompt), [len(answer.tokens)])


def test_a_plan_without_rows_is_proven_to_edit_nothing(engine: Engine) -> None:
    nothing = plan(edit("add", 30.0, strength=0.0))
    steered, free = engine.ask([(PROMPTS["story"], nothing), (PROMPTS["story"], None)])
    assert steered.tokens == free.tokens
    assert steered.proof == {"plan": nothing.hash, "samples": 1, "failure": None, "hook_points": {}}
    proof.verify(nothing, steered.proof, len(steered.prompt), [len(steered.tokens)])


def test_an_aborted_request_leaves_nothing_behind(engine: Engine) -> None:
    from vllm import SamplingParams

    core = engine.llm.llm_engine
    params = SamplingParams(max_tokens=100, ignore_eos=True, extra_args={proof.KEY: ADD.wire()})
    core.add_request("doomed", PROMPTS["story"], params)
    core.step()
    core.step()
    core.abort_request(["doomed"])
    (answer,) = engine.ask([(PROMPTS["story"], ADD)])
    proof.verify(ADD, answer.proof, len(answer.prompt), [len(answer.tokens)])
    engine.ask([(PROMPTS["one"], None)])
    (report,) = engine.llm.collective_rpc("trimtab_handshake")
    assert report["requests"] == 0


def test_a_worker_that_lost_the_bundle_says_so_and_harms_no_other_request(engine: Engine) -> None:
    bundle = bundles()["l3"]
    lost = plan(edit("add", 10.0, at=3))
    engine.llm.collective_rpc("trimtab_unload_bundle", args=(bundle.content_hash,))
    try:
        failed, fine = engine.ask([(PROMPTS["story"], lost), (PROMPTS["story"], ADD)])
    finally:
        engine.llm.collective_rpc("trimtab_load_bundle", args=(bundle.to_bytes(),))
    with pytest.raises(NotApplied, match="not loaded in this worker"):
        proof.verify(lost, failed.proof, len(failed.prompt), [len(failed.tokens)])
    proof.verify(ADD, fine.proof, len(fine.prompt), [len(fine.tokens)])


def test_every_hook_was_called_before_the_first_request(engine: Engine) -> None:
    (report,) = engine.reports
    assert report["layers"] == list(range(30))
    assert all(report["calls"][str(layer)] > 0 for layer in range(30))
