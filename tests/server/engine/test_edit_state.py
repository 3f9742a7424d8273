"""A worker's state: rows by absolute position, each counted once, and no failure that is not told."""

from collections.abc import Collection
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.bundles import random_bundle
from tests.language import edited
from tests.parity.strategies import steerings
from trimtab.server.engine import kernel_torch, proof
from trimtab.server.engine.device_path import DevicePath
from trimtab.server.engine.edit_state import EditState
from trimtab.server.engine.tables import Tables
from trimtab.server.engine.wire import END
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

CALM, KIND = random_bundle(name="calm", layer=1), random_bundle(name="kind", layer=2, seed=1)
BESIDE = random_bundle(name="beside", layer=1, seed=5)
BY_HASH = {bundle.content_hash: bundle for bundle in (CALM, KIND, BESIDE)}
FAR = random_bundle(name="far", seed=9)
D = CALM.header.model.d_model
LAYERS = (0, 1, 2)


def plan(*edits: dict[str, Any]) -> Plan:
    return compile_plan(parse_steering({"edits": list(edits)}), {"calm": CALM, "kind": KIND})


def edit(scope: str = "all", bundle: str = "calm", **more: Any) -> dict[str, Any]:
    return {"bundle": bundle, "operation": "add", "latent": 7, "amount": 1.0, "scope": {"tokens": scope}} | more


ALL, PROMPT, COMPLETION = plan(edit()), plan(edit("prompt")), plan(edit("completion"))
BOTH = plan(edit("prompt"), edit("completion", "kind"))


@pytest.fixture(params=["host", "device"])
def state(request: pytest.FixtureRequest) -> EditState:
    return fresh(graphs=request.param == "device")


def fresh(n_slots: int = 8, *, graphs: bool = False, special: Collection[int] = ()) -> EditState:
    """With `graphs`, the state that a CUDA graph needs, its buffers on the host; `special` tokens are among nine."""
    tables = Tables(torch.device("cpu"), n_slots, fold=not graphs)
    tables.load(CALM)
    tables.load(KIND)
    tables.load(BESIDE)
    tokens_T, special_V = torch.zeros(96, dtype=torch.int32), torch.zeros(9, dtype=torch.bool)
    special_V[list(special)] = True
    path = DevicePath(LAYERS, D, n_slots, 96, tables.row, tokens_T, special_V) if graphs else None
    made = EditState(LAYERS, tables, path)
    made.token_ids, made.special_V = tokens_T, special_V if special else None
    return made


def step(
    state: EditState, *requests: tuple[str, int, int], drafts: dict[str, int] | None = None, end: int = END
) -> tuple[dict[int, set[int]], dict[str, dict[str, Any]]]:
    """Run (request, first position, tokens) as one forward: the edited rows by layer, and the proofs."""
    n = sum(length for _, _, length in requests)
    ids, starts, lengths = zip(*requests, strict=True)
    state.prepare(ids, starts, lengths, drafts or {})
    edited = {}
    for layer in LAYERS:
        hidden = torch.ones(n, D)
        state.run(layer, hidden, torch.ones(n, D))
        edited[layer] = {i for i in range(n) if not torch.equal(hidden[i], torch.ones(D))}
    return edited, {r: proof.settled(report, end) for r, report in state.collect()().items()}


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        (ALL, {1, 2, 3, 4, 5, 6}),
        (PROMPT, {1, 2, 3, 4}),
        (COMPLETION, {5, 6}),
        (
            plan(edit(scope_first := "prompt", latent=7) | {"scope": {"tokens": scope_first, "first_token": True}}),
            {0, 1, 2, 3, 4},
        ),
    ],
)
def test_a_scope_edits_its_positions(state: EditState, wanted: Plan, rows: set[int]) -> None:
    state.arrive("r", wanted.wire(), 6)
    edited, _ = step(state, ("r", 0, 7))
    assert edited == {0: set(), 1: rows, 2: set()}


def test_each_edit_has_its_own_scope_and_layer(state: EditState) -> None:
    state.arrive("r", BOTH.wire(), 6)
    edited, _ = step(state, ("r", 0, 6))
    assert edited == {0: set(), 1: {1, 2, 3, 4}, 2: {5}}


