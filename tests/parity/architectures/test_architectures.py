"""Each entry of the table of decoder layers, on a tiny random model of its architecture: the real engine beside transformers."""

from pathlib import Path
from typing import Any

import pytest

from tests.parity.architectures.conftest import Found
from tests.parity.architectures.zoo import QUICK
from trimtab.server.engine.kinds import KINDS

_TOLERANCE = 1e-4
_LEAST_EFFECT = 1e-3


def check(findings: list[dict[str, Any]]) -> None:
    """Every finding is what the table claims, and its edits did far more than the error."""
    for found in findings:
        assert found["measured"] == {name: [kind] for name, kind in found["kinds"].items()}, found
        assert found["same"], found
        assert found["error"] <= _TOLERANCE, found
        assert found["effect"] >= max(_LEAST_EFFECT, 100 * found["error"]), found


@pytest.mark.slow
def test_one_of_each_kind_equals_transformers_and_measures_as_listed(quick: Found) -> None:
    check(quick.architectures)
    assert [found["name"] for found in quick.architectures] == list(QUICK)
    kinds = {kind for found in quick.architectures for kind in found["kinds"].values()}
    assert kinds == set(KINDS.values())


@pytest.mark.slow
def test_an_unlisted_class_is_measured_and_refused(quick: Found) -> None:
    said = quick.refusals["unlisted"]
    assert "Qwen2DecoderLayer are not in the table" in said
    assert "Qwen2DecoderLayer measures as 'pair'" in said
    assert "docs/architectures.md" in said


@pytest.mark.slow
def test_a_declared_kind_is_used_if_it_measures_so(quick: Found) -> None:
    said = quick.refusals
    assert said["declared a pair"] == "steers"
    assert "was declared 'decoy'" in said["declared a decoy"]
    assert "measures as 'pair'" in said["declared a decoy"]
    assert "'pears'" in said["declared nonsense"]


@pytest.mark.slow
def test_a_model_of_several_streams_is_refused_and_measures_as_no_kind(quick: Found) -> None:
    assert "AltUp" in quick.refusals["several streams"]
    assert quick.refusals["several streams, measured"] == "{None}"


@pytest.mark.slow
def test_reading_a_decoy_as_a_pair_would_be_seen(quick: Found) -> None:
    """The comparison has the power to tell a wrong kind: what the edit reads is then far from transformers."""
    assert float(quick.refusals["a decoy read as a pair"]) > 100 * _TOLERANCE


def test_the_page_lists_every_class_of_the_table() -> None:
    page = Path(__file__).parents[3].joinpath("docs/architectures.md").read_text()
    assert [name for name in KINDS if f".{name.rpartition('.')[2]}`" not in page] == []


@pytest.mark.slow
def test_every_listed_class_equals_transformers_and_measures_as_listed(every: Found) -> None:
    check(every.architectures)
    assert {name for found in every.architectures for name in found["kinds"]} == set(KINDS)
