"""An engine that cannot steer, or cannot run a plan, says so before the request exists for the scheduler."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bundles import random_bundle
from trimtab.server.engine import admission, bundles
from trimtab.server.plan import compile_plan
from trimtab.server.steering import parse_steering

CALM = random_bundle(layer=1)
PLAN = compile_plan(parse_steering({"bundle": "calm"}), {"calm": CALM})


def config(**changes: Any) -> Any:
    fields = {
        "model_config": SimpleNamespace(
            runner_type="generate",
            enforce_eager=False,
            max_model_len=512,
            skip_tokenizer_init=False,
            hf_text_config=SimpleNamespace(num_hidden_layers=3),
            get_hidden_size=lambda: CALM.header.model.d_model,
        ),
        "parallel_config": SimpleNamespace(
            world_size=1,
            distributed_executor_backend="mp",
            enable_dbo=False,
            prefill_context_parallel_size=1,
        ),
        "device_config": SimpleNamespace(device_type="cpu"),
        "scheduler_config": SimpleNamespace(async_scheduling=False),
        "additional_config": None,
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    found = SimpleNamespace(**fields)
    for path, value in changes.items():
        owner, _, name = path.rpartition("__")
        setattr(getattr(found, owner) if owner else found, name, value)
    return found


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    known = bundles.Loaded("calm", 1, CALM.header.model.d_model, 70, 1)
    monkeypatch.setattr(bundles, "_loaded", {CALM.content_hash: known})


def test_a_plan_of_loaded_bundles_is_admitted() -> None:
    assert admission.refusal(PLAN.wire(), config()) is None


@pytest.mark.parametrize("change", [{"speculative_config": object()}, {"scheduler_config__async_scheduling": True}])
def test_speculation_and_asynchronous_scheduling_are_fine_apart(change: dict[str, Any]) -> None:
    assert admission.refusal(PLAN.wire(), config(**change)) is None


@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_several_ranks_are_fine_where_all_of_them_are_asked(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    many = config(parallel_config__world_size=4, parallel_config__distributed_executor_backend=backend)
    assert admission.refusal(PLAN.wire(), many) is None
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    refused = admission.refusal(PLAN.wire(), many)
    assert (refused is None) if backend == "mp" else "VLLM_USE_RAY_V2_EXECUTOR_BACKEND unset" in (refused or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_config__runner_type": "pooling"}, "only text generation"),
        (
            {"parallel_config__world_size": 2, "parallel_config__distributed_executor_backend": "external_launcher"},
            "'external_launcher' brings the output of one rank only",
        ),
        ({"parallel_config__enable_dbo": True}, "dual-batch overlap"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"speculative_config": object(), "scheduler_config__async_scheduling": True}, "--no-async-scheduling"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "fast prefill"),
        ({"kv_transfer_config": object()}, "external KV store"),
    ],
)
def test_an_engine_that_cannot_steer_refuses_every_plan(change: dict[str, Any], message: str) -> None:
    assert message in (admission.refusal(PLAN.wire(), config(**change)) or "")


def test_another_model_is_refused() -> None:
    shallow = config()
    shallow.model_config.hf_text_config.num_hidden_layers = 1
    assert "this model has 1 layers" in (admission.refusal(PLAN.wire(), shallow) or "")


def test_special_tokens_need_a_tokenizer() -> None:
    alone = {"bundle": "calm", "latent": 7, "operation": "ablate", "scope": {"exclude_special": True}}
    wire = compile_plan(parse_steering({"edits": [alone]}), {"calm": CALM}).wire()
    assert admission.refusal(wire, config()) is None
    assert "no tokenizer" in (admission.refusal(wire, config(model_config__skip_tokenizer_init=True)) or "")


def test_a_gate_is_admitted_with_graphs_and_without() -> None:
    gated = {"bundle": "calm", "latent": 7, "operation": "ablate", "gate": {"latent": 8, "above": 1.0}}
    wire = compile_plan(parse_steering({"edits": [gated]}), {"calm": CALM}).wire()
    assert admission.refusal(wire, config()) is None
    assert admission.refusal(wire, config(device_config__device_type="cuda")) is None


def test_a_window_beyond_the_longest_sequence_is_refused() -> None:
    late = {"bundle": "calm", "latent": 7, "operation": "ablate", "scope": {"window": {"start": 512}}}
    plan = compile_plan(parse_steering({"edits": [late]}), {"calm": CALM})
    assert "stops at 512" in (admission.refusal(plan.wire(), config()) or "")


def test_more_rows_than_a_graph_holds_are_refused_where_there_are_graphs() -> None:
    wide = random_bundle(layer=1)
    rows = [row for row in PLAN.rows if row.beta][:1] * 65
    plan = type(PLAN).of([row._replace(row=i) for i, row in enumerate(rows)])
    assert wide.content_hash == CALM.content_hash
    assert admission.refusal(plan.wire(), config()) is None
    graphs = config(device_config__device_type="cuda")
    assert "at most 64 fit" in (admission.refusal(plan.wire(), graphs) or "")
    assert (
        admission.refusal(plan.wire(), config(device_config__device_type="cuda", model_config__enforce_eager=True))
        is None
    )


def test_the_edit_of_cuda_graphs_can_be_asked_for_on_the_host() -> None:
    assert not admission.uses_graphs(config())
    assert admission.uses_graphs(config(additional_config={"trimtab": {"graphs": True}}))


@pytest.mark.parametrize(
    ("change", "message"), [({"resumable": True}, "in pieces"), ({"prompt_embeds": torch.zeros(3, 4)}, "embeddings")]
)
def test_a_request_whose_tokens_are_not_known_at_once_is_refused(change: dict[str, Any], message: str) -> None:
    from vllm.v1.engine import EngineCoreRequest

    fields: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": [1, 2, 3],
        "mm_features": None,
        "sampling_params": None,
        "pooling_params": None,
        "arrival_time": 0.0,
        "lora_request": None,
        "cache_salt": None,
        "data_parallel_rank": None,
    }
    assert admission.unsteerable(EngineCoreRequest(**fields)) is None
    reason = admission.unsteerable(EngineCoreRequest(**fields | change))
    assert reason is not None
    assert message in reason
