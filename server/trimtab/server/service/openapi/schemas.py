"""The schemas that operations refer to: requests from the models that parse them, answers as the routes write them."""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeResponse,
)

from trimtab.attribution.bundle import Header, RecommendedEdit
from trimtab.server.experiments.definition import Experiment
from trimtab.server.experiments.lifecycle import State
from trimtab.server.experiments.outcomes import MAX_OUTCOMES, Given
from trimtab.server.fleet.switch import Mode
from trimtab.server.keys.key import SCOPES, Policy
from trimtab.server.service import admin_routes, compare, experiment_routes, inspect, versions
from trimtab.server.service.admission import SERVERS_OWN
from trimtab.server.steering import Steering

__all__ = ["components", "ref"]

Schema = dict[str, Any]
_TEMPLATE = "#/components/schemas/{model}"
_MANY = 100
"""A model of more parts than this (OpenAI's Responses) is shown by its own fields alone."""

NULLABLE_TEXT: Schema = {"type": ["string", "null"]}
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
COUNTS = ("prompt_tokens", "completion_tokens", "cached_prompt_tokens", "gate_firings", "special_tokens")
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
PLAN: Schema = {"type": "string", "pattern": "^sha256:[0-9a-f]{32}$"}
DIGEST: Schema = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}


def ref(name: str) -> Schema:
    """A reference to a component."""
    return {"$ref": f"#/components/schemas/{name}"}


_STEERING: Schema = {"steering": {"anyOf": [ref("Steering"), ref("OptOut")]}}
_STEERED: Mapping[str, Schema] = {
    "ComparedArm": _STEERING,
    "Inspection": _STEERING,
    "NewKey": {"scopes": {"type": "array", "items": {"enum": list(SCOPES)}, "minItems": 1}},
    "NewExperiment": {"definition": ref("ExperimentDefinition")},
    "Told": {"outcomes": {"type": "array", "items": ref("Outcome"), "minItems": 1, "maxItems": MAX_OUTCOMES}},
    "NewDefault": {"steering": ref("Steering")},
    "Kill": {"fallback": {"anyOf": [ref("Steering"), {"type": "null"}]}},
}
"""Fields that pydantic reads as they are, and that are looked at more closely afterwards."""


def components() -> dict[str, Schema]:
    """All of them, by name."""
    found: dict[str, Schema] = {}
    own: dict[str, type[BaseModel]] = {
        "Steering": Steering,
        "Promotion": versions.Promotion,
        "Choice": versions.Choice,
        "Revocation": versions.Revocation,
        "NewKey": admin_routes.NewKey,
        "Rotation": admin_routes.Rotation,
        "NewDefault": admin_routes.NewDefault,
        "Kill": admin_routes.Kill,
        "Policy": Policy,
        "RecommendedEdit": RecommendedEdit,
        "ComparedArm": compare.Arm,
        "Inspection": inspect.Asked,
        "ExperimentDefinition": Experiment,
        "NewExperiment": experiment_routes.NewExperiment,
        "Move": experiment_routes.Move,
        "Ramp": experiment_routes.Ramp,
        "Share": experiment_routes.Share,
        "Told": experiment_routes.Told,
        "Outcome": Given,
    }
    for name, model in own.items():
        _add(found, name, model, extra=_STEERED.get(name))
    shown = {"hook_point": TEXT, "content_hash": DIGEST, "pinned": FLAG}
    _add(found, "BundleShown", Header, mode="serialization", extra=shown, requires=tuple(shown))
    for name, model in (
        ("ChatCompletionRequest", ChatCompletionRequest),
        ("CompletionRequest", CompletionRequest),
        ("ResponsesRequest", ResponsesRequest),
    ):
        _add(found, name, model, extra=_STEERING)
    for name, model in (
        ("TokenizeChatRequest", TokenizeChatRequest),
        ("TokenizeCompletionRequest", TokenizeCompletionRequest),
        ("DetokenizeRequest", DetokenizeRequest),
    ):
        _add(found, name, model)
    for name, model in (
        ("ChatCompletion", ChatCompletionResponse),
        ("Completion", CompletionResponse),
        ("Response", ResponsesResponse),
    ):
        _add(found, name, model, mode="serialization", extra={"steering": ref("Applied")}, requires=("steering",))
    _add(found, "Tokens", TokenizeResponse, mode="serialization")
    _add(found, "Detokenized", DetokenizeResponse, mode="serialization")
    found["ComparisonRequest"] = _comparison(found)
    return found | _answers()


