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
from trimtab.server.errors import (
    InvalidRequest,
    InvalidSteering,
    Revoked,
    TrimtabError,
    Unavailable,
    UnknownBundle,
    Violation,
)
from trimtab.server.fleet.switch import Switch
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.service.arm import ArmRule
from trimtab.server.service.rules import FREE, Rules, Source, names
from trimtab.server.steering import Steering, parse_steering

__all__ = ["SERVERS_OWN", "XARG", "Admission", "OnFailure", "Steered", "admit"]

XARG = KEY
"""The key of `vllm_xargs`, and so of `SamplingParams.extra_args`, that the plan rides under."""

OnFailure = Literal["closed", "open"]

SERVERS_OWN = {
    "cache_salt": "cache keys are derived by the server",
    "kv_transfer_params": "they belong to the engine",
    "ec_transfer_params": "they belong to the engine",
    "extra_body": "it is an argument of the OpenAI SDK; over HTTP its fields go to the top level of the body",
}
_ALIAS = re.compile(r"(?P<model>.+)@(?P<bundle>[^@:]+(?::v[1-9]\d*)?)(?::(?P<strength>[+-]?\d+(\.\d+)?))?")


class Steered(NamedTuple):
    """A request's steering, ready to run."""

    plan: Plan
    bundles: tuple[str, ...]
    """The bundles that it uses, with their versions: `calm:v3`; `calm` for one of this server's own."""
    on_failure: OnFailure
    source: Source = "request"
    """Who asked for it."""
    killed: Switch | None = None
    """The kill switch put its safe default in place of what was asked for."""
    watches: bool = False
    """Nothing is altered: the plan only reads the gates of an experiment's other arms."""

    @property
    def content_hashes(self) -> frozenset[str]:
        """Of every bundle whose rows act."""
        gates = frozenset(row.gate.bundle for row in self.plan.rows if row.gate is not None)
        return gates | {row.bundle for row in self.plan.rows}


class Admission(NamedTuple):
    """A request that may go to vLLM."""

    body: dict[str, Any]
    """vLLM's own fields, with the plan in its place."""
    steered: Steered | None
    killed: Switch | None = None
    """The kill switch keeps it from being steered as asked."""

    @property
    def content_hashes(self) -> frozenset[str]:
        """Of every bundle whose rows act; none where nothing is steered."""
        return frozenset() if self.steered is None else self.steered.content_hashes


def admit(
    body: Mapping[str, Any],
    *,
    fields: Collection[str],
    models: Sequence[str],
    bundles: Mapping[str, Bundle],
    on_failure: OnFailure = "closed",
    rules: Rules = FREE,
    arm: ArmRule | None = None,
) -> Admission:
    """The admitted request; `fields` are those of vLLM's request model, `on_failure` is the server's default, `arm` that of an
    experiment, for a request without steering of its own.

    Raises:
        InvalidRequest: fields that only the server may set.
        InvalidSteering: the steering, or a field that looks like it.
        UnknownBundle, Revoked, Unavailable: a bundle that cannot be used.
        Forbidden: what the caller may not ask for.
        Killed: the kill switch refuses what would be steered.
        ArmFailed: what the arm gives cannot be had here.
    """
    rest = {key: value for key, value in body.items() if key != "steering"}
    steering_violations = list(_misspelt(rest, fields))
    request_violations = [
        Violation(key, f"cannot be set by a client: {why}")
        for key, why in SERVERS_OWN.items()
        if rest.get(key) is not None
    ]
    if not isinstance(rest.get("vllm_xargs", {}), Mapping | None):
        request_violations.append(Violation("vllm_xargs", "must be an object"))
    model = rest.get("model")
    renamed = isinstance(model, str) and model not in models and model in rules.defaults.aliases()
    if renamed:
        rest["model"] = models[0]
    alias = None if renamed else _alias(model, models)
    if alias is not None:
        rest["model"] = alias["model"]
        if "steering" in body:
            steering_violations.append(Violation("model", "names a bundle, and so does `steering`; use one of the two"))
    default = rules.default(model if renamed else None)
    opts_out = _opts_out(body.get("steering"))
    steering: Steering | None = None
    source: Source = "request"
    try:
        if "steering" in body and not opts_out:
            steering = parse_steering(body["steering"])
        elif alias is not None:
            steering = _of_alias(alias)
    except InvalidSteering as e:
        steering_violations += e.violations
    asked = "steering" in body or alias is not None
    if not asked and default is not None and (arm is None or arm.arm.steering is None):
        steering, source = default.steering, default.kind
    if (asked or default is not None) and not opts_out and rest.get("use_beam_search"):
        steering_violations.append(Violation("use_beam_search", "cannot be steered; sample with `n` instead"))
    field = "model" if alias is not None or renamed else "steering"
    plan: Plan | None = None
    try:
        if steering is not None:
            _require_known(steering, rules)
            if source == "request":
                rules.allow(steering)
            plan = compile_plan(steering, bundles)
    except InvalidSteering as e:
        steering_violations += e.violations
    except (Revoked, Unavailable, UnknownBundle) as e:
        where = field if field == "model" else e.field or field
        if not steering_violations and not request_violations:
            raise _about(e, where, source) from e
        steering_violations.append(Violation(where, e.message))
    if steering_violations:
        raise InvalidSteering(steering_violations + request_violations)
    if request_violations:
        raise InvalidRequest(request_violations)
    if asked:
        rules.require_choice(default, field)
    if arm is not None:
        return _of_arm(rest, arm, (steering, plan, source), bundles, rules)
    if steering is None or plan is None:
        return Admission(rest, None)
    policy = steering.on_failure if "on_failure" in steering.model_fields_set else on_failure
    switch = rules.killed()
    if switch is not None:
        if switch.fallback is None:
            return Admission(rest, None, switch)
        _require_known(switch.fallback, rules)
        steering, plan = switch.fallback, compile_plan(switch.fallback, bundles)
    if plan.rows:
        rest["vllm_xargs"] = {**(rest.get("vllm_xargs") or {}), XARG: plan.wire()}
    used = tuple(dict.fromkeys(rules.resolve(name) for name in names(steering)))
    return Admission(rest, Steered(plan, used, policy, source, switch), switch)


