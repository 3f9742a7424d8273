"""Messages as the JSON of the HTTP API, and the path of a JSON field in its message. Pure."""

from collections.abc import Iterable
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from trimtab.server.errors import InvalidRequest, Violation
from trimtab.v1 import inference_pb2 as inference
from trimtab.v1 import steering_pb2 as steering
from trimtab.v1 import steering_service_pb2 as service

__all__ = [
    "change",
    "change_path",
    "chat_complete",
    "compare",
    "compare_path",
    "generate",
    "inspect",
    "inspect_path",
    "messages",
    "path",
    "steering_field",
    "structure",
]

_SAMPLING = tuple(field.name for field in inference.Sampling.DESCRIPTOR.fields)
_TOP = ("model", "messages", "steering", "arms", "bundle", "top_count")
_REQUIRED = {("Gate", "latent"), ("Gate", "above")}
"""Fields of no presence whose zero is a value."""


def generate(request: inference.GenerateRequest, *, stream: bool) -> dict[str, Any]:
    """The body of a text completion."""
    body: dict[str, Any] = {"model": request.model, **_sampling(request.sampling)}
    match request.WhichOneof("prompt"):
        case "text":
            body["prompt"] = request.text
        case "token_ids":
            body["prompt"] = list(request.token_ids.ids)
        case _:
            raise InvalidRequest([Violation("prompt", "is missing; give `text` or `token_ids`")])
    if request.sampling.HasField("logprobs"):
        body["logprobs"] = request.sampling.logprobs
    return _whole(body, request, inference.GenerateRequest, stream)


def chat_complete(request: inference.ChatCompleteRequest, *, stream: bool) -> dict[str, Any]:
    """The body of a chat completion."""
    body: dict[str, Any] = {"model": request.model, **_sampling(request.sampling)}
    body["messages"] = messages(request.messages)
    if request.sampling.HasField("logprobs"):
        body |= {"logprobs": True, "top_logprobs": request.sampling.logprobs}
    return _whole(body, request, inference.ChatCompleteRequest, stream)


def compare(request: inference.CompareRequest) -> dict[str, Any]:
    """The body of a comparison."""
    match request.WhichOneof("request"):
        case "generate":
            body = generate(request.generate, stream=False)
        case "chat":
            body = chat_complete(request.chat, stream=False)
        case _:
            raise InvalidRequest([Violation("request", "is missing; give `generate` or `chat`")])
    return {**body, "arms": [_arm(arm) for arm in request.arms]}


def _arm(arm: inference.Arm) -> dict[str, Any]:
    found: dict[str, Any] = {"name": arm.name}
    if arm.HasField("steering"):
        found["steering"] = steering_field(arm.steering)
    if arm.system_prompt:
        found["system_prompt"] = arm.system_prompt
    return found


def inspect(request: service.InspectRequest) -> dict[str, Any]:
    """The body of an inspection."""
    body: dict[str, Any] = {"bundle": request.bundle}
    match request.WhichOneof("prompt"):
        case "text":
            body["prompt"] = request.text
        case "token_ids":
            body["prompt"] = list(request.token_ids.ids)
        case "chat":
            body["messages"] = messages(request.chat.messages)
    if request.HasField("top_count"):
        body["top_count"] = request.top_count
    if request.HasField("steering"):
        body["steering"] = steering_field(request.steering)
    return body


def messages(turns: Iterable[inference.ChatMessage]) -> list[dict[str, Any]]:
    """The `messages` of a chat."""
    return [_turn(turn) for turn in turns]


def _turn(turn: inference.ChatMessage) -> dict[str, Any]:
    said: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.tool_calls:
        said["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.tool_calls
        ]
    if turn.tool_call_id:
        said["tool_call_id"] = turn.tool_call_id
    return said


