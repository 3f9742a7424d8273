"""The (edit, prompt) cases of the parity tests: every operation, unit, scope, several latents, several layers, dense vectors."""

from typing import Any, NamedTuple

from tests.parity.rows import N_LATENTS, N_LAYERS, N_REAL, bundles, real_latents
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

PROMPTS = {
    "short": "The capital of France is",
    "story": "Once upon a time, in a village by the sea, there lived a",
    "one": "Hello",
    "chat": "<|im_start|>user\nHow do I bake bread?<|im_end|>\n<|im_start|>assistant\n",
    "long": "A trim tab is the small surface on the edge of a rudder: a tiny edit there turns the whole ship. " * 6
    + "It",
}


class Case(NamedTuple):
    """One request."""

    name: str
    prompt: str
    steering: dict[str, Any] | None

    @property
    def plan(self) -> Plan | None:
        """The compiled plan; None when unsteered."""
        return None if self.steering is None else compile_plan(parse_steering(self.steering), bundles())


def _case(name: str, prompt: str, *edits: dict[str, Any], **steering: Any) -> Case:
    return Case(name, prompt, {"edits": list(edits), **steering})


def edit(
    operation: str, value: float | None = None, *, at: int = 14, scope: str = "all", **more: Any
) -> dict[str, Any]:
    """The JSON of an edit; `more` names the latent or vector, the unit, the strength, the gate, and what else is in the scope."""
    field = {"add": "amount", "clamp": "target", "scale": "factor"}.get(operation)
    where = {"tokens": scope} | {k: more.pop(k) for k in ("window", "exclude_special", "first_token") if k in more}
    target = {} if "vector" in more or "latent" in more else {"latent": 100}
    number = {field: value} if field else {}
    return {"bundle": f"l{at}", "operation": operation, "scope": where} | target | number | more


def window(start: int | None, stop: int | None, origin: str = "start") -> dict[str, Any]:
    """The JSON of a window."""
    return {"origin": origin, "start": start, "stop": stop}


def gate(latent: int, above: float, **more: Any) -> dict[str, Any]:
    """The JSON of a gate; `more` is the unit, the mode, the bundle."""
    return {"latent": latent, "above": above} | more


def real_gate(rank: int) -> dict[str, Any]:
    """A gate on a latent of the shipped SAE, at a tenth of its largest activation."""
    return gate(real_latents()[rank], 0.1, unit="max_act")


def real(operation: str, value: float | None = None, *, rank: int = 0, **more: Any) -> dict[str, Any]:
    """An edit of a latent of the shipped SAE."""
    return edit(operation, value, latent=real_latents()[rank], **more) | {"bundle": "sae"}


