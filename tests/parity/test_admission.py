"""The running engine refuses what it cannot serve before a token runs, and serves on."""

import json
from typing import Any

import pytest

from tests.parity.cases import PROMPTS, edit
from tests.parity.engine import Engine
from tests.parity.rows import MODEL, steering_bundle
from tests.parity.rows import bundles as known
from trimtab.attribution.bundle import Bundle
from trimtab.server.engine.bundles import register_bundle
from trimtab.server.engine.handshake import prove_llm
from trimtab.server.engine.proof import KEY
from trimtab.server.errors import Unsupported
from trimtab.server.plan import Plan, PlanRow, compile_plan
from trimtab.server.steering import parse_steering

pytestmark = pytest.mark.filterwarnings("ignore")


def plan(*edits: dict[str, object], bundles: dict[str, Bundle] | None = None) -> Plan:
    return compile_plan(parse_steering({"edits": list(edits)}), bundles or known())


def foreign(**model: Any) -> Bundle:
    bundle = steering_bundle("foreign", 14, 5)
    header = bundle.header.model_copy(update={"model": MODEL.model_copy(update=model)})
    width = header.model.d_model
    rows = {name: getattr(bundle, name)[:, :width] for name in ("decoder", "encoder", "vectors")}
    return Bundle(header, bias=bundle.bias, threshold=bundle.threshold, baseline=bundle.baseline, **rows)


def refused(engine: Engine, wire: Any) -> str:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as caught:
        engine.llm.generate([PROMPTS["short"]], SamplingParams(extra_args={KEY: wire}), use_tqdm=False)
    return str(caught.value)


def test_a_bundle_that_is_not_loaded_is_refused(engine: Engine) -> None:
    stranger = steering_bundle("stranger", 14, 77)
    wire = plan(edit("add", 1.0) | {"bundle": "stranger"}, bundles={"stranger": stranger}).wire()
    assert "is not loaded" in refused(engine, wire)


@pytest.mark.parametrize(
    "wire", ["{}", "not json", "[]", 7, {"rows": []}, json.dumps({"hash": "sha256:0", "rows": []})]
)
def test_what_is_no_plan_is_refused(engine: Engine, wire: Any) -> None:
    assert "plan" in refused(engine, wire)


@pytest.mark.parametrize(
    ("field", "value", "message"), [(3, "decoder", "source"), (4, 99, "row 99"), (4, -1, "row -1"), (0, 7, "layer 7")]
)
def test_a_tampered_row_is_refused(engine: Engine, field: int, value: Any, message: str) -> None:
    (row,) = plan(edit("add", 1.0)).rows
    changed: list[Any] = [*row]
    changed[field] = value
    assert message in refused(engine, Plan.of([PlanRow(*changed)]).wire())


def test_a_gate_that_the_engine_cannot_read_is_refused(engine: Engine) -> None:
    (row,) = plan(edit("add", 1.0, gate={"latent": 101, "above": 1.0})).rows
    assert row.gate is not None
    for gate, message in (
        (row.gate._replace(bundle="sha256:0"), "is not loaded"),
        (row.gate._replace(row=99), "row 99"),
        (row.gate._replace(bundle=known()["l3"].content_hash), "of layer 3"),
        (row.gate._replace(mode="always"), "impossible gate"),  # type: ignore[arg-type]
    ):
        assert message in refused(engine, Plan.of([row._replace(gate=gate)]).wire())


def test_nan_is_refused(engine: Engine) -> None:
    wire = plan(edit("add", 1.0)).wire().replace("1.0", "NaN")
    assert "finite" in refused(engine, wire)


def test_a_bundle_of_another_width_is_refused_by_the_workers(engine: Engine) -> None:
    with pytest.raises(Unsupported, match="128 wide"):
        register_bundle(engine.llm, foreign(d_model=128))


def test_a_bundle_for_a_deeper_model_is_refused_by_the_workers(engine: Engine) -> None:
    bundle = steering_bundle("deep", 29, 5)
    header = bundle.header.model_copy(update={"layer": 40, "model": MODEL.model_copy(update={"n_layers": 48})})
    rows = {n: getattr(bundle, n) for n in ("decoder", "encoder", "bias", "threshold", "baseline", "vectors")}
    with pytest.raises(Unsupported, match="layer 40"):
        register_bundle(engine.llm, Bundle(header, **rows))


def test_a_bundle_that_no_worker_holds_is_not_proven(engine: Engine) -> None:
    with pytest.raises(Unsupported, match="does not hold bundle sha256:0"):
        prove_llm(engine.llm, ["sha256:0"])
