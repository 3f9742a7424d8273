"""A graph that was compiled without the plugin is never run with it, nor the other way round: cold and warm, in one cache.

Symptom in the study before this plugin: vLLM names a compiled artifact before it has traced anything, by its version, its
configuration and the model's class. With the plugin switched on later the name was the same, so the artifact without the edit was
taken: fluent, unsteered replies.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.parity.compiled import asked
from tests.parity.on_device import bundles, model
from tests.parity.program import found
from tests.parity.reference import Reference

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def run(folder: Path, cache: Path, *, plugin: bool) -> dict[str, Any]:
    """What an engine with this cache finds."""
    without = {} if plugin else {"VLLM_PLUGINS": ""}
    return found("tests.parity.compiled", str(folder), VLLM_CACHE_ROOT=str(cache), **without)


def apart(a: list[Any], b: list[Any]) -> float:
    """The largest difference of log-probabilities; the tokens must be the same."""
    assert [tokens for tokens, _ in a] == [tokens for tokens, _ in b]
    pairs = (pair for (_, p), (_, q) in zip(a, b, strict=True) for pair in zip(p, q, strict=True))
    return float(max(abs(x - y) for x, y in pairs))


def test_with_and_without_the_plugin_in_one_cache_cold_and_warm(tmp_path: Path) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    folder.mkdir()
    model(folder)
    plain = run(folder, cache, plugin=False)
    steered = run(folder, cache, plugin=True)
    assert len(plain["artifacts"]) == 1
    assert len(steered["artifacts"]) == 2
    assert set(plain["artifacts"]) < set(steered["artifacts"])

    reference, by_hash = Reference(folder), {bundle.content_hash: bundle for bundle in bundles().values()}
    expected = [reference(plan, by_hash, p, a[0]) for (p, plan), a in zip(asked(), steered["answers"], strict=True)]
    assert apart(steered["answers"], [[e.tokens, e.logprobs] for e in expected]) <= 1e-4
    unsteered = [a for (_, plan), a in zip(asked(), steered["answers"], strict=True) if plan is None]
    assert apart(unsteered, plain["answers"]) <= 1e-5

    for plugin, before in ((True, steered), (False, plain), (True, steered)):
        again = run(folder, cache, plugin=plugin)
        assert again["artifacts"] == steered["artifacts"]
        assert apart(again["answers"], before["answers"]) <= 1e-5
