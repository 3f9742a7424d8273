"""Admission: what a request asks for beyond vLLM's own fields, compiled to a plan, every violation at once. Pure.

The plan rides in `vllm_xargs["trimtab"]`, which clients may not set. vLLM's request models ignore fields that they do not know,
which is how a misspelt `steering` would come back fluent, unsteered and labelled 200: such keys are refused here.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from trimtab.attribution.bundle import Bundle
from trimtab.server.engine.proof import KEY
from trimtab.server.errors import InvalidRequest, InvalidSteering, UnknownBundle, Violation
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import Steering, parse_steering

__all__ = ["XARG", "Admission", "OnFailure", "Steered", "admit"]

XARG = KEY
"""The key of `vllm_xargs`, and so of `SamplingParams.extra_args`, that the plan rides under."""

OnFailure = Literal["closed", "open"]

_OURS = {
    "cache_salt": "cache keys are derived by the server",
    "kv_transfer_params": "they belong to the engine",
    "ec_transfer_params": "they belong to the engine",
    "extra_body": "it is an argument of the OpenAI SDK; over HTTP its fields go to the top level of the body",
}
_ALIAS = re.compile(r"(?P<model>.+)@(?P<bundle>[^@:]+)(?::(?P<strength>[+-]?\d+(\.\d+)?))?")


class Steered(NamedTuple):
    """A request's steering, ready to run."""

    plan: Plan
    bundles: tuple[str, ...]
    """Names of the bundles that the request used."""
    on_failure: OnFailure


class Admission(NamedTuple):
    """A request that may go to vLLM."""

    body: dict[str, Any]
    """vLLM's own fields, with the plan in its place."""
    steered: Steered | None


def admit(
    body: Mapping[str, Any],
    *,
    fields: Collection[str],
    models: Sequence[str],
    bundles: Mapping[str, Bundle],
    on_failure: OnFailure = "closed",
) -> Admission:
    """The admitted request; `fields` are those of vLLM's request model, `on_failure` is the server's default.

    Raises:
        InvalidRequest: fields that only the server may set.
        InvalidSteering: the steering, or a field that looks like it.
        UnknownBundle: a bundle that is not loaded.
    """
    rest = {key: value for key, value in body.items() if key != "steering"}
    steering_violations = list(_misspelt(rest, fields))
    request_violations = [
        Violation(key, f"cannot be set by a client: {why}") for key, why in _OURS.items() if rest.get(key) is not None
    ]
    if not isinstance(rest.get("vllm_xargs", {}), Mapping | None):
        request_violations.append(Violation("vllm_xargs", "must be an object"))
    alias = _alias(rest.get("model"), models)
    if alias is not None:
        rest["model"] = alias["model"]
        if "steering" in body:
            steering_violations.append(Violation("model", "names a bundle, and so does `steering`; use one of the two"))
    steering: Steering | None = None
    try:
        if "steering" in body:
            steering = parse_steering(body["steering"])
        elif alias is not None:
            steering = _of_alias(alias)
    except InvalidSteering as e:
        steering_violations += e.violations
    asked = "steering" in body or alias is not None
    if asked and rest.get("use_beam_search"):
        steering_violations.append(Violation("use_beam_search", "cannot be steered; sample with `n` instead"))
    plan: Plan | None = None
    try:
        if steering is not None:
            plan = compile_plan(steering, bundles)
    except InvalidSteering as e:
        steering_violations += e.violations
    except UnknownBundle as e:
        field = "model" if alias is not None else e.field or "steering"
        if not steering_violations and not request_violations:
            raise UnknownBundle(e.message, field=field) from e
        steering_violations.append(Violation(field, e.message))
    if steering_violations:
        raise InvalidSteering(steering_violations + request_violations)
    if request_violations:
        raise InvalidRequest(request_violations)
    if steering is None or plan is None:
        return Admission(rest, None)
    if plan.rows:
        rest["vllm_xargs"] = {**(rest.get("vllm_xargs") or {}), XARG: plan.wire()}
    policy = steering.on_failure if "on_failure" in steering.model_fields_set else on_failure
    return Admission(rest, Steered(plan, _used(steering), policy))


def _misspelt(body: Mapping[str, Any], fields: Collection[str]) -> Iterator[Violation]:
    """Keys that nobody reads and that were probably meant as `steering`, and the keys of `vllm_xargs` that are ours."""
    for key in body:
        if key not in fields and _like_steering(key):
            yield Violation(key, f"unknown field {key!r}; did you mean `steering`?")
    xargs = body.get("vllm_xargs")
    if isinstance(xargs, Mapping):
        for key in xargs:
            if key == XARG:
                yield Violation(f"vllm_xargs.{XARG}", "is set by the server; use the `steering` field")
            elif _like_steering(key):
                yield Violation(
                    f"vllm_xargs.{key}", "is not read; `steering` is a field of its own, at the top of the body"
                )


def _like_steering(key: str) -> bool:
    return "steer" in key.lower() or bool(difflib.get_close_matches(key.lower(), ["steering"], cutoff=0.75))


def _alias(model: Any, models: Sequence[str]) -> dict[str, str | None] | None:
    """The parts of `base@bundle:strength` where base is a served model and the whole is not."""
    if not isinstance(model, str) or model in models:
        return None
    match = _ALIAS.fullmatch(model)
    return match.groupdict() if match is not None and match["model"] in models else None


def _of_alias(alias: Mapping[str, str | None]) -> Steering:
    strength = float(alias["strength"]) if alias["strength"] is not None else 1.0
    try:
        return parse_steering({"bundle": alias["bundle"], "strength": strength})
    except InvalidSteering as e:
        raise InvalidSteering([Violation("model", v.message) for v in e.violations]) from e


def _used(steering: Steering) -> tuple[str, ...]:
    if steering.edits is None:
        return (steering.bundle or "",)
    gates = (edit.gate.bundle for edit in steering.edits if edit.gate is not None and edit.gate.bundle is not None)
    return tuple(dict.fromkeys((*(edit.bundle for edit in steering.edits), *gates)))