def _add(
    found: dict[str, Schema],
    name: str,
    model: type[BaseModel],
    *,
    mode: Any = "validation",
    extra: Mapping[str, Schema] | None = None,
    requires: tuple[str, ...] = (),
) -> None:
    schema = model.model_json_schema(mode=mode, ref_template=_TEMPLATE)
    parts = schema.pop("$defs", {})
    properties = {key: value for key, value in schema.get("properties", {}).items() if key not in SERVERS_OWN}
    if len(parts) > _MANY:
        parts = {}
        properties = {key: _shallow(value) for key, value in properties.items()}
    schema["properties"] = properties | dict(extra or {})
    if requires:
        schema["required"] = [*schema.get("required", ()), *requires]
    if model.__doc__ is None or "description" not in schema:
        schema.pop("description", None)
    # Parts that two models share are one; OpenAI's and vLLM's never have the same name with another meaning.
    found |= {part: value for part, value in parts.items() if part not in found} | {name: schema}


def _shallow(schema: Schema) -> Schema:
    """A field of a model with too many parts: as it is when it has none, and otherwise by name alone."""
    if "$ref" not in repr(schema):
        return schema
    told: Schema = {key: schema[key] for key in ("title", "description", "default") if key in schema}
    return told if "description" in told else {**told, "description": "As in OpenAI's API."}


