"""Stock OpenAI SDK → real server → real engine: what a steered caller gets back."""

import asyncio
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import Server

MODEL = "smollm2-135m-instruct"
HOOK_POINT = "blocks.14.resid_post"
MESSAGES: list[Any] = [{"role": "user", "content": "Write one sentence about the sea."}]
STEERING: dict[str, Any] = {"steering": {"bundle": "calm"}}
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


def greedy(**extra_body: Any) -> dict[str, Any]:
    return {**GREEDY, "extra_body": {**GREEDY["extra_body"], **extra_body}}


def steered(**changes: Any) -> dict[str, Any]:
    return greedy(steering={"bundle": "calm", **changes})


def chat_text(client: openai.OpenAI, options: dict[str, Any]) -> str:
    return client.chat.completions.create(messages=MESSAGES, **options).choices[0].message.content or ""


def test_a_steered_chat_differs_and_proves_it(client: openai.OpenAI) -> None:
    plain = chat_text(client, GREEDY)
    raw = client.chat.completions.with_raw_response.create(messages=MESSAGES, **steered())
    reply: Any = raw.parse()
    assert reply.choices[0].message.content != plain
    proof = reply.steering
    assert (proof["status"], proof["bundles"]) == ("applied", ["calm"])
    assert proof["completion_tokens"] == reply.usage.completion_tokens == 12
    assert proof["prompt_tokens"] + proof["cached_prompt_tokens"] == reply.usage.prompt_tokens - 2
    assert 0 < proof["max_relative_norm"] < 1
    assert proof["hook_points"].keys() == {HOOK_POINT}
    assert (raw.headers["x-steering-status"], raw.headers["x-steering-plan"]) == ("applied", proof["plan"])


