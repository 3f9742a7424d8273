"""A scope is a window, whatever its spelling: the positions it says, and an exact answer to whether two can meet."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parity.strategies import windows
from trimtab.server.steering import Scope
from trimtab.server.window import Window

N_MAX = 150
scopes = st.fixed_dictionaries(
    {"tokens": st.sampled_from(["prompt", "completion", "all"]), "first_token": st.booleans()},
    optional={"window": windows()},
)


def of(**scope: Any) -> Window:
    return Window.of(Scope.model_validate(scope))


def told(scope: dict[str, Any], n_prompt: int, position: int) -> bool:
    """Whether a position is in a scope, by its words."""
    part = "completion" if position >= n_prompt - 1 else "prompt"
    window = scope.get("window", {"origin": "start"})
    origin = {"start": 0, "prompt_end": n_prompt, "completion": n_prompt - 1}[window["origin"]]
    start, stop = window.get("start"), window.get("stop")
    if window["origin"] == "completion" and start is None:
        start = 0
    return (
        (position > 0 or scope["first_token"])
        and scope["tokens"] in ("all", part)
        and (start is None or origin + start <= position)
        and (stop is None or position < origin + stop)
    )


def positions(window: Window, n_prompt: int) -> set[int]:
    lo, hi = window.bounds(n_prompt)
    assert lo >= 0
    assert hi is None or lo <= hi
    return {p for p in range(3 * N_MAX) if lo <= p and (hi is None or p < hi)}


@given(scopes, st.integers(1, N_MAX), st.integers(0, 2 * N_MAX))
def test_a_window_holds_the_positions_that_its_scope_says(scope: dict[str, Any], n_prompt: int, position: int) -> None:
    assert (position in positions(of(**scope), n_prompt)) == told(scope, n_prompt, position)


@given(scopes, scopes, st.integers(1, N_MAX))
def test_windows_meet_where_both_are(a: dict[str, Any], b: dict[str, Any], n_prompt: int) -> None:
    one, two = of(**a), of(**b)
    assert positions(one.meet(two), n_prompt) == positions(one, n_prompt) & positions(two, n_prompt)


@given(scopes, scopes)
def test_the_example_is_the_shortest_prompt_with_a_position(a: dict[str, Any], b: dict[str, Any]) -> None:
    window = of(**a).meet(of(**b))
    held = [n for n in range(1, N_MAX) if (bounds := window.bounds(n))[1] is None or bounds[0] < bounds[1]]
    assert window.example() == (held[0] if held else None)


@given(st.integers(1, 300))
def test_prompt_and_completion_part_the_positions(n_prompt: int) -> None:
    prompt, completion, both = (of(tokens=t).bounds(n_prompt) for t in ("prompt", "completion", "all"))
    assert both == (1, None)
    assert completion[1] is None
    assert prompt[0] == 1
    assert prompt[1] == completion[0] == max(1, n_prompt - 1)


def test_position_zero_is_edited_only_when_asked() -> None:
    assert of(tokens="prompt", first_token=True).bounds(5) == (0, 4)
    assert of(tokens="all", first_token=True).bounds(5) == (0, None)
    assert of(tokens="completion", first_token=True).bounds(1) == (0, None)
    assert of(tokens="completion").bounds(1) == (1, None)
    assert of(window={"stop": 3}).bounds(9) == (1, 3)


@pytest.mark.parametrize(
    ("window", "bounds"),
    [
        ({"origin": "start", "start": 3, "stop": 7}, (3, 7)),
        ({"origin": "prompt_end", "start": -5, "stop": 0}, (5, 10)),
        ({"origin": "prompt_end", "start": -50, "stop": -8}, (1, 2)),
        ({"origin": "prompt_end", "stop": -50}, (1, 1)),
        ({"origin": "completion", "start": 0, "stop": 1}, (9, 10)),
        ({"origin": "completion", "start": 4}, (13, None)),
        ({"origin": "completion", "stop": 4}, (9, 13)),
    ],
)
def test_windows_of_a_prompt_of_ten_tokens(window: dict[str, Any], bounds: tuple[int, int | None]) -> None:
    assert of(window=window).bounds(10) == bounds


@pytest.mark.parametrize(
    "scope",
    [
        {"window": {"origin": "completion"}},
        {"window": {"origin": "completion", "start": 0}},
        {"window": {"origin": "prompt_end", "start": -1}},
        {"tokens": "completion", "window": {"origin": "start", "start": 0}},
        {"tokens": "completion", "window": {"origin": "prompt_end", "start": -4}},
    ],
)
def test_the_completion_in_other_words(scope: dict[str, Any]) -> None:
    assert of(**scope) == of(tokens="completion")
