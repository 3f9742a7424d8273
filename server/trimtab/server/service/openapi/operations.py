"""What each route takes, answers and refuses: one entry for each HTTP line of `keys.access.ROUTES`, which a test holds it to."""

from collections.abc import Mapping
from typing import NamedTuple, get_args

from trimtab.server.experiments.lifecycle import State
from trimtab.server.experiments.looks import MAX_LOOKS

__all__ = ["OPERATIONS", "Operation", "Parameter"]

_JSON = "application/json"
_OCTETS = "application/octet-stream"
_EVENTS = "text/event-stream"
_PLAIN = "text/plain"
_NDJSON = "application/x-ndjson"


class Parameter(NamedTuple):
    """In the query or in a header, and never required."""

    name: str
    place: str
    schema: Mapping[str, object]
    description: str


class Operation(NamedTuple):
    """One route."""

    summary: str
    answers: Mapping[int, Mapping[str, str]]
    """Of each status that is none of an error: the component by media type; empty is whatever bytes."""
    body: Mapping[str, str] | None = None
    """The component by media type; empty is whatever bytes."""
    is_body_required: bool = True
    refuses: tuple[int, ...] = ()
    """Statuses of its errors, beside those of the gate."""
    parameters: tuple[Parameter, ...] = ()
    links: Mapping[str, str] | None = None
    """Of operations that take something of its answer: `METHOD path#parameter` to the field."""


def _answer(name: str, status: int = 200) -> dict[int, dict[str, str]]:
    return {status: {_JSON: name}}


def _generates(name: str, streams: bool = True) -> dict[int, dict[str, str]]:
    return {200: {_JSON: name, **({_EVENTS: ""} if streams else {})}}


