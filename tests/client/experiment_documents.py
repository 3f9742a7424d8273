"""What a server answers about experiments, as docs/experiments.md has it."""

from typing import Any

AT = "2026-11-25T12:00:00.000000Z"
CHANGE = {"revision": 1, "action": "create", "actor": "ann", "reason": "new", "at": AT, "state": "draft", "coverage": 0}
EXPERIMENT: dict[str, Any] = {
    "key": "calm-replies",
    "state": "running",
    "coverage": 0.1,
    "revision": 2,
    "changed_at": AT,
    "covered_since": AT,
    "started_at": AT,
    "step": 0,
    "approved": 0,
    "plans": {"calm": "sha256:00"},
    "definition": {
        "key": "calm-replies",
        "hypothesis": "The bundle lowers the share of harmful replies.",
        "unit": "user",
        "aa": False,
        "arms": [
            {"key": "control", "weight": 0.5},
            {"key": "calm", "weight": 0.3, "steering": {"bundle": "calm:v3", "strength": 0.8}},
            {"key": "prompt", "weight": 0.2, "system_prompt": "Stay calm."},
        ],
        "primary": {"key": "harm", "outcome": "harm", "kind": "proportion", "direction": "decrease"},
        "secondary": [],
        "guardrails": [{"metric": {"key": "solved", "outcome": "solved", "direction": "increase"}, "margin": 0.05}],
        "minimum_effect": 0.02,
        "alpha": 0.05,
        "stop": {"when": "conclusive", "min_units": 0},
    },
    "history": [CHANGE, CHANGE | {"revision": 2, "action": "start", "state": "running", "coverage": 0.1}],
}
HEALTH: dict[str, Any] = {
    "key": "calm-replies",
    "state": "running",
    "coverage": 0.1,
    "revision": 2,
    "healthy": False,
    "problems": ["3 exposures were lost: what was measured is not whole"],
    "decisions": {"missing_unit": 12, "coverage": 9000},
    "exposures": {"written": 1000, "dropped": 3, "waiting": 0, "last_at": AT},
    "arms": [
        {"key": key, "units": n, "triggered_units": n, "requests": n, "statuses": {"applied": n - 1, "failed": 1}}
        for key, n in (("control", 500), ("calm", 300), ("prompt", 200))
    ],
    "crossovers": 0,
    "sample_ratio_p": 0.8,
    "next_step": {"coverage": 0.5, "at": AT, "min_units": 200, "waits_for": ["hold", "health"]},
}


def effect(**changes: Any) -> dict[str, Any]:
    """One effect."""
    return {
        "metric": "harm",
        "arm": "calm",
        "population": "intent_to_treat",
        "n_control": 500,
        "n_treated": 300,
        "control": 0.31,
        "treated": 0.2,
        "estimate": -0.11,
        "low": -0.2,
        "high": -0.02,
        "p": 0.01,
        **changes,
    }


UNKNOWN = {"low": None, "high": None, "p": 1.0}
RESULTS: dict[str, Any] = {
    "key": "calm-replies",
    "state": "running",
    "coverage": 0.1,
    "revision": 2,
    "units": {"control": 500, "calm": 300, "prompt": 200},
    "crossovers": 0,
    "sample_ratio_p": 0.8,
    "triggered_ratio_p": {"calm": 1.0, "prompt": 1.0},
    "primary": "harm",
    "minimum_effect": 0.02,
    "alpha": 0.05,
    "verdicts": {"calm": "better", "prompt": "collecting"},
    "effects": [
        effect(population=population, arm=arm, **more)
        for population in ("intent_to_treat", "triggered", "per_protocol")
        for arm, more in (("calm", {}), ("prompt", {"n_treated": 200, **UNKNOWN}))
    ],
    "guardrails": [
        {"metric": "solved", "arm": arm, "margin": 0.05, "n_control": 500, "n_treated": 300, "control": 0.7, "treated": 0.69,
         "harm": 0.01, "low": low, "high": high, "state": state}
        for arm, low, high, state in (("calm", -0.02, 0.04, "safe"), ("prompt", None, None, "collecting"))
    ],
    "units_needed": 5000,
    "power": 0.91,
    "days_left": 3.5,
    "over": None,
    "notes": ["'harm' is reported of 90% of the control's units and of 80% of 'calm''s; what is not reported counts as 0"],
}  # fmt: skip
LOOKS: dict[str, Any] = {
    "object": "list",
    "data": [
        {
            "at": f"2026-11-25T12:{minute:02}:00.000000Z",
            "units": {"control": 50 * minute, "calm": 30 * minute, "prompt": 20 * minute},
            "effects": [
                effect(
                    low=None if minute == 1 else -0.11 - 1 / minute, high=None if minute == 1 else -0.11 + 1 / minute
                ),
                effect(arm="prompt", **UNKNOWN),
            ],
        }
        for minute in range(1, 11)
    ],
}
EXPOSURES: list[dict[str, Any]] = [
    {"response_id": f"{n:032x}", "experiment": "calm-replies", "arm": "calm", "unit": "ab", "revision": 2, "at": AT,
     "forced": False, "triggered": True, "status": "applied"}
    for n in range(3)
]  # fmt: skip
OUTCOMES: list[dict[str, Any]] = [
    {"subject": f"{0:032x}", "response_id": f"{0:032x}", "unit": "ab", "arm": "calm", "name": "harm", "event": "",
     "value": 1.0, "at": AT, "received_at": AT}
]  # fmt: skip
TEXTS: list[dict[str, Any]] = [
    {"response_id": f"{0:032x}", "experiment": "calm-replies", "arm": "calm", "at": AT, "until": AT,
     "prompt": "Wer bist du?\nSag es, \"Freund\".", "reply": "Ich weiß es nicht.", "cut": False}
]  # fmt: skip