def _of_arm(
    rest: dict[str, Any],
    arm: ArmRule,
    default: tuple[Steering | None, Plan | None, Source],
    bundles: Mapping[str, Bundle],
    rules: Rules,
) -> Admission:
    """The request with what its arm gives, or with the default steering that it has anyway."""
    own, watching = arm.compiled(rules, bundles)
    steering, plan, source = default if own is None else (arm.arm.steering, own, "experiment")
    if plan is None and not watching:
        return Admission(rest, None)
    watched = Plan.of((*(plan.rows if plan is not None else ()), *watching))
    if watched.rows:
        rest["vllm_xargs"] = {**(rest.get("vllm_xargs") or {}), XARG: watched.wire()}
    used = () if steering is None else tuple(dict.fromkeys(rules.resolve(name) for name in names(steering)))
    return Admission(rest, Steered(watched, used, arm.on_failure, source, watches=plan is None))


def _require_known(steering: Steering, rules: Rules) -> None:
    """Nothing, if every bundle that is named means one that can be used; the error names the field."""
    rules.require_fresh()
    for name in names(steering):
        try:
            rules.resolve(name)
        except (Revoked, Unavailable, UnknownBundle) as e:
            e.field = _field_of(name, steering)
            raise


def _field_of(bundle: str, steering: Steering) -> str:
    """The first field that names a bundle: of the edits', and then of their gates'."""
    for i, edit in enumerate(steering.edits or ()):
        if edit.bundle == bundle:
            return f"steering.edits[{i}].bundle"
    for i, edit in enumerate(steering.edits or ()):
        if edit.gate is not None and edit.gate.bundle == bundle:
            return f"steering.edits[{i}].gate.bundle"
    return "steering.bundle"


def _about(error: TrimtabError, field: str, source: Source) -> TrimtabError:
    """The same error, of a field; and whose default is at fault, if it is one."""
    whose = "" if source == "request" else f"the default steering of the {source} cannot be applied: "
    return type(error)(whose + error.message, field=field)


def _opts_out(steering: Any) -> bool:
    return isinstance(steering, Mapping) and steering.keys() == {"opt_out"} and steering["opt_out"] is True


def _misspelt(body: Mapping[str, Any], fields: Collection[str]) -> Iterator[Violation]:
    """Keys that nobody reads and that were probably meant as `steering`, and the keys of `vllm_xargs` that are ours."""
    for key in body:
        if key not in fields and _like_steering(key):
            yield Violation(key, f"unknown field {key!r}; did you mean `steering`?")
    xargs = body.get("vllm_xargs")
    if isinstance(xargs, Mapping):
        for key in xargs:
            if key.startswith(XARG):
                yield Violation(f"vllm_xargs.{key}", "is set by the server; use the `steering` field")
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