def test_the_edits_of_another_pipeline_stage_are_left_to_it() -> None:
    stage, whole = EditState([1], fresh().tables, elsewhere=[2]), fresh()
    found = []
    for state in (stage, whole):
        state.arrive("r", BOTH.wire(), 6)
        state.prepare(["r"], [0], [6])
        for layer in state.layers:
            state.run(layer, torch.ones(6, D), None)
        found.append(proof.settled(state.collect()()["r"], END))
    mine, all_of_it = found
    point = "blocks.1.resid_post"
    assert mine == all_of_it | {"hook_points": {point: all_of_it["hook_points"][point]}}


def test_the_edit_of_a_layer_that_no_stage_steers_fails_the_request() -> None:
    stage = EditState([1], fresh().tables, elsewhere=[0])
    stage.arrive("r", BOTH.wire(), 6)
    stage.prepare(["r"], [0], [6])
    assert "layer 2 is not hooked" in (stage.collect()()["r"].failure or "")


def test_rows_of_other_requests_are_left_alone(state: EditState) -> None:
    state.arrive("r", ALL.wire(), 3)
    edited, proofs = step(state, ("a", 0, 5), ("r", 0, 3), ("b", 7, 1))
    assert edited[1] == {6, 7}
    assert set(proofs) == {"r"}


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([ALL, PROMPT, COMPLETION, BOTH]),
    st.integers(1, 30),
    st.integers(1, 10),
    st.lists(st.integers(1, 9), max_size=40),
    st.randoms(use_true_random=False),
)
def test_any_chunking_and_any_preemption_count_each_position_once(
    wanted: Plan, n_prompt: int, n_completion: int, chunks: list[int], random: Any
) -> None:
    state = fresh()
    state.arrive("r", wanted.wire(), n_prompt)
    proofs: dict[str, Any] = {}
    end, position = n_prompt - 1 + n_completion, 0
    for chunk in [*chunks, end]:
        if position and random.random() < 0.2:
            position = 0  # preempted: all of it is computed again
        n = min(chunk, end - position)
        if n > 0:
            _, proofs = step(state, ("r", position, n))
            position += n
    if position < end:
        _, proofs = step(state, ("r", position, end - position))
    proof.verify(wanted, proofs.get("r"), n_prompt, [n_completion])


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([ALL, PROMPT, COMPLETION, BOTH]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_drafts_count_once_they_are_accepted_and_kept(
    wanted: Plan, n_prompt: int, n_completion: int, surplus: int, random: Any
) -> None:
    """Speculative decoding: rejected drafts are run again, and those beyond a stop are dropped by the scheduler."""
    state = fresh()
    state.arrive("r", wanted.wire(), n_prompt)
    end = n_prompt - 1 + n_completion
    _, proofs = step(state, ("r", 0, n_prompt))
    position = n_prompt
    while position < end:
        if random.random() < 0.2:
            step(state, ("r", 0, position))  # preempted: all that is known is computed again, without drafts
        n = random.randint(0, 3)
        edited, proofs = step(state, ("r", position, 1 + n), drafts={"r": n}, end=end)
        if wanted is ALL:
            assert edited[1] == set(range(1 + n))
        position += 1 + random.randint(0, n)
    proof.verify(wanted, proofs["r"], n_prompt, [n_completion])


def test_a_rejected_draft_leaves_no_trace_in_the_largest_norm() -> None:
    state = fresh()
    state.arrive("r", ALL.wire(), 2)
    step(state, ("r", 0, 2))
    state.prepare(["r"], [2], [3], {"r": 2})
    small = torch.full((3, D), 100.0)
    small[2] = 1e-3  # the second draft's stream is tiny, so its ratio is huge
    state.run(1, small, None)
    raw = state.collect()()["r"]
    seen = [proof.settled(raw, end)["hook_points"]["blocks.1.resid_post"]["max_relative_norm"] for end in (4, 5)]
    assert seen[0] < 1 < seen[1]
    _, proofs = step(state, ("r", 4, 1))
    assert proofs["r"]["hook_points"]["blocks.1.resid_post"]["max_relative_norm"] < 1


@given(st.integers(2, 40), st.data())
def test_cached_positions_are_counted_apart(n_prompt: int, data: st.DataObject) -> None:
    state = fresh()
    cached = data.draw(st.integers(0, n_prompt - 1))
    state.arrive("r", ALL.wire(), n_prompt)
    _, proofs = step(state, ("r", cached, n_prompt - cached))
    point = proofs["r"]["hook_points"]["blocks.1.resid_post"]
    assert point["cached_prompt_tokens"] == max(0, cached - 1)
    proof.verify(ALL, proofs["r"], n_prompt, [1])


SPECIAL = {3, 4}


@pytest.mark.parametrize("graphs", [False, True], ids=("host", "device"))
@settings(deadline=None, max_examples=60)
@given(
    steerings({"calm": CALM, "kind": KIND, "beside": BESIDE}, conditional=True),
    st.integers(1, 60),
    st.integers(1, 20),
    st.lists(st.integers(1, 25), max_size=12),
    st.randoms(use_true_random=False),
)
def test_any_plan_in_any_chunks_with_any_preemption_is_spelt_out(
    graphs: bool, steering: dict[str, Any], n_prompt: int, n_completion: int, chunks: list[int], random: Any
) -> None:
    """Another request of the same plan runs beside it."""
    wanted = compile_plan(parse_steering(steering), {"calm": CALM, "kind": KIND, "beside": BESIDE})
    end = n_prompt - 1 + n_completion
    g = torch.Generator().manual_seed(random.randrange(1 << 30))
    h_TD = torch.randn(end, D, generator=g) * 8
    tokens = torch.randint(0, 9, (end,), generator=g)
    expected = {
        layer: edited(h_TD, [r for r in wanted.rows if r.layer == layer], BY_HASH, tokens.tolist(), n_prompt, SPECIAL)
        for layer in wanted.layers
    }
    assume(all(found.margin > 1e-3 for found in expected.values()))
    state = fresh(64, graphs=graphs, special=SPECIAL)
    state.arrive("r", wanted.wire(), n_prompt)
    state.arrive("beside", wanted.wire(), 2)
    result = {layer: torch.full((end, D), torch.nan) for layer in LAYERS}
    reports = proof.Reports()
    position = steps = 0
    for chunk in [*chunks, end, end]:
        if position and random.random() < 0.2:
            position = 0  # preempted: all of it is computed again
        n = min(chunk, end - position)
        if n <= 0:
            continue
        assert state.token_ids is not None
        state.token_ids[: n + 1] = torch.cat([torch.tensor([1]), tokens[position : position + n]])
        state.prepare(["beside", "r"], [steps, position], [1, n])
        for layer in LAYERS:
            hidden = torch.cat([torch.randn(1, D, generator=g), h_TD[position : position + n]])
            state.run(layer, hidden, None)
            result[layer][position : position + n] = hidden[1:]
        reports = state.collect()()
        position, steps = position + n, steps + 1
    for layer in LAYERS:
        wanted_h = expected[layer].h_TD if layer in expected else h_TD
        torch.testing.assert_close(result[layer], wanted_h, rtol=1e-4, atol=1e-3)
    told = proof.settled(reports["r"], end)
    proof.verify(wanted, told, n_prompt, [n_completion])
    for layer, found in expected.items():
        point = told["hook_points"][f"blocks.{layer}.resid_post"]
        assert point["prompt_tokens"] + point["completion_tokens"] == found.tokens
        assert (point["gate_firings"], point["special_tokens"]) == (found.gate_firings, found.special_tokens)
        assert point["max_relative_norm"] == pytest.approx(found.max_relative_norm, rel=1e-3, abs=1e-6)
        assert point["mean_relative_norm"] == pytest.approx(found.mean_relative_norm, rel=1e-3, abs=1e-6)
    state.finish(["r", "beside"])
    assert len(state._onward._free) == len(state._onward.opened_S) - 1


def gated(mode: str = "token", above: float = 0.5, **more: Any) -> dict[str, Any]:
    return edit(**more) | {"gate": {"latent": 8, "above": above, "mode": mode}}


def test_a_gate_that_never_opens_is_applied_and_says_so(state: EditState) -> None:
    wanted = plan(gated(above=1e6))
    state.arrive("r", wanted.wire(), 4)
    rows, proofs = step(state, ("r", 0, 5))
    assert rows[1] == set()
    proof.verify(wanted, proofs["r"], 4, [2])
    point = proofs["r"]["hook_points"]["blocks.1.resid_post"]
    assert (point["completion_tokens"], point["gate_firings"], point["max_relative_norm"]) == (2, 0, 0.0)


def test_a_gate_that_stays_open_and_was_not_read_on_cached_positions_is_a_failure(state: EditState) -> None:
    state.arrive("r", plan(gated("onward")).wire(), 9)
    _, proofs = step(state, ("r", 4, 5))
    assert "prefix cache" in proofs["r"]["failure"]


def test_a_preempted_request_that_finds_its_own_blocks_remembers_where_its_gate_opened(state: EditState) -> None:
    direction = torch.from_numpy(CALM.encoder[1])
    state.arrive("r", plan(gated("onward")).wire(), 9)
    fires, quiet = direction * 5, -direction * 5
    for start, stream in ((0, [quiet, quiet, fires, quiet, quiet]), (4, [quiet, quiet]), (1, [quiet] * 5)):
        state.prepare(["r"], [start], [len(stream)])
        hidden = torch.stack(stream)
        before = hidden.clone()
        state.run(1, hidden, None)
        reports = state.collect()()
        moved = [start + i for i in range(len(stream)) if not torch.equal(hidden[i], before[i])]
        # The third step computes the token again on which the gate opened, and it does not fire this time.
        assert moved == {0: [2, 3, 4], 4: [4, 5], 1: []}[start]
    assert reports["r"].failure is None


def test_a_replayed_graph_that_did_not_read_the_gates_of_several_tokens_is_a_failure() -> None:
    state = fresh(graphs=True)
    assert state.path is not None
    state.arrive("r", plan(gated("onward")).wire(), 9)
    state.prepare(["r"], [0], [5])
    kernel_torch.launch(
        state.path.buffers, 1, torch.ones(5, D), None
    )  # what a graph would do: the operator is not called
    assert "was not called" in (state.collect()()["r"].failure or "")


def test_more_gates_that_stay_open_than_fit_are_a_failure_of_the_request_alone() -> None:
    state = fresh(graphs=True)
    state._onward._free = state._onward._free[-1:]
    state.arrive("r", plan(gated("onward")).wire(), 9)
    state.arrive("late", plan(gated("onward")).wire(), 9)
    _, proofs = step(state, ("r", 0, 5), ("late", 0, 5))
    assert proofs["r"]["failure"] is None
    assert "gates that stay open" in proofs["late"]["failure"]


def test_drafts_that_open_a_gate_and_are_rejected_never_did(state: EditState) -> None:
    direction = torch.from_numpy(CALM.encoder[1])
    state.arrive("r", plan(gated("onward", scope="completion")).wire(), 2)
    for start, stream, n_drafts in ((0, [-1, -1], 0), (2, [-1, 1, -1], 2), (3, [-1, -1], 0)):
        state.prepare(["r"], [start], [len(stream)], {"r": n_drafts})
        hidden = torch.stack([x * 5 * direction for x in stream])
        state.run(1, hidden, None)
        reports = state.collect()()
    point = proof.settled(reports["r"], 5)["hook_points"]["blocks.1.resid_post"]
    assert (point["completion_tokens"], point["gate_firings"]) == (4, 0)


def test_special_tokens_without_a_tokenizer_are_a_failure(state: EditState) -> None:
    wanted = plan(edit() | {"scope": {"exclude_special": True}})
    state.arrive("r", wanted.wire(), 4)
    _, proofs = step(state, ("r", 0, 4))
    assert "no tokenizer" in proofs["r"]["failure"]


def test_a_bundle_that_a_gate_reads_is_not_dropped_under_it() -> None:
    state = fresh()
    state.tables.load(BESIDE)
    both = {"calm": CALM, "beside": BESIDE}
    gate = {"bundle": "beside", "latent": 8, "above": 0.5}
    state.arrive("r", compile_plan(parse_steering({"edits": [edit() | {"gate": gate}]}), both).wire(), 4)
    assert not state.unload(BESIDE.content_hash)
    state.finish(["r"])
    assert state.unload(BESIDE.content_hash)


def test_a_hook_that_was_not_called_is_a_failure(state: EditState) -> None:
    state.arrive("r", ALL.wire(), 4)
    state.prepare(["r"], [0], [4])
    assert "not called" in (state.collect()()["r"].failure or "")


def test_an_edit_that_raises_is_a_failure_and_edits_nothing(state: EditState) -> None:
    state.arrive("r", ALL.wire(), 4)
    state.prepare(["r"], [0], [4])
    hidden = torch.ones(4, D + 1)
    state.run(1, hidden, None)
    assert torch.equal(hidden, torch.ones(4, D + 1))
    assert "layer 1" in (state.collect()()["r"].failure or "")


def test_nan_in_the_stream_is_a_failure(state: EditState) -> None:
    state.arrive("r", ALL.wire(), 4)
    state.prepare(["r"], [0], [4])
    state.run(1, torch.full((4, D), torch.nan), None)
    assert "NaN" in (state.collect()()["r"].failure or "")


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ("{}", "cannot read"),
        (
            compile_plan(parse_steering({"bundle": "far"}), {"far": random_bundle(layer=1, name="far", seed=9)}).wire(),
            "not loaded",
        ),
        (Plan.of([row._replace(layer=9) for row in ALL.rows]).wire(), "not hooked"),
    ],
)
def test_what_a_worker_cannot_apply_is_a_failure(state: EditState, wire: str, message: str) -> None:
    state.arrive("r", wire, 4)
    state.arrive("other", ALL.wire(), 4)
    edited, proofs = step(state, ("r", 0, 4), ("other", 0, 4))
    assert message in proofs["r"]["failure"]
    assert edited[1] == {5, 6, 7}
    proof.verify(ALL, proofs["other"], 4, [1])