def _sampling(sampling: inference.Sampling) -> dict[str, Any]:
    own = [name for name in _SAMPLING if name not in ("stop", "ignore_eos", "logprobs")]
    found = {name: getattr(sampling, name) for name in own if sampling.HasField(name)}
    if sampling.stop:
        found["stop"] = list(sampling.stop)
    if sampling.ignore_eos:
        found["ignore_eos"] = True
    return found


def _whole(body: dict[str, Any], request: Any, kind: type[Message], stream: bool) -> dict[str, Any]:
    options = structure(request.options, "options") if request.HasField("options") else {}
    taken = {*_SAMPLING, *kind.DESCRIPTOR.fields_by_name, "prompt", "stream", "stream_options", "top_logprobs"}
    clashes = [
        Violation(f"options.{name}", "has its place elsewhere in this message, or is the server's to set")
        for name in options
        if name in taken
    ]
    if clashes:
        raise InvalidRequest(clashes)
    if request.HasField("steering"):
        body["steering"] = steering_field(request.steering)
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return options | body


def structure(message: Struct, field: str) -> dict[str, Any]:
    """The JSON object of a `Struct`, which has doubles alone: whole ones are integers again, as JSON would have them.

    Raises:
        InvalidRequest: it holds NaN or an infinity, by the name of the whole `field`.
    """
    try:
        return {name: _numbers(value) for name, value in MessageToDict(message).items()}
    except ValueError as e:
        raise InvalidRequest([Violation(field, "holds NaN or an infinity, which JSON has not")]) from e


def _numbers(value: Any) -> Any:
    match value:
        case float() if value.is_integer() and abs(value) < 2**53:
            return int(value)
        case dict():
            return {key: _numbers(item) for key, item in value.items()}
        case list():
            return [_numbers(item) for item in value]
        case _:
            return value


def steering_field(message: steering.Steering) -> dict[str, Any]:
    """The `steering` field of a request."""
    field = _fields(message)
    if "free_form" in field:
        field["edits"] = field.pop("free_form").get("edits", [])
    return field


def _fields(message: Message) -> dict[str, Any]:
    """What is set, by name; an enum as its word, a number that it does not know as that number, for admission to refuse."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence:
            if not message.HasField(field.name):
                continue
        elif not value and (message.DESCRIPTOR.name, field.name) not in _REQUIRED:
            continue
        if field.enum_type is not None:
            found[field.name] = _word(field.enum_type, value)
        elif field.message_type is not None:
            found[field.name] = [_fields(item) for item in value] if field.is_repeated else _fields(value)
        else:
            found[field.name] = value
    return found


def _word(enum: Any, number: int) -> str:
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    known = enum.values_by_number.get(number)
    return str(number) if known is None else known.name.removeprefix(prefix).lower()


def change(request: Message) -> dict[str, Any]:
    """The body of a change of a version: all but which one."""
    found = _fields(request)
    found.pop("reference", None)
    return {"default" if name == "make_default" else name: value for name, value in found.items()}


def change_path(field: str) -> str:
    """`path` in a change of a version."""
    return {"version": "reference", "default": "make_default"}.get(field, field)


def compare_path(field: str, kind: str | None, prompt: str) -> str:
    """`path` in a comparison."""
    if field.startswith("arms"):
        return field.replace("].steering.edits", "].steering.free_form.edits", 1)
    return f"{kind}.{path(field, prompt=prompt)}" if kind else field


def inspect_path(field: str, prompt: str) -> str:
    """`path` in an inspection."""
    return field.replace("messages", "chat.messages", 1) if field.startswith("messages") else path(field, prompt=prompt)


def path(field: str, *, prompt: str = "text") -> str:
    """Where a field of the JSON is in its message; `prompt` is what the message calls its prompt."""
    first = field.replace("[", ".").partition(".")[0]
    if field.startswith("steering.edits"):
        return field.replace("steering.edits", "steering.free_form.edits", 1)
    if first in _SAMPLING:
        return f"sampling.{field}"
    if first == "prompt":
        return prompt + field.removeprefix("prompt")
    return field if first in _TOP or first == "body" else f"options.{field}"