def test_an_unsteered_chat_says_so(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(messages=MESSAGES, **GREEDY)
    reply: Any = raw.parse()
    assert reply.steering == {"status": "not_requested"}
    assert raw.headers["x-steering-status"] == "not_requested"
    assert "x-steering-plan" not in raw.headers


def test_the_same_plan_has_the_same_answer_and_hash_however_it_is_asked_for(client: openai.OpenAI) -> None:
    edits = [
        {"bundle": "calm", "latent": 8, "operation": "ablate", "scope": {"tokens": "completion"}},
        {"bundle": "calm", "latent": 7, "operation": "add", "amount": 15.0, "strength": 2.0},
    ]
    replies: list[Any] = [
        client.chat.completions.create(messages=MESSAGES, **options)
        for options in (steered(), greedy(steering={"edits": edits}), {**GREEDY, "model": f"{MODEL}@calm:1.0"})
    ]
    assert len({reply.steering["plan"] for reply in replies}) == 1
    assert len({reply.choices[0].message.content for reply in replies}) == 1


def test_strength_zero_is_the_unsteered_answer(client: openai.OpenAI) -> None:
    reply: Any = client.chat.completions.create(messages=MESSAGES, **steered(strength=0.0))
    assert reply.choices[0].message.content == chat_text(client, GREEDY)
    assert (reply.steering["status"], reply.steering["completion_tokens"]) == ("applied", 0)


@pytest.mark.parametrize("usage", [False, True])
def test_a_steered_stream_is_the_same_text_with_the_plan_first_and_the_totals_last(
    client: openai.OpenAI, usage: bool
) -> None:
    options = {**steered(), **({"stream_options": {"include_usage": True}} if usage else {})}
    chunks: list[Any] = list(client.chat.completions.create(messages=MESSAGES, stream=True, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat_text(client, steered())
    assert chunks[0].steering["status"] == "requested"
    assert chunks[0].steering["bundles"] == ["calm"]
    assert (chunks[-1].steering["status"], chunks[-1].steering["completion_tokens"]) == ("applied", 12)
    assert chunks[-1].steering["plan"] == chunks[0].steering["plan"]
    assert (chunks[-1].usage is not None) == usage


def test_the_headers_of_a_stream_say_what_was_admitted(client: openai.OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        messages=MESSAGES, stream=True, **steered()
    ) as response:
        assert response.headers["x-steering-status"] == "requested"
        assert response.headers["x-steering-plan"].startswith("sha256:")
        response.read()


def test_an_unsteered_stream_is_the_unsteered_text(client: openai.OpenAI) -> None:
    chunks: list[Any] = list(client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat_text(client, GREEDY)
    assert chunks[0].steering == chunks[-1].steering == {"status": "not_requested"}


def test_completions_are_steered_with_logprobs_that_show_it(client: openai.OpenAI) -> None:
    plain: Any = client.completions.create(prompt="The sea is", logprobs=1, **GREEDY)
    reply: Any = client.completions.create(prompt="The sea is", logprobs=1, **steered())
    assert reply.steering["status"] == "applied"
    assert reply.choices[0].logprobs.token_logprobs[0] != plain.choices[0].logprobs.token_logprobs[0]


def test_a_completion_stream_is_proven_as_well(client: openai.OpenAI) -> None:
    chunks: list[Any] = list(client.completions.create(prompt="The sea is", stream=True, **steered()))
    reply: Any = client.completions.create(prompt="The sea is", **steered())
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text
    assert chunks[-1].steering["completion_tokens"] == 12


def test_every_choice_is_proven(client: openai.OpenAI) -> None:
    options = {**steered(), "temperature": 1.0, "n": 3, "seed": 7}
    reply: Any = client.chat.completions.create(messages=MESSAGES, **options)
    proof = reply.steering
    assert len(reply.choices) == 3
    assert proof["completion_tokens"] == reply.usage.completion_tokens == 36
    assert proof["prompt_tokens"] + proof["cached_prompt_tokens"] == 3 * (reply.usage.prompt_tokens - 2)


def test_every_choice_of_a_stream_is_proven(client: openai.OpenAI) -> None:
    options = {**steered(), "temperature": 1.0, "n": 2, "seed": 7}
    chunks: list[Any] = list(client.completions.create(prompt="The sea is", stream=True, **options))
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}
    assert chunks[-1].steering["completion_tokens"] == 24


def test_every_prompt_of_a_list_is_proven(client: openai.OpenAI) -> None:
    reply: Any = client.completions.create(prompt=["The sea is", "Once upon a time"], **steered())
    assert reply.steering["completion_tokens"] == reply.usage.completion_tokens == 24


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_found_outside_the_engine_keeps_the_proof(client: openai.OpenAI, stream: bool) -> None:
    """Symptom: vLLM finds stop strings in the front end, so the engine never finishes such a request by itself."""
    words = chat_text(client, steered()).split()
    options = {**steered(), "stop": [words[4]]}
    if stream:
        chunks: list[Any] = list(client.chat.completions.create(messages=MESSAGES, stream=True, **options))
        proof, finish = chunks[-1].steering, chunks[-1].choices[0].finish_reason
    else:
        reply: Any = client.chat.completions.create(messages=MESSAGES, **options)
        proof, finish = reply.steering, reply.choices[0].finish_reason
        assert proof["completion_tokens"] == reply.usage.completion_tokens
    assert (proof["status"], finish) == ("applied", "stop")
    assert 0 < proof["completion_tokens"] < 12


@pytest.mark.parametrize(("scope", "prompt", "completion"), [("prompt", True, False), ("completion", False, True)])
def test_a_scope_edits_its_tokens_only(client: openai.OpenAI, scope: str, prompt: bool, completion: bool) -> None:
    edit = {"bundle": "calm", "latent": 7, "operation": "add", "amount": 30.0, "scope": {"tokens": scope}}
    reply: Any = client.chat.completions.create(messages=MESSAGES, **greedy(steering={"edits": [edit]}))
    proof = reply.steering
    assert (proof["prompt_tokens"] + proof["cached_prompt_tokens"] > 0) == prompt
    assert (proof["completion_tokens"] > 0) == completion


def test_a_long_prompt_asked_twice_comes_from_the_cache_and_counts_as_edited(client: openai.OpenAI) -> None:
    prompt = "The sea is calm and the wind is low. " * 30
    first: Any = client.completions.create(prompt=prompt, **steered(strength=0.7))
    second: Any = client.completions.create(prompt=prompt, **steered(strength=0.7))
    assert first.steering["cached_prompt_tokens"] == 0
    assert second.steering["cached_prompt_tokens"] > 0
    assert second.choices[0].text == first.choices[0].text
    edited = [r.steering["prompt_tokens"] + r.steering["cached_prompt_tokens"] for r in (first, second)]
    assert edited[0] == edited[1] == first.usage.prompt_tokens - 2


async def test_requests_mixed_in_one_batch_get_what_they_get_alone(server: Server) -> None:
    plans: list[dict[str, Any] | None] = [
        None,
        {"bundle": "calm"},
        {"bundle": "calm", "strength": -0.8},
        {"edits": [{"bundle": "calm", "latent": 9, "operation": "clamp", "target": 20.0}]},
        {
            "edits": [
                {"bundle": "calm", "latent": 7, "operation": "scale", "factor": 3.0, "scope": {"tokens": "completion"}}
            ]
        },
        {"edits": [{"bundle": "calm", "vector": "mean", "operation": "add", "amount": 0.5, "unit": "resid_norm"}]},
    ]
    prompts = ["The sea is", "My favourite thing about the city where I live is that"]
    asks = [(prompt, plan) for plan in plans for prompt in prompts]
    async with openai.AsyncOpenAI(
        base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:

        async def text(prompt: str, plan: dict[str, Any] | None) -> str:
            reply: Any = await client.completions.create(
                prompt=prompt, **(greedy() if plan is None else greedy(steering=plan))
            )
            assert reply.steering["status"] == ("not_requested" if plan is None else "applied")
            return str(reply.choices[0].text)

        alone = [await text(*ask) for ask in asks]
        mixed = await asyncio.gather(*(text(*ask) for ask in asks))
    assert list(mixed) == alone
    assert len(set(alone[0::2])) > 3


def test_a_client_that_goes_away_in_a_stream_frees_the_engine(server: Server) -> None:
    ask = {"model": MODEL, "prompt": "A long story:", "max_tokens": 900, "ignore_eos": True, "stream": True, **STEERING}
    before = metric(server, 'trimtab_requests_total{status="abandoned"}')
    with httpx.stream("POST", server.base_url + "/v1/completions", json=ask, timeout=60) as response:
        next(response.iter_lines())
    wait_for(lambda: metric(server, 'trimtab_requests_total{status="abandoned"}') == before + 1)
    wait_for(lambda: metric(server, "vllm:num_requests_running{") == 0)


def test_a_client_that_goes_away_before_a_reply_frees_the_engine(server: Server) -> None:
    ask = {"model": MODEL, "prompt": "A long story:", "max_tokens": 900, "ignore_eos": True, **STEERING}
    before = metric(server, 'trimtab_requests_total{status="abandoned"}')
    with pytest.raises(httpx.ReadTimeout):
        server.post("/v1/completions", ask, timeout=1.0)
    wait_for(lambda: metric(server, 'trimtab_requests_total{status="abandoned"}') == before + 1)
    wait_for(lambda: metric(server, "vllm:num_requests_running{") == 0)


def test_metrics_count_what_was_edited_beside_vllms_own(server: Server, client: openai.OpenAI) -> None:
    before = metric(server, 'trimtab_edited_tokens_total{scope="completion"}')
    applied = metric(server, 'trimtab_requests_total{status="applied"}')
    client.completions.create(prompt="The sea is", **steered())
    assert metric(server, 'trimtab_edited_tokens_total{scope="completion"}') == before + 12
    assert metric(server, 'trimtab_requests_total{status="applied"}') == applied + 1
    assert metric(server, "trimtab_bundles_loaded") == 1
    assert metric(server, "trimtab_admission_seconds_count") > 0
    assert metric(server, "trimtab_steering_mismatch_total") == 0
    assert metric(server, "vllm:generation_tokens_total{") > 0


def metric(server: Server, name: str) -> float:
    lines = httpx.get(server.base_url + "/metrics").text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def wait_for(condition: Any, seconds: float = 15.0) -> None:
    import time

    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