def _comparison(found: Mapping[str, Schema]) -> Schema:
    """A comparison is a completion or a chat without `steering`, with arms."""
    arms = {"type": "array", "minItems": 1, "maxItems": compare.MAX_ARMS, "items": ref("ComparedArm")}
    chat = found["ChatCompletionRequest"]["properties"]
    common = {
        name: chat[name] for name in ("model", "messages", "max_tokens", "temperature", "seed", "top_p", "stream")
    }
    return {
        "type": "object",
        "description": "A chat (`messages`) or a text completion (`prompt`), its sampling, and its arms.",
        "properties": {**common, "prompt": TEXT, "arms": arms},
        "required": ["arms"],
    }


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None, **more: Any) -> Schema:
    """What we write ourselves: every field is told."""
    properties = {**required, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


def _list(of: Schema) -> Schema:
    return _object({"object": {"const": "list"}, "data": {"type": "array", "items": of}})


def _answers() -> dict[str, Schema]:
    counts = dict.fromkeys(
        ("prompt_tokens", "completion_tokens", "cached_prompt_tokens", "gate_firings", "special_tokens"), COUNT
    )
    norms = dict.fromkeys(("max_relative_norm", "mean_relative_norm"), NUMBER)
    violation = _object({"field": TEXT, "message": TEXT})
    error = _object(
        {"message": TEXT, "type": TEXT, "param": NULLABLE_TEXT, "code": TEXT},
        {"violations": {"type": "array", "items": violation}},
    )
    running = {"enum": ["end", "finish"]}
    version = {
        "reference": TEXT, "name": TEXT, "number": {"type": "integer", "minimum": 1},
        "state": {"enum": ["draft", "active", "revoked"]}, "is_default": FLAG, "content_hash": DIGEST, "file_digest": DIGEST,
        "n_bytes": COUNT, "model": TEXT, "fingerprint": TEXT, "hook_point": TEXT, "behaviour": TEXT, "signed": FLAG,
        "created_at": TEXT, "created_by": TEXT, "changed_at": TEXT, "reason": TEXT,
        "running": {"enum": [*running["enum"], None]}, "not_loaded": NULLABLE_TEXT,
    }  # fmt: skip
    key = {
        "id": TEXT, "label": TEXT, "scopes": {"type": "array", "items": TEXT}, "policy": ref("Policy"), "created_at": TEXT,
        "created_by": TEXT, "expires_at": NULLABLE_TEXT, "revoked_at": NULLABLE_TEXT, "rotated_from": NULLABLE_TEXT,
    }  # fmt: skip
    summary = _object(
        {
            "name": TEXT, "content_hash": DIGEST, "behaviour": TEXT, "model": TEXT, "hook_point": TEXT, "n_latents": COUNT,
            "n_vectors": COUNT, "edits": {"type": "array", "items": ref("RecommendedEdit")}, "pinned": FLAG,
        }
    )  # fmt: skip
    default = _object({"kind": {"enum": ["fleet", "key", "alias"]}, "subject": TEXT, "steering": ref("Steering")})
    switch = _object(
        {
            "mode": {"enum": list(get_args(Mode))}, "fallback": {"anyOf": [ref("Steering"), {"type": "null"}]},
            "running": running, "reason": TEXT, "actor": TEXT, "at": TEXT,
        }
    )  # fmt: skip
    entry = _object(
        {
            "sequence": {"type": "integer", "minimum": 1}, "at": TEXT, "actor": TEXT, "action": TEXT, "subject": TEXT,
            "detail": {"type": "object"}, "previous": DIGEST, "digest": DIGEST,
        }
    )  # fmt: skip
    latent = _object({"latent": COUNT, "activation": NUMBER, "fraction_of_max": NUMBER})
    token = _object({"id": COUNT, "text": TEXT, "latents": {"type": "array", "items": latent}})
    card = {"type": "object", "properties": {"id": TEXT, "object": {"const": "model"}}, "required": ["id", "object"]}
    arm = _object({"name": TEXT, "reply": {"anyOf": [ref("ChatCompletion"), ref("Completion")]}})
    stands = {
        "key": TEXT,
        "state": {"enum": list(get_args(State))},
        "coverage": NUMBER,
        "revision": {"type": "integer"},
    }
    measured = {
        "type": "object",
        "description": "docs/experiments.md has its fields.",
        "properties": stands,
        "required": list(stands),
    }
    shown = {**measured, "properties": {**stands, "definition": ref("ExperimentDefinition")}}
    return {
        "Error": _object({"error": error}, description="OpenAI's shape; `code` is stable, and docs/api.md lists them."),
        "OptOut": _object({"opt_out": {"const": True}}, description="No steering, not even a default one."),
        "Applied": {
            "type": "object",
            "description": "What was applied, counted where it was applied.",
            "properties": {
                "status": {"enum": ["applied", "not_requested", "requested", "failed_open", "killed"]},
                "plan": PLAN, "bundles": {"type": "array", "items": TEXT}, **counts, **norms,
                "hook_points": {"type": "object", "additionalProperties": _object({**counts, **norms})},
            },
            "required": ["status"],
        },
        "Validation": _object(
            {
                "valid": {"const": True}, "plan": PLAN, "bundles": {"type": "array", "items": TEXT},
                "hook_points": {"type": "array", "items": TEXT}, "n_rows": COUNT,
            }
        ),
        "Comparison": _object(
            {"object": {"const": "steering.comparison"}, "seed": {"type": "integer"}, "arms": {"type": "array", "items": arm}}
        ),
        "Reading": _object(
            {
                "object": {"const": "steering.inspection"}, "bundle": TEXT, "content_hash": DIGEST, "hook_point": TEXT,
                "tokens": {"type": "array", "items": token}, "steering": ref("Applied"),
            }
        ),
        "Experiment": shown, "Experiments": _list(shown),
        "ExperimentHealth": measured, "ExperimentResults": measured,
        "Holdout": _object({"share": NUMBER}),
        "Recorded": {"type": "object"},
        "Looks": {"type": "object", "description": "docs/experiments.md has its fields."},
        "Models": _list(card), "Bundle": summary, "Bundles": _list(summary),
        "Removed": _object({"name": TEXT, "content_hash": DIGEST, "deleted": {"const": True}}),
        "Workers": _list({"type": "object", "required": ["layers", "bundles", "requests"]}),
        "Version": _object(version), "Versions": _list(_object(version)),
        "Key": _object(key), "Keys": _list(_object(key)),
        "MadeKey": _object({**key, "key": TEXT}, description="`key` is shown this once."),
        "Default": default, "Defaults": _list(default),
        "RemovedDefault": _object({"kind": TEXT, "subject": TEXT, "deleted": {"const": True}}),
        "Switch": switch, "AuditEntries": _list(entry),
        "Live": _object({"status": {"const": "live"}}),
        "Ready": _object({"status": {"enum": ["ready", "draining", "engine_dead", "stale"]}}),
    }  # fmt: skip
