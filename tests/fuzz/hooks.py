"""What Schemathesis needs to be told: real bundles among the uploads, short generations, and a server that stays usable.

Loaded by `SCHEMATHESIS_HOOKS=tests.fuzz.hooks`; `FUZZ_BUNDLES` is a folder of bundles. Nothing here makes a failure pass: bodies
are changed before they are sent.
"""

import os
from pathlib import Path
from random import Random
from typing import Any

import httpx
import schemathesis
from hypothesis import strategies as st
from schemathesis.transport.serialization import Binary

MAX_TOKENS = 4
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
_MANY = ("n", "best_of")
_GENERATION: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "The sea"}]},
    "/v1/completions": {"prompt": "The sea"},
    "/v1/responses": {"input": "The sea"},
    "/v1/steering/compare": {"prompt": "The sea"},
}
"""The routes that run the model, and a text that each can run."""
_UPLOADS = ("/v1/steering/bundles", "/admin/v1/bundles")
_DEFINITION: dict[str, Any] = {
    "hypothesis": "Both arms do the same.",
    "aa": True,
    "unit": "user",
    "arms": [{"key": "control", "weight": 0.5}, {"key": "other", "weight": 0.5}],
    "primary": {"key": "harm", "outcome": "harm"},
    "minimum_effect": 0.1,
}


@schemathesis.hook
def before_generate_body(context: Any, strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Uploads are real bundles half of the time, and experiments real ones: what nobody can make, nobody can change."""
    path, method = context.operation.path, context.operation.method.upper()
    if (method, path) == ("POST", "/admin/v1/experiments"):
        return st.one_of(strategy, st.integers(0, 10**6).map(_experiment))
    files = sorted(Path(os.environ["FUZZ_BUNDLES"]).glob("*.tt"))
    if path not in _UPLOADS or not files:
        return strategy
    return st.one_of(strategy, st.sampled_from([Binary(file.read_bytes()) for file in files]))


def _experiment(number: int) -> dict[str, Any]:
    return {"definition": {"key": f"fuzz-{number}", **_DEFINITION}, "reason": "a test"}


@schemathesis.hook
def before_call(context: Any, case: Any, _kwargs: dict[str, Any]) -> None:
    """A generation that may well reach the engine, and costs it little; at the call, for only there every phase comes by.

    (A comparison of 16 arms without `max_tokens` writes the whole context full, for minutes.) What the case then is, valid or
    not, Schemathesis finds out anew.
    """
    path, body = context.operation.path, case.body
    if path not in _GENERATION or not isinstance(body, dict):
        return
    chance = Random(repr(body))
    if chance.random() < 0.75:
        body = _known(body)
    if chance.random() < 0.1:
        body = _likely(path, body, chance)
    case.body = _short(path, body)


def _known(body: dict[str, Any]) -> dict[str, Any]:
    """The same with the names of a model and a bundle that are there."""
    known = dict(body)
    if isinstance(body.get("model", ""), str):
        known["model"] = "smollm2-135m-instruct"
    steering = body.get("steering")
    if isinstance(steering, dict) and isinstance(steering.get("bundle"), str):
        known["steering"] = {**steering, "bundle": "calm"}
    return known


def _likely(path: str, body: dict[str, Any], chance: Random) -> dict[str, Any]:
    """The same with a text that can be run, and three of its other fields: with a dozen at random hardly one is admitted."""
    steering = {"steering": {"bundle": "calm"}} if "arms" not in body and chance.random() < 0.5 else {}
    kept = {"model", "arms", *chance.sample(sorted(body), min(3, len(body)))} - {"messages", "prompt", "input"}
    return {name: value for name, value in body.items() if name in kept} | steering | _GENERATION[path]


def _short(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The same with few tokens and few samples; what is no number is left as wrong as it is."""
    own = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    short = {own: MAX_TOKENS, **body}
    for name, most in (*((name, MAX_TOKENS) for name in _LENGTHS), *((name, 2) for name in _MANY)):
        value = short.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > most:
            short[name] = most
        if value is None and name == own:
            short[name] = MAX_TOKENS
    return short


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Throws the kill switch back, and takes defaults away: every later request would be refused, as it should be, with a 503."""
    if response.status_code != 200 or case.method not in ("POST", "PUT"):
        return
    headers = {"authorization": response.request.headers.get("Authorization", "")}
    root = response.request.url.partition("/admin/v1/")[0]
    if case.path == "/admin/v1/kill":
        httpx.request("DELETE", f"{root}/admin/v1/kill", headers=headers)
    elif case.path.startswith("/admin/v1/defaults"):
        httpx.request("DELETE", response.request.url, headers=headers)
