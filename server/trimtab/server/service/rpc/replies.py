"""The JSON of the HTTP API as messages. Pure."""

from collections.abc import Mapping
from typing import Any

from trimtab.v1 import inference_pb2 as inference
from trimtab.v1 import registry_service_pb2 as registry
from trimtab.v1 import steering_pb2 as steering
from trimtab.v1 import steering_service_pb2 as service

__all__ = ["applied", "bundle", "chat_complete", "generate", "inspection", "summary", "validation", "version"]

_COUNTS = {
    "prompt_tokens": "prompt_token_count",
    "completion_tokens": "completion_token_count",
    "cached_prompt_tokens": "cached_prompt_token_count",
    "gate_firings": "gate_firing_count",
    "special_tokens": "special_token_count",
    "max_relative_norm": "max_relative_norm",
    "mean_relative_norm": "mean_relative_norm",
}


def generate(document: Mapping[str, Any]) -> inference.GenerateResponse:
    """A text completion, or a chunk of one."""
    reply = inference.GenerateResponse(id=document.get("id"), model=document.get("model"))
    for choice in document.get("choices") or ():
        reply.completions.append(
            inference.Completion(
                index=choice["index"],
                text=choice.get("text"),
                finish_reason=choice.get("finish_reason") or "",
                logprobs=_text_logprobs(choice.get("logprobs")),
            )
        )
    _rest(reply, document)
    return reply


def chat_complete(document: Mapping[str, Any]) -> inference.ChatCompleteResponse:
    """A chat completion, or a chunk of one."""
    reply = inference.ChatCompleteResponse(id=document.get("id"), model=document.get("model"))
    for choice in document.get("choices") or ():
        logprobs = (choice.get("logprobs") or {}).get("content") or ()
        reply.choices.append(
            inference.ChatChoice(
                index=choice["index"],
                message=_turn(choice.get("message") or choice.get("delta") or {}),
                finish_reason=choice.get("finish_reason") or "",
                logprobs=[_logprob(token) for token in logprobs],
            )
        )
    _rest(reply, document)
    return reply


def _rest(reply: inference.GenerateResponse | inference.ChatCompleteResponse, document: Mapping[str, Any]) -> None:
    if usage := document.get("usage"):
        reply.usage.prompt_token_count = usage["prompt_tokens"]
        reply.usage.completion_token_count = usage.get("completion_tokens") or 0
    if "steering" in document:
        reply.steering.CopyFrom(applied(document["steering"]))


def _turn(turn: Mapping[str, Any]) -> inference.ChatMessage:
    calls = [
        inference.ToolCall(
            id=call.get("id"),
            name=(call.get("function") or {}).get("name"),
            arguments=(call.get("function") or {}).get("arguments"),
            index=call.get("index", i),
        )
        for i, call in enumerate(turn.get("tool_calls") or ())
    ]
    role, content, reasoning = turn.get("role"), turn.get("content"), turn.get("reasoning")
    return inference.ChatMessage(role=role, content=content, reasoning=reasoning, tool_calls=calls)


def _logprob(token: Mapping[str, Any]) -> inference.TokenLogprob:
    top = [_logprob(other) for other in token.get("top_logprobs") or ()]
    return inference.TokenLogprob(token=token["token"], logprob=token["logprob"], top=top)


def _text_logprobs(found: Mapping[str, Any] | None) -> list[inference.TokenLogprob]:
    if not found:
        return []
    tops = found.get("top_logprobs") or [None] * len(found["tokens"])
    return [
        inference.TokenLogprob(
            token=token,
            logprob=logprob,
            top=[inference.TokenLogprob(token=other, logprob=value) for other, value in (top or {}).items()],
        )
        for token, logprob, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True)
    ]


def applied(document: Mapping[str, Any]) -> steering.Applied:
    """The `steering` object of a reply."""
    points = [
        steering.HookPointProof(hook_point=name, **_counts(point))
        for name, point in document.get("hook_points", {}).items()
    ]
    return steering.Applied(
        status=f"STATUS_{document['status'].upper()}",
        plan=document.get("plan"),
        bundles=document.get("bundles", ()),
        hook_points=points,
        reason=document.get("reason"),
        experiment=document.get("experiment"),
        **_counts(document),
    )


def _counts(document: Mapping[str, Any]) -> dict[str, Any]:
    return {theirs: document[ours] for ours, theirs in _COUNTS.items() if ours in document}


def validation(document: Mapping[str, Any]) -> steering.Validation:
    """What `validate` says."""
    return steering.Validation(
        plan=document["plan"],
        bundles=document["bundles"],
        hook_points=document["hook_points"],
        row_count=document["n_rows"],
    )


def summary(document: Mapping[str, Any]) -> steering.BundleSummary:
    """A bundle of a listing."""
    names = ("name", "content_hash", "behaviour", "model", "hook_point", "pinned")
    return steering.BundleSummary(
        **{name: document[name] for name in names},
        latent_count=document["n_latents"],
        vector_count=document["n_vectors"],
        edits=[_recommended(edit) for edit in document["edits"]],
    )


def _recommended(edit: Mapping[str, Any]) -> steering.RecommendedEdit:
    return steering.RecommendedEdit(
        operation=f"OPERATION_{edit['operation'].upper()}",
        unit=f"UNIT_{edit.get('unit', 'raw').upper()}",
        scope=f"SCOPE_TOKENS_{edit.get('scope', 'all').upper()}",
        exclude_special=edit.get("exclude_special", False),
        **{name: edit[name] for name in ("latent", "vector", "amount") if name in edit},
    )


def bundle(listed: Mapping[str, Any], header: Mapping[str, Any]) -> service.Bundle:
    """A bundle with what it holds, of its line in a listing and its header."""
    plain = ("latent", "label", "attribution", "attribution_se", "effect", "effect_se", "max_activation", "density")
    latents = []
    for latent in header["latents"]:
        low, high = latent["strength_range"] or (None, None)
        fields = {name: latent[name] for name in plain}
        latents.append(
            service.BundleLatent(**fields, strength_min=low, strength_max=high, top_tokens=latent["top_tokens"])
        )
    return service.Bundle(
        summary=summary(listed),
        latents=latents,
        vectors=[service.BundleVector(**vector) for vector in header["vectors"]],
        sae=header["sae"]["id"],
        resid_norm=header["resid_norm"],
    )


def inspection(document: Mapping[str, Any]) -> service.InspectResponse:
    """What latents read in a text."""
    return service.InspectResponse(
        content_hash=document["content_hash"],
        hook_point=document["hook_point"],
        steering=applied(document["steering"]),
        tokens=[
            service.InspectedToken(
                id=token["id"],
                text=token["text"],
                latents=[service.LatentActivation(**latent) for latent in token["latents"]],
            )
            for token in document["tokens"]
        ],
    )


def version(document: Mapping[str, Any]) -> registry.BundleVersion:
    """A version of a bundle."""
    same = [field.name for field in registry.BundleVersion.DESCRIPTOR.fields if field.name in document]
    running = document["running"] or "unspecified"
    return registry.BundleVersion(
        **{name: document[name] for name in same if name not in ("state", "running")},
        state=f"VERSION_STATE_{document['state'].upper()}",
        running=f"RUNNING_{running.upper()}",
        byte_count=document["n_bytes"],
        is_signed=document["signed"],
    )
