"""Generated (edit, prompt) cases over the whole edit language, drawn once from a fixed seed: every run meets the same ones."""

from functools import lru_cache
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.parity.cases import PROMPTS, Case
from tests.parity.rows import bundles
from tests.parity.strategies import steerings

__all__ = ["N_CASES", "N_QUICK", "cases"]

N_CASES = 240
N_QUICK = 36
"""The first ones; `make test` runs these."""

_TEXT = (
    "Far out at sea the old pilot kept one hand on the wheel and watched the clouds gather over the strait. He had seen such "
    "weather twice before, in the year of the great storm and again when his daughter was born. The engine hummed, the radio "
    "said nothing, and somewhere below a pump began to knock. What would you do first, and why? Three things matter most here:"
)


@st.composite
def prompts(draw: st.DrawFn) -> str:
    """Text of 1 to 70 tokens, in a chat's turn or bare."""
    if draw(st.integers(0, 9)) == 0:
        return PROMPTS[draw(st.sampled_from(sorted(PROMPTS)))]
    words = _TEXT.split()
    start = draw(st.integers(0, len(words) - 1))
    text = " ".join((words * 2)[start : start + draw(st.integers(1, 50))])
    if draw(st.integers(0, 2)) == 0:
        return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return text


@lru_cache
def cases() -> tuple[Case, ...]:
    """N_CASES different cases; none compiles to a plan without rows."""
    drawn: dict[tuple[str, str], Case] = {}

    def keep(steering: dict[str, Any], prompt: str) -> None:
        case = Case(f"generated {len(drawn)}", prompt, steering)
        if case.plan is not None and case.plan.rows and len(drawn) < N_CASES:
            drawn.setdefault((prompt, case.plan.hash), case)

    draw = settings(
        max_examples=2 * N_CASES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(steerings(bundles(), conditional=True), prompts())(keep))
    draw()
    return tuple(drawn.values())
