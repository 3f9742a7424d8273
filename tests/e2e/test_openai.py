"""The rest of the OpenAI API, steered: responses, structured output, log-probabilities, samples, tokens."""

import json
from typing import Any

import openai
import pytest

from tests.conftest import Server

MODEL = "smollm2-135m-instruct"
STEERING: dict[str, Any] = {"bundle": "calm"}
HI: list[Any] = [{"role": "user", "content": "Write one sentence about the sea."}]
ASK: dict[str, Any] = {"model": MODEL, "input": "Write one sentence about the sea.", "temperature": 0}
STEERED: dict[str, Any] = {**ASK, "max_output_tokens": 12, "extra_body": {"ignore_eos": True, "steering": STEERING}}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Bern", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_a_response_is_steered_and_proves_it(client: openai.OpenAI) -> None:
    raw = client.responses.with_raw_response.create(**STEERED)
    reply: Any = raw.parse()
    plain = client.responses.create(**ASK, max_output_tokens=12, extra_body={"ignore_eos": True})
    assert reply.output_text
    assert reply.output_text != plain.output_text
    assert (reply.steering["status"], reply.steering["completion_tokens"]) == ("applied", 12)
    assert reply.usage.output_tokens == 12
    assert raw.headers["x-steering-plan"] == reply.steering["plan"]
    assert plain.model_extra["steering"] == {"status": "not_requested"}


def test_a_response_is_the_chat_that_it_stands_for(client: openai.OpenAI) -> None:
    chat: Any = client.chat.completions.create(
        model=f"{MODEL}@calm", messages=HI, temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
    )
    reply: Any = client.responses.create(**STEERED)
    assert reply.output_text == chat.choices[0].message.content
    assert reply.steering["plan"] == chat.steering["plan"]


def test_a_stream_of_a_response_is_the_same_text_with_the_proof_at_its_end(client: openai.OpenAI) -> None:
    events: list[Any] = list(client.responses.create(**STEERED, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == client.responses.create(**STEERED).output_text
    assert events[0].response.steering["status"] == "requested"
    assert events[-1].type == "response.completed"
    assert events[-1].response.steering["completion_tokens"] == 12
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_sdks_own_stream_of_a_response_works(client: openai.OpenAI) -> None:
    with client.responses.stream(**STEERED) as stream:
        kinds = [event.type for event in stream]
        final: Any = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.steering["status"] == "applied"


def test_a_response_that_cannot_be_steered_or_kept_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.responses.create(**ASK, extra_body={"steering": {"bundle": "clam"}})
    assert unknown.value.code == "unknown_bundle"
    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        client.responses.create(**ASK, background=True)
    with pytest.raises(openai.BadRequestError, match="did you mean"):
        client.responses.create(**ASK, extra_body={"sterring": STEERING})


def test_structured_output_keeps_its_schema_under_steering(client: openai.OpenAI) -> None:
    schema: Any = {
        "type": "json_schema",
        "json_schema": {"name": "w", "schema": WEATHER["parameters"], "strict": True},
    }
    reply: Any = client.chat.completions.create(
        model=MODEL, messages=HI, response_format=schema, max_tokens=30, extra_body={"steering": STEERING}
    )
    assert json.loads(reply.choices[0].message.content)["city"] in ("Bern", "Rome")
    assert reply.steering["status"] == "applied"


@pytest.mark.parametrize(
    "choice", [{"type": "function", "function": {"name": "weather"}}, "required"], ids=["named", "required"]
)
def test_a_strict_tool_is_called_with_arguments_of_its_schema_under_steering(
    client: openai.OpenAI, choice: Any
) -> None:
    """Without `strict` vLLM's parser lets the arguments be any JSON, as OpenAI's API does."""
    strict: Any = {"type": "function", "function": WEATHER | {"strict": True}}
    reply: Any = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather in Rome?"}],
        tools=[strict],
        tool_choice=choice,
        max_tokens=160,
        temperature=0,
        extra_body={"steering": STEERING},
    )
    assert reply.steering["status"] == "applied"
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")


def test_log_probabilities_are_those_of_the_steered_model(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "prompt": "The sea is", "max_tokens": 3, "temperature": 0, "logprobs": 2}
    plain = client.completions.create(**ask).choices[0].logprobs
    steered: Any = client.completions.create(**ask, extra_body={"steering": STEERING})
    assert steered.steering["status"] == "applied"
    assert len(steered.choices[0].logprobs.token_logprobs) == 3
    assert plain is not None
    assert steered.choices[0].logprobs.token_logprobs[0] != plain.token_logprobs[0]


def test_each_of_n_samples_is_proven(client: openai.OpenAI) -> None:
    reply: Any = client.chat.completions.create(
        model=MODEL, messages=HI, n=3, max_tokens=5, seed=7, extra_body={"ignore_eos": True, "steering": STEERING}
    )
    assert len({choice.message.content for choice in reply.choices}) > 1
    assert reply.steering["completion_tokens"] == 15


def test_tokens_are_told_and_read_back(server: Server) -> None:
    text = "The sea is calm."
    told = server.post("/v1/tokenize", {"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert server.post("/v1/detokenize", {"model": MODEL, "tokens": told["tokens"]}).json() == {"prompt": text}
    chat = server.post("/v1/tokenize", {"model": f"{MODEL}@calm", "messages": HI}).json()
    reply = server.post("/v1/chat/completions", {"model": MODEL, "messages": HI, "max_tokens": 1}).json()
    assert chat["count"] == reply["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "document", "status"),
    [
        ("/v1/tokenize", {"model": "gpt-4o", "prompt": "hi"}, 404),
        ("/v1/tokenize", {"model": MODEL}, 400),
        ("/v1/tokenize", {"model": MODEL, "prompt": "hi", "sterring": {}}, 400),
        ("/v1/detokenize", {"model": MODEL, "tokens": [-1]}, 400),
        ("/v1/detokenize", {"model": MODEL, "tokens": [2**62]}, 400),
        ("/v1/detokenize", {"model": MODEL, "tokens": ["a"]}, 400),
    ],
)
def test_what_cannot_be_tokenized_is_refused(server: Server, path: str, document: dict[str, Any], status: int) -> None:
    reply = server.post(path, document)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]
