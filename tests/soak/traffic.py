"""What a soak asks for: requests of every kind, drawn from a seed, each knowing what its reply must be."""

import random
from functools import lru_cache
from typing import Any, NamedTuple

from tests.parity.cases import PROMPTS, STEERED, UNSTEERED
from tests.parity.generated import cases
from tests.parity.rows import bundles, steering_bundle
from trimtab.attribution.bundle import Bundle, ModelIdentity
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

__all__ = ["KINDS", "LONGEST", "MOVING", "MOVING_STEERING", "Ask", "draw", "moving", "served"]

LONGEST = 10
"""Completion tokens of a greedy request, at most."""
MOVING = "moving"
"""The bundle that comes, changes and goes all the while."""
MOVING_STEERING: dict[str, Any] = {"bundle": MOVING, "strength": 1.5}
N_CASES = 90
KINDS = {
    "greedy": 50,
    "unsteered": 12,
    "moving": 10,
    "sampled": 7,
    "stop string": 5,
    "log-probabilities": 5,
    "grammar": 3,
    "refused": 4,
    "abandoned in a stream": 7,
    "abandoned before a reply": 5,
}
"""And their weights."""


class Ask(NamedTuple):
    """One request."""

    kind: str
    body: dict[str, Any]
    plan: Plan | None
    """None when unsteered, or when it depends on the version of the moving bundle."""
    key: tuple[str, str] | None
    """Of a greedy answer, which is the same whenever it is given: prompt, plan's hash."""
    leave_after: float | None = None
    """Chunks of the stream, or seconds without one, after which the client goes away."""


def of_model(bundle: Bundle, model: ModelIdentity) -> Bundle:
    """The bundle, made for this very model."""
    header = bundle.header.model_copy(update={"model": model})
    names = ("decoder", "encoder", "bias", "threshold", "baseline", "vectors")
    return Bundle(header, **{name: getattr(bundle, name) for name in names})


@lru_cache
def served(model: ModelIdentity) -> dict[str, Bundle]:
    """The bundles of the parity tests, made for the model that is served."""
    return {name: of_model(bundle, model) for name, bundle in bundles().items()}


@lru_cache
def moving(model: ModelIdentity) -> tuple[Bundle, Bundle]:
    """Two versions of the bundle that moves."""
    first, second = (of_model(steering_bundle(MOVING, 12, seed), model) for seed in (91, 92))
    return first, second


@lru_cache
def plans(model: ModelIdentity) -> tuple[tuple[str, dict[str, Any], Plan], ...]:
    """(prompt, steering, plan) of the pool of greedy cases."""
    chosen = [*STEERED, *cases()[:N_CASES]]
    found = served(model)
    return tuple(
        (PROMPTS.get(case.prompt, case.prompt), case.steering, compile_plan(parse_steering(case.steering), found))
        for case in chosen
        if case.steering is not None
    )


def draw(rng: random.Random, name: str, model: ModelIdentity) -> Ask:
    """The next request of the soak."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    prompt, steering, plan = rng.choice(plans(model))
    body: dict[str, Any] = {
        "model": name,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": rng.randint(1, LONGEST),
        "ignore_eos": True,
        "return_token_ids": True,
        "steering": steering,
        "stream": rng.random() < 0.4,
    }
    match kind:
        case "greedy":
            return Ask(kind, body, plan, (prompt, plan.hash))
        case "unsteered":
            del body["steering"]
            body["prompt"] = prompt = PROMPTS[rng.choice(UNSTEERED).prompt]
            return Ask(kind, body, None, (prompt, ""))
        case "moving":
            body["steering"] = MOVING_STEERING
            return Ask(kind, body, None, None)
        case "sampled":
            body |= {"temperature": 1.0, "n": rng.randint(2, 3), "seed": rng.randint(0, 1 << 30), "ignore_eos": False}
        case "stop string":
            body |= {"stop": [rng.choice([" the", " a", "e", ".", "\n"])], "max_tokens": 20, "stream_interval": 3}
        case "log-probabilities":
            body |= {"logprobs": 3, "prompt_logprobs": rng.choice([None, 1]), "stream": False}
        case "grammar":
            body |= {"structured_outputs": {"regex": "[0-9]{3}"}, "max_tokens": 8, "ignore_eos": False}
        case "refused":
            body |= rng.choice(
                [
                    {"steering": {"bundle": "nobody"}},
                    {"steering": {"bundle": "sae", "strength": 1000}},
                    {"steering": None, "steer": {"bundle": "sae"}},
                    {"steering": {"edits": []}},
                    {"max_tokens": 100_000},
                ]
            )
            return Ask(kind, body, None, None)
        case "abandoned in a stream":
            return Ask(kind, body | {"stream": True, "max_tokens": 60}, plan, None, float(rng.randint(0, 6)))
        case _:
            return Ask(kind, body | {"stream": False, "max_tokens": 60}, plan, None, 10 ** rng.uniform(-2.5, 0.3))
    return Ask(kind, body, plan, None)