STEERED = (
    _case("add", "short", edit("add", 60.0)),
    _case("add in units of the residual norm", "story", edit("add", 0.4, unit="resid_norm")),
    _case("add in units of the largest activation", "chat", edit("add", 2.0, unit="max_act")),
    _case("add to one token", "one", edit("add", 60.0)),
    _case("add, negative strength", "long", edit("add", 60.0, strength=-0.7)),
    _case("add, request strength", "chat", edit("add", 80.0), strength=0.5),
    _case("add at the first layer", "story", edit("add", 8.0, at=0)),
    _case("add at the last layer", "short", edit("add", 60.0, at=29)),
    _case("ablate", "story", edit("ablate")),
    _case("ablate all latents", "long", *(edit("ablate", latent=100 + i) for i in range(N_LATENTS))),
    _case("clamp up", "short", edit("clamp", 50.0)),
    _case("clamp to zero", "chat", edit("clamp", 0.0, latent=102)),
    _case("clamp several", "long", *(edit("clamp", 20.0 + i, latent=100 + i) for i in range(4))),
    _case("scale up", "chat", edit("scale", 6.0)),
    _case("scale to zero", "long", edit("scale", 0.0)),
    _case("project a latent", "short", edit("project")),
    _case("project a vector", "long", edit("project", vector="v")),
    _case("add a vector", "story", edit("add", 3.0, vector="u")),
    _case("prompt only, add", "long", edit("add", 60.0, scope="prompt")),
    _case("prompt only, project", "story", edit("project", scope="prompt")),
    _case("completion only, add", "long", edit("add", 60.0, scope="completion")),
    _case("completion only, clamp", "chat", edit("clamp", 50.0, scope="completion")),
    _case(
        "scopes of its own for each edit",
        "chat",
        edit("add", 50.0, scope="prompt"),
        edit("clamp", 40.0, scope="completion", latent=101),
        edit("ablate", latent=102),
    ),
    _case("first token too, add", "story", edit("add", 60.0, first_token=True)),
    _case("first token too, prompt", "chat", edit("scale", 2.0, scope="prompt", first_token=True)),
    _case("two layers", "long", edit("add", 20.0, at=3), edit("clamp", 40.0)),
    _case(
        "every layer with a bundle",
        "story",
        edit("scale", 2.0, at=0),
        edit("ablate", at=3),
        edit("add", 40.0),
        edit("project", vector="u", at=29, scope="completion"),
    ),
    # "long" has some 150 tokens: these windows end inside a cache block (of 32) and inside a chunk of prefill (of 64).
    _case("window, absolute", "long", edit("clamp", 50.0, window=window(20, 71))),
    _case("window, the last five of the prompt", "chat", edit("add", 80.0, window=window(-5, 0, "prompt_end"))),
    _case("window, across the prompt's end", "long", edit("scale", 6.0, window=window(-70, 4, "prompt_end"))),
    _case("window, into the completion", "story", edit("add", 60.0, window=window(2, 6, "completion"))),
    _case("window, the first completion token", "long", edit("add", 90.0, window=window(None, 1, "completion"))),
    _case(
        "window, of the prompt alone", "story", edit("add", 60.0, scope="prompt", window=window(-6, None, "prompt_end"))
    ),
    _case(
        "windows that take turns",
        "long",
        edit("ablate", window=window(3, 40)),
        edit("clamp", 60.0, window=window(40, 100)),
        edit("add", 30.0, window=window(33, 90)),
        edit("scale", 5.0, latent=101, window=window(3, None, "completion")),
    ),
    _case("special tokens excluded", "chat", edit("add", 80.0, exclude_special=True)),
    _case(
        "special tokens excluded, the first included",
        "chat",
        edit("scale", 5.0, exclude_special=True, first_token=True),
    ),
    _case("gate", "long", edit("add", 90.0, gate=gate(103, 2.0))),
    _case("gate in units of the largest activation", "chat", edit("clamp", 60.0, gate=gate(104, 0.1, unit="max_act"))),
    _case("gate on the latent itself", "story", edit("clamp", 60.0, gate=gate(100, 0.0))),
    _case("gate that never opens", "long", edit("add", 60.0, at=3), edit("add", 90.0, gate=gate(103, 1e6))),
    _case("gate, onward from a token in the prompt", "long", edit("add", 60.0, gate=gate(106, 10.0, mode="onward"))),
    _case(
        "gate, onward within the completion",
        "story",
        edit("add", 90.0, scope="completion", gate=gate(101, 8.0, mode="onward")),
    ),
    _case(
        "gate, onward past special tokens",
        "chat",
        edit("clamp", 60.0, exclude_special=True, gate=gate(104, 6.0, mode="onward")),
    ),
    _case(
        "gates of every kind",
        "long",
        edit("clamp", 60.0, gate=gate(101, 6.0, mode="onward"), window=window(30, None)),
        edit("add", 40.0, latent=101, window=window(64, 71), exclude_special=True),
        edit("project", latent=102, gate=gate(103, 1.0)),
        edit("ablate", latent=104),
        edit("scale", 4.0, at=3, latent=105, gate=gate(104, 1.0, mode="onward"), scope="prompt"),
        edit("add", 30.0, at=29, gate=gate(100, 3.0, mode="onward"), scope="completion"),
    ),
    _case("SAE, a gate on a real latent", "long", real("add", 1.5, unit="max_act", gate=real_gate(7))),
    _case(
        "64 latents at once",
        "story",
        *(real(("clamp", "scale", "ablate")[i % 3], (0.5, 2.0, None)[i % 3], rank=i) for i in range(N_REAL)),
        *(edit("ablate", at=at, latent=100 + i) for at in (0, 3, 14, 29) for i in range(N_LATENTS)),
        *(edit("add", 4.0, at=3, latent=100 + i, scope="completion") for i in range(64 - N_REAL - 4 * N_LATENTS)),
    ),
    _case("every layer of the model", "chat", *(edit("clamp", 0.5, at=at, unit="max_act") for at in range(N_LAYERS))),
    _case(
        "every layer of the model, each its own way",
        "long",
        *(
            edit(
                ("add", "scale", "ablate")[at % 3],
                (0.4, 3.0, None)[at % 3],
                at=at,
                unit=("max_act", "raw", "raw")[at % 3],
            )
            | ({"gate": gate(101, 0.5)} if at % 4 == 3 else {})
            for at in range(N_LAYERS)
        ),
    ),
    Case("SAE, its busiest latents ablated", "long", {"bundle": "sae"}),
    Case("SAE, its busiest latents doubled down", "chat", {"bundle": "sae", "strength": 2.5}),
    _case("SAE, clamp and scale", "story", real("clamp", 0.5, unit="max_act"), real("scale", 3.0, rank=5)),
    _case("SAE, project", "chat", *(real("project", rank=rank) for rank in range(8))),
    _case(
        "SAE beside random rows",
        "long",
        real("add", 1.0, unit="max_act", scope="completion"),
        edit("ablate", latent=103),
    ),
    Case("recommended", "chat", {"bundle": "l14", "strength": 0.8}),
    Case("recommended, long", "long", {"bundle": "l3"}),
)
UNSTEERED = tuple(Case(f"unsteered, {name}", name, None) for name in PROMPTS)
