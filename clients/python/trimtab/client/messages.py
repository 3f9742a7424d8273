"""The JSON of the HTTP API as messages of `trimtab.v1`, and messages as that JSON, for the gRPC transport. Pure.

What a message has no place for goes into its `options`, so whatever a body holds arrives.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from trimtab.v1 import inference_pb2 as inference
from trimtab.v1 import steering_pb2 as words
from trimtab.v1 import steering_service_pb2 as service

__all__ = [
    "bundle_json",
    "chat_complete",
    "chat_json",
    "compare",
    "generate",
    "inspect",
    "inspection_json",
    "piece_json",
    "steering",
    "summary_json",
    "text_json",
    "validation_json",
]

_SAMPLING = frozenset(inference.Sampling.DESCRIPTOR.fields_by_name) - {"logprobs"}
_ENUMS = {"operation": "OPERATION", "unit": "UNIT", "tokens": "SCOPE_TOKENS", "origin": "ORIGIN", "mode": "GATE_MODE"}
_COUNTS = {
    "prompt_token_count": "prompt_tokens",
    "completion_token_count": "completion_tokens",
    "cached_prompt_token_count": "cached_prompt_tokens",
    "gate_firing_count": "gate_firings",
    "special_token_count": "special_tokens",
    "max_relative_norm": "max_relative_norm",
    "mean_relative_norm": "mean_relative_norm",
}


def steering(field: Mapping[str, Any]) -> words.Steering:
    """The `steering` field of a request."""
    rest = {key: value for key, value in field.items() if key != "edits"}
    if "on_failure" in rest:
        rest["on_failure"] = f"ON_FAILURE_{rest['on_failure'].upper()}"
    if "edits" in field:
        rest["free_form"] = words.Edits(edits=[words.Edit(**_worded(edit)) for edit in field["edits"]])
    return words.Steering(**rest)


def _worded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields with the contract's names for words, objects within too."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found[name] = _worded(value)
        else:
            found[name] = f"{_ENUMS[name]}_{value.upper()}" if name in _ENUMS else value
    return found


def generate(body: Mapping[str, Any]) -> inference.GenerateRequest:
    """A text completion."""
    rest = dict(body)
    prompt = rest.pop("prompt", None)
    request = inference.GenerateRequest(model=rest.pop("model", ""))
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, list | tuple) and all(isinstance(token, int) for token in prompt):
        request.token_ids.ids.extend(prompt)
    else:
        raise TypeError("over gRPC a prompt is one text, or one list of tokens; ask once for each of several")
    logprobs = rest.pop("logprobs", None)
    if logprobs is not None:
        request.sampling.logprobs = logprobs
    _rest(request, rest)
    return request


def chat_complete(body: Mapping[str, Any]) -> inference.ChatCompleteRequest:
    """A chat completion."""
    rest = dict(body)
    request = inference.ChatCompleteRequest(model=rest.pop("model", ""))
    request.messages.extend(_turns(rest.pop("messages", ())))
    if "max_completion_tokens" in rest:
        rest["max_tokens"] = rest.pop("max_completion_tokens")
    top = rest.pop("top_logprobs", None)
    if rest.pop("logprobs", None):
        request.sampling.logprobs = top or 0
    _rest(request, rest)
    return request


def _rest(request: inference.GenerateRequest | inference.ChatCompleteRequest, rest: dict[str, Any]) -> None:
    for name in ("stream", "stream_options"):
        rest.pop(name, None)
    if (field := rest.pop("steering", None)) is not None:
        request.steering.CopyFrom(steering(field))
    stop = rest.pop("stop", None)
    if stop is not None:
        request.sampling.stop.extend([stop] if isinstance(stop, str) else stop)
    for name in _SAMPLING & rest.keys():
        if (value := rest.pop(name)) is not None:
            setattr(request.sampling, name, value)
    if rest:
        options = Struct()
        options.update(rest)
        request.options.CopyFrom(options)


def _turns(messages: Iterable[Mapping[str, Any]]) -> list[inference.ChatMessage]:
    turns = []
    for message in messages:
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise TypeError("over gRPC the content of a message is text")
        calls = [
            inference.ToolCall(id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"])
            for call in message.get("tool_calls") or ()
        ]
        role, call_id = message["role"], message.get("tool_call_id")
        turns.append(inference.ChatMessage(role=role, content=content, tool_calls=calls, tool_call_id=call_id))
    return turns


def compare(body: Mapping[str, Any]) -> inference.CompareRequest:
    """A comparison."""
    rest = {key: value for key, value in body.items() if key != "arms"}
    request = inference.CompareRequest()
    if "messages" in rest:
        request.chat.CopyFrom(chat_complete(rest))
    else:
        request.generate.CopyFrom(generate(rest))
    for arm in body["arms"]:
        said = inference.Arm(name=arm["name"], system_prompt=arm.get("system_prompt"))
        if arm.get("steering") is not None:
            said.steering.CopyFrom(steering(arm["steering"]))
        request.arms.append(said)
    return request


def inspect(body: Mapping[str, Any]) -> service.InspectRequest:
    """An inspection."""
    request = service.InspectRequest(bundle=body["bundle"], top_count=body.get("top_count"))
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt is not None:
        request.token_ids.ids.extend(prompt)
    if "messages" in body:
        request.chat.messages.extend(_turns(body["messages"]))
    if body.get("steering") is not None:
        request.steering.CopyFrom(steering(body["steering"]))
    return request


def text_json(reply: inference.GenerateResponse) -> dict[str, Any]:
    """A text completion, or a chunk of one."""
    choices = [
        {
            "index": completion.index,
            "text": completion.text,
            "finish_reason": completion.finish_reason or None,
            "logprobs": _text_logprobs(completion.logprobs),
        }
        for completion in reply.completions
    ]
    return _whole(reply, "text_completion", choices)


def chat_json(reply: inference.ChatCompleteResponse, *, chunk: bool) -> dict[str, Any]:
    """A chat completion, or a chunk of one."""
    choices = []
    for choice in reply.choices:
        turn: dict[str, Any] = {"role": choice.message.role or None, "content": choice.message.content}
        if choice.message.reasoning:
            turn["reasoning"] = choice.message.reasoning
        if choice.message.tool_calls:
            turn["tool_calls"] = [
                {
                    "index": call.index,
                    "id": call.id or None,
                    "type": "function",
                    "function": {"name": call.name or None, "arguments": call.arguments},
                }
                for call in choice.message.tool_calls
            ]
        logprobs = {"content": [_logprob(token) for token in choice.logprobs]} if choice.logprobs else None
        finish = choice.finish_reason or None
        said = {"delta" if chunk else "message": turn}
        choices.append({"index": choice.index, **said, "finish_reason": finish, "logprobs": logprobs})
    return _whole(reply, "chat.completion.chunk" if chunk else "chat.completion", choices)


def _whole(
    reply: inference.GenerateResponse | inference.ChatCompleteResponse, kind: str, choices: list[Any]
) -> dict[str, Any]:
    document = {"id": reply.id, "object": kind, "created": 0, "model": reply.model, "choices": choices}
    if reply.HasField("usage"):
        prompt, completion = reply.usage.prompt_token_count, reply.usage.completion_token_count
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        document["usage"] = counts
    if reply.HasField("steering"):
        document["steering"] = _applied(reply.steering)
    return document


def _logprob(token: inference.TokenLogprob) -> dict[str, Any]:
    own = {"token": token.token, "logprob": token.logprob, "bytes": None}
    return {**own, "top_logprobs": [{k: v for k, v in _logprob(t).items() if k != "top_logprobs"} for t in token.top]}


def _text_logprobs(tokens: Iterable[inference.TokenLogprob]) -> dict[str, Any] | None:
    tokens = list(tokens)
    if not tokens:
        return None
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{top.token: top.logprob for top in token.top} for token in tokens],
    }


def _applied(message: words.Applied) -> dict[str, Any]:
    found: dict[str, Any] = {"status": _word(message, "status")}
    if message.plan:
        found |= {"plan": message.plan, "bundles": list(message.bundles)}
    if message.reason:
        found["reason"] = message.reason
    if found["status"] == "applied":
        found |= _counts(message)
        found["hook_points"] = {point.hook_point: _counts(point) for point in message.hook_points}
    return found


def _counts(message: words.Applied | words.HookPointProof) -> dict[str, Any]:
    return {ours: getattr(message, theirs) for theirs, ours in _COUNTS.items()}


def _word(message: Message, name: str) -> str:
    """An enum's word; of a later release's, its number."""
    enum: Any = message.DESCRIPTOR.fields_by_name[name].enum_type
    value = getattr(message, name)
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    known = enum.values_by_number.get(value)
    return str(value) if known is None else known.name.removeprefix(prefix).lower()


def piece_json(piece: inference.CompareResponse) -> dict[str, Any]:
    """What is new of one arm."""
    chunk = text_json(piece.generate) if piece.HasField("generate") else chat_json(piece.chat, chunk=True)
    return {"arm": piece.arm, "name": piece.name, "seed": piece.seed, "chunk": chunk}


def validation_json(reply: words.Validation) -> dict[str, Any]:
    """What the server would do with some edits."""
    points = list(reply.hook_points)
    return {"plan": reply.plan, "bundles": list(reply.bundles), "hook_points": points, "n_rows": reply.row_count}


def summary_json(bundle: words.BundleSummary) -> dict[str, Any]:
    """A bundle of a listing."""
    names = ("name", "content_hash", "behaviour", "model", "hook_point", "pinned")
    edits = []
    for edit in bundle.edits:
        direction = str(edit.WhichOneof("direction"))
        said = {direction: getattr(edit, direction), "operation": _word(edit, "operation")}
        if edit.HasField("amount"):
            said["amount"] = edit.amount
        edits.append({**said, "unit": _word(edit, "unit"), "scope": _word(edit, "scope")})
    counts = {"n_latents": bundle.latent_count, "n_vectors": bundle.vector_count, "edits": edits}
    return {name: getattr(bundle, name) for name in names} | counts


def bundle_json(bundle: service.Bundle) -> dict[str, Any]:
    """A bundle with its latents."""
    latents = []
    for latent in bundle.latents:
        found: dict[str, Any] = {"latent": latent.latent, "max_activation": latent.max_activation}
        for name in ("label", "attribution", "attribution_se", "effect", "effect_se", "density"):
            found[name] = getattr(latent, name) if latent.HasField(name) else None
        bounds = (latent.strength_min, latent.strength_max) if latent.HasField("strength_min") else None
        latents.append({**found, "strength_range": bounds, "top_tokens": list(latent.top_tokens)})
    return {**summary_json(bundle.summary), "latents": latents}


def inspection_json(reply: service.InspectResponse) -> dict[str, Any]:
    """What latents read in a text."""
    tokens = [
        {
            "id": token.id,
            "text": token.text,
            "latents": [
                {"latent": a.latent, "activation": a.activation, "fraction_of_max": a.fraction_of_max}
                for a in token.latents
            ],
        }
        for token in reply.tokens
    ]
    where = {"content_hash": reply.content_hash, "hook_point": reply.hook_point}
    return {**where, "tokens": tokens, "steering": _applied(reply.steering)}
