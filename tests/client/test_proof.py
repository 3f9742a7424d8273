"""`require_applied` accepts a reply whose proof shows the edits, and nothing less."""

from typing import Any

import httpx2
import openai
import pytest

from tests.client.fakes import PROOF, answers, chat_chunks, chat_reply, streams, transport
from trimtab.client import Applied, NotAppliedError, require_applied


def stock(handler: httpx2.MockTransport) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://fake/v1", api_key="none", http_client=httpx2.Client(transport=handler))


def ask(client: openai.OpenAI) -> Any:
    return client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Capital of France?"}])


def test_the_proof_of_a_stock_reply_is_typed() -> None:
    with stock(transport(answers(chat_reply(PROOF)))) as client:
        applied = require_applied(ask(client))
    assert isinstance(applied, Applied)
    assert (applied.status, applied.bundles, applied.completion_tokens, applied.n_tokens) == (
        "applied",
        ("calm",),
        7,
        7,
    )
    assert applied.hook_points["blocks.14.resid_post"].max_relative_norm == 0.21
    assert (applied.gate_firings, applied.special_tokens, applied.mean_relative_norm) == (3, 1, 0.11)
    assert applied.hook_points["blocks.14.resid_post"].gate_firings == 3


def test_the_last_chunk_of_a_stock_stream_is_proof() -> None:
    opening = {"status": "requested", "plan": PROOF["plan"], "bundles": ["calm"]}
    with stock(transport(streams(chat_chunks(opening=opening, closing=PROOF)))) as client:
        message: Any = [{"role": "user", "content": "Hi"}]
        chunks = list(client.chat.completions.create(model="m", messages=message, stream=True))
    assert require_applied(chunks[-1]).plan == PROOF["plan"]
    with pytest.raises(NotAppliedError, match="carries no `steering` object"):
        require_applied(chunks[1])


@pytest.mark.parametrize(
    ("steering", "said"),
    [
        (None, "carries no `steering` object"),
        ("applied", "carries no `steering` object"),
        ({**PROOF, "status": "not_requested"}, "its status is 'not_requested'"),
        ({**PROOF, "status": "failed_open"}, "its status is 'failed_open'"),
        ({**PROOF, "plan": None}, "names no plan"),
        ({**PROOF, "completion_tokens": 0}, "not one token"),
        ({**PROOF, "completion_tokens": "many"}, "cannot be read"),
        ({**PROOF, "hook_points": ["blocks.14.resid_post"]}, "cannot be read"),
        ({"plan": PROOF["plan"]}, "cannot be read"),
    ],
)
def test_anything_less_than_proof_raises(steering: object, said: str) -> None:
    with stock(transport(answers(chat_reply(steering)))) as client:
        reply = ask(client)
    with pytest.raises(NotAppliedError, match=said) as caught:
        require_applied(reply)
    assert caught.value.request_id == "req-7"


def test_tokens_from_the_prefix_cache_count_as_applied() -> None:
    proof = {**PROOF, "completion_tokens": 0, "cached_prompt_tokens": 32}
    assert require_applied({"steering": proof}).n_tokens == 32


def test_the_experiment_of_a_reply_is_told() -> None:
    enrolled = {"experiment": {"key": "calm-replies", "arm": "calm"}}
    applied = Applied.of({"steering": {**PROOF, **enrolled}})
    assert applied.experiment is not None
    assert (applied.experiment.key, applied.experiment.arm) == ("calm-replies", "calm")
    assert applied.to_dict()["experiment"] == enrolled["experiment"]
    assert Applied.of({"steering": {"status": "blinded"}}).experiment is None
