"""With asynchronous scheduling, where a step starts before the last one's tokens are known, answers are those of transformers."""

from collections.abc import Callable

import pytest

from tests.parity.program import found

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_a_mixed_batch_that_outgrows_its_cache_equals_transformers(
    record_property: Callable[[str, object], None],
) -> None:
    answer = found("tests.parity.asynchronous")
    record_property("max_logprob_difference", answer["worst"])
    assert (answer["scheduler"], answer["batches_at_once"]) == ("AsyncScheduler", 2)
    assert answer["different"] == []
    assert answer["worst"] <= 1e-4
    assert answer["preemptions"] > 0
    assert answer["in_use"] == [0, 0, 0]