_GENERATION = (400, 404, 409, 410, 413, 429)
_SWITCH: Mapping[str, object] = {"enum": ["true", "false"]}
_VERSION = "/admin/v1/bundles/{reference}"
_OF_VERSION = {
    f"POST {_VERSION}/promote#reference": "reference",
    f"POST {_VERSION}/default#reference": "reference",
    f"POST {_VERSION}/revoke#reference": "reference",
    f"GET {_VERSION}#reference": "reference",
    f"GET {_VERSION}/file#reference": "reference",
}
_BUNDLE = "/v1/steering/bundles/{name}"
_OF_BUNDLE = {
    f"GET {_BUNDLE}#name": "name",
    f"PUT {_BUNDLE}/pin#name": "name",
    f"DELETE {_BUNDLE}/pin#name": "name",
    f"DELETE {_BUNDLE}#name": "name",
}
_EXPERIMENT = "/admin/v1/experiments/{key}"
_OF_EXPERIMENT = {
    f"{method} {_EXPERIMENT}{verb}#key": "key"
    for method, verbs in (
        ("POST", ("/start", "/ramp", "/approve", "/pause", "/resume", "/stop", "/kill", "/archive", "/purge")),
        ("GET", ("", "/health", "/results", "/looks", "/exposures", "/outcomes", "/texts")),
    )
    for verb in verbs
}
_OF_KEY = {"POST /admin/v1/keys/{id}/rotate#id": "id", "POST /admin/v1/keys/{id}/revoke#id": "id"}

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("GET", "/livez"): Operation("The process answers.", _answer("Live")),
    ("GET", "/startupz"): Operation("The start is over.", _answer("Live")),
    ("GET", "/readyz"): Operation("New work may be sent here.", {200: {_JSON: "Ready"}, 503: {_JSON: "Ready"}}),
    ("GET", "/metrics"): Operation("The series, ours and vLLM's.", {200: {_PLAIN: ""}}),
    ("GET", "/openapi.json"): Operation("This document.", {200: {_JSON: ""}}),
    ("POST", "/v1/chat/completions"): Operation(
        "A chat reply, steered.", _generates("ChatCompletion"), {_JSON: "ChatCompletionRequest"}, refuses=_GENERATION
    ),
    ("POST", "/v1/completions"): Operation(
        "A text, steered.", _generates("Completion"), {_JSON: "CompletionRequest"}, refuses=_GENERATION
    ),
    ("POST", "/v1/responses"): Operation(
        "A response, steered.", _generates("Response"), {_JSON: "ResponsesRequest"}, refuses=_GENERATION
    ),
    ("POST", "/v1/tokenize"): Operation(
        "The tokens of a text or of a chat.",
        _answer("Tokens"),
        {_JSON: "TokenizeCompletionRequest|TokenizeChatRequest"},
        refuses=(400, 404, 413),
    ),
    ("POST", "/v1/detokenize"): Operation(
        "The text of tokens.", _answer("Detokenized"), {_JSON: "DetokenizeRequest"}, refuses=(400, 404, 413)
    ),
    ("GET", "/v1/models"): Operation("The model, and `model@bundle` for each bundle.", _answer("Models")),
    ("POST", "/v1/steering/validate"): Operation(
        "The plan of a request's `steering`; nothing is run.",
        _answer("Validation"),
        {_JSON: "{steering}"},
        refuses=(400, 404, 410, 413),
    ),
    ("POST", "/v1/steering/compare"): Operation(
        "One prompt with one seed under several steerings.",
        _generates("Comparison"),
        {_JSON: "ComparisonRequest"},
        refuses=_GENERATION,
    ),
    ("POST", "/v1/steering/inspect"): Operation(
        "What a bundle's latents read in a text.", _answer("Reading"), {_JSON: "Inspection"}, refuses=_GENERATION
    ),
    ("GET", "/v1/steering/schema"): Operation("The JSON Schema of `steering`.", {200: {_JSON: ""}}),
    ("GET", "/v1/steering/workers"): Operation("Proves every worker again.", _answer("Workers")),
    ("GET", "/v1/steering/bundles"): Operation("The bundles that requests can name.", _answer("Bundles")),
    ("POST", "/v1/steering/bundles"): Operation(
        "Loads a bundle into this server: the body is its file.",
        _answer("Bundle", 200) | _answer("Bundle", 201),
        {_OCTETS: ""},
        refuses=(400, 409, 413),
        parameters=(
            Parameter("replace", "query", _SWITCH, "Take another bundle's name."),
            Parameter("pin", "query", _SWITCH, "Keep it from being replaced or removed."),
        ),
        links=_OF_BUNDLE,
    ),
    ("GET", _BUNDLE): Operation("A bundle's header.", _answer("BundleShown"), refuses=(404,)),
    ("DELETE", _BUNDLE): Operation("Removes a bundle.", _answer("Removed"), refuses=(404, 409)),
    ("PUT", f"{_BUNDLE}/pin"): Operation("Pins a bundle.", _answer("Bundle"), refuses=(404, 409)),
    ("DELETE", f"{_BUNDLE}/pin"): Operation("Lets a pinned bundle go.", _answer("Bundle"), refuses=(404, 409)),
    ("GET", "/admin/v1/bundles"): Operation("All versions of bundles.", _answer("Versions")),
    ("POST", "/admin/v1/bundles"): Operation(
        "A new version, a draft: the body is a bundle's file. The same bytes are the same version.",
        _answer("Version", 200) | _answer("Version", 201),
        {_OCTETS: ""},
        refuses=(400, 409, 413),
        parameters=(
            Parameter("X-Bundle-Signature", "header", {"type": "string"}, "The signature file, base64."),
        ),
        links=_OF_VERSION,
    ),
    ("GET", _VERSION): Operation("One version.", _answer("Version"), refuses=(400, 404)),
    ("GET", f"{_VERSION}/file"): Operation("A version's file.", {200: {_OCTETS: ""}}, refuses=(400, 404)),
    ("POST", f"{_VERSION}/promote"): Operation(
        "Requests may name the version from now on.",
        _answer("Version"), {_JSON: "Promotion"}, is_body_required=False, refuses=(400, 404, 409, 413),
    ),
    ("POST", f"{_VERSION}/default"): Operation(
        "Its name alone means this version from now on.",
        _answer("Version"), {_JSON: "Choice"}, is_body_required=False, refuses=(400, 404, 409, 413),
    ),
    ("POST", f"{_VERSION}/revoke"): Operation(
        "No request can name the version from now on, for good.",
        _answer("Version"), {_JSON: "Revocation"}, refuses=(400, 404, 413),
    ),
    ("GET", "/admin/v1/keys"): Operation("All keys.", _answer("Keys")),
    ("POST", "/admin/v1/keys"): Operation(
        "A new key, shown this once.", _answer("MadeKey", 201), {_JSON: "NewKey"}, refuses=(400, 413), links=_OF_KEY
    ),
    ("POST", "/admin/v1/keys/{id}/rotate"): Operation(
        "A new key in the place of an old one.",
        _answer("MadeKey", 201), {_JSON: "Rotation"}, is_body_required=False, refuses=(400, 404, 409, 413), links=_OF_KEY,
    ),
    ("POST", "/admin/v1/keys/{id}/revoke"): Operation(
        "The key opens nothing from now on.",
        _answer("Key"), {_JSON: "Choice"}, is_body_required=False, refuses=(400, 404, 413),
    ),
    ("GET", "/admin/v1/defaults"): Operation("All default steering.", _answer("Defaults")),
    **{
        ("PUT", path): Operation(
            "Steers requests that do not say.", _answer("Default"), {_JSON: "NewDefault"}, refuses=(400, 404, 410, 413)
        )
        for path in ("/admin/v1/defaults/{kind}", "/admin/v1/defaults/{kind}/{subject}")
    },
    **{
        ("DELETE", path): Operation("Takes default steering away.", _answer("RemovedDefault"), refuses=(400, 404))
        for path in ("/admin/v1/defaults/{kind}", "/admin/v1/defaults/{kind}/{subject}")
    },
    ("GET", "/admin/v1/kill"): Operation("How the kill switch stands.", _answer("Switch")),
    ("POST", "/admin/v1/kill"): Operation(
        "Throws the kill switch.", _answer("Switch"), {_JSON: "Kill"}, refuses=(400, 404, 410, 413)
    ),
    ("DELETE", "/admin/v1/kill"): Operation(
        "Steering goes on.",
        _answer("Switch"),
        refuses=(400,),
        parameters=(Parameter("reason", "query", {"type": "string", "maxLength": 1000}, "Why, for the audit log."),),
    ),
    ("GET", "/admin/v1/experiments"): Operation(
        "All experiments, or those in a state.",
        _answer("Experiments"),
        refuses=(400,),
        parameters=(Parameter("state", "query", {"enum": list(get_args(State))}, "Those in this state."),),
    ),
    ("POST", "/admin/v1/experiments"): Operation(
        "A new experiment, a draft.", _answer("Experiment", 201), {_JSON: "NewExperiment"}, refuses=(400, 404, 409, 410, 413),
        links=_OF_EXPERIMENT,
    ),
    ("GET", _EXPERIMENT): Operation("An experiment, with its history.", _answer("Experiment"), refuses=(404,)),
    ("PUT", _EXPERIMENT): Operation(
        "Another definition for a draft.", _answer("Experiment"), {_JSON: "NewExperiment"}, refuses=(400, 404, 409, 410, 413)
    ),
    **{
        ("POST", f"{_EXPERIMENT}/{verb}"): Operation(
            said, _answer("Experiment"), {_JSON: "Ramp" if verb == "ramp" else "Move"}, refuses=(400, 404, 409, 410, 413)
        )
        for verb, said in (
            ("start", "Units are assigned from now on."), ("ramp", "Another share of the units is covered."),
            ("approve", "The next step of the ramp may be taken."), ("pause", "Nobody is assigned for now."),
            ("resume", "Units are assigned again."), ("stop", "It is over; what it found stays."),
            ("kill", "It is over at once, for requests that run too."), ("archive", "It is put away."),
            ("purge", "What it measured is deleted, for good; its definition and history stay."),
        )
    },
    ("GET", f"{_EXPERIMENT}/health"): Operation(
        "Whether what is measured can be trusted.", _answer("ExperimentHealth"), refuses=(404, 409)
    ),
    ("GET", f"{_EXPERIMENT}/looks"): Operation(
        "How what can be said narrowed down while it ran.",
        _answer("Looks"),
        refuses=(400, 404, 409),
        parameters=(Parameter("count", "query", {"type": "integer", "minimum": 0, "maximum": MAX_LOOKS}, "How many looks."),),
    ),
    ("GET", f"{_EXPERIMENT}/results"): Operation("What can be said now.", _answer("ExperimentResults"), refuses=(404, 409)),
    **{
        ("GET", f"{_EXPERIMENT}/{what}"): Operation(
            f"Its {what}, one JSON object a line, in pages.",
            {200: {_NDJSON: ""}},
            refuses=(400, 404, 409),
            parameters=(
                Parameter("after", "query", {"type": "string", "maxLength": 64}, "`X-Next-After` of the page before."),
                Parameter("limit", "query", {"type": "integer", "minimum": 0, "maximum": most}, "At most so many."),
            ),
        )
        for what, most in (("exposures", 10_000), ("outcomes", 10_000), ("texts", 1_000))
    },
    ("GET", "/admin/v1/holdout"): Operation("The share of units that no experiment has.", _answer("Holdout")),
    ("PUT", "/admin/v1/holdout"): Operation(
        "Another share.", _answer("Holdout"), {_JSON: "Share"}, refuses=(400, 409, 413)
    ),
    ("POST", "/v1/outcomes"): Operation(
        "What became of replies, or of units.", _answer("Recorded"), {_JSON: "Told"}, refuses=(400, 409, 413)
    ),
    ("GET", "/admin/v1/audit"): Operation(
        "The audit log.",
        _answer("AuditEntries"),
        refuses=(400,),
        parameters=(
            Parameter("after", "query", {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "Entries after this one."),
            Parameter("limit", "query", {"type": "integer", "minimum": 0, "maximum": 1000}, "At most so many."),
        ),
    ),
}  # fmt: skip