@pytest.mark.parametrize(("n_slots", "graphs"), [(2, False), (9, True)])
def test_slots_never_run_out(n_slots: int, graphs: bool) -> None:
    state = fresh(n_slots, graphs=graphs)
    for old in range(20):
        state.arrive(f"old{old}", plan(edit(amount=-float(old + 1))).wire(), 2)
        step(state, (f"old{old}", 0, 2))
    plans = [plan(edit(amount=float(i + 1))) for i in range(9)]
    for i, wanted in enumerate(plans):
        state.arrive(f"r{i}", wanted.wire(), 2)
    for position, n in ((0, 2), (2, 1), (3, 1)):
        _, proofs = step(state, *((f"r{i}", position, n) for i in range(9)))
    for i, wanted in enumerate(plans):
        proof.verify(wanted, proofs[f"r{i}"], 2, [3])


def test_a_finished_request_is_forgotten_and_its_name_may_come_again(state: EditState) -> None:
    state.arrive("r", ALL.wire(), 4)
    step(state, ("r", 0, 4))
    state.finish(["r", "never"])
    assert state.n_requests == 0
    state.arrive("r", PROMPT.wire(), 5)
    _, proofs = step(state, ("r", 0, 5))
    proof.verify(PROMPT, proofs["r"], 5, [1])


def test_a_step_without_steered_rows_touches_no_tensor() -> None:
    state = fresh()
    state.arrive("r", COMPLETION.wire(), 9)
    state.prepare(["r", "plain"], [0, 3], [4, 1])
    state.run(1, None, None)  # type: ignore[arg-type]
    assert state.collect()()["r"].failure is None


def test_the_work_of_a_steady_batch_is_reused() -> None:
    state = fresh()
    state.arrive("r", ALL.wire(), 2)
    step(state, ("r", 0, 2))
    step(state, ("r", 2, 1))
    first = state.layout
    step(state, ("r", 3, 1))
    assert state.layout is first
