"""Whatever JSON arrives, it is admitted or refused with violations; nothing else leaves admission."""

import contextlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bundles import random_bundle
from trimtab.server.errors import InvalidRequest, InvalidSteering, UnknownBundle
from trimtab.server.service.admission import admit
from trimtab.server.service.body import decode

BUNDLES = {"calm": random_bundle()}
WORDS = st.sampled_from(
    [
        "calm",
        "bundle",
        "edits",
        "latent",
        "operation",
        "add",
        "clamp",
        "scope",
        "tokens",
        "strength",
        "unit",
        "amount",
        "",
        "é",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5)
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=5), max_leaves=12
)
EDIT = st.fixed_dictionaries(
    {
        "bundle": st.just("calm") | JSON,
        "operation": st.sampled_from(["add", "ablate", "clamp", "scale", "project"]) | JSON,
    },
    optional={
        "latent": st.sampled_from([7, 8, 9, 10]) | JSON,
        "vector": st.just("mean") | JSON,
        "amount": JSON,
        "target": JSON,
        "factor": JSON,
        "unit": WORDS,
        "strength": JSON,
        "scope": JSON,
    },
)
STEERING = (
    st.fixed_dictionaries({}, optional={"bundle": WORDS, "edits": st.lists(EDIT, max_size=3), "strength": JSON}) | JSON
)


@settings(deadline=None, max_examples=100)
@given(steering=STEERING, model=st.text(max_size=10) | st.just("m@calm:1") | JSON, xargs=JSON)
def test_any_json_is_admitted_or_refused(steering: Any, model: Any, xargs: Any) -> None:
    text = json.dumps({"model": model, "steering": steering, "vllm_xargs": xargs})
    with contextlib.suppress(InvalidRequest, InvalidSteering, UnknownBundle):
        admission = admit(decode(text.encode()), fields={"model", "vllm_xargs"}, models=("m",), bundles=BUNDLES)
        assert admission.steered is not None


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_an_object_or_refused(data: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        assert isinstance(decode(data), dict)
