"""An engine whose workers are not all proven is refused with a sentence that says what to do."""

from typing import Any

import pytest

from trimtab.server.engine import handshake, plugin
from trimtab.server.engine.pin import PLUGIN_VERSION, VLLM_VERSION
from trimtab.server.errors import Unsupported


def report(**changes: Any) -> dict[str, Any]:
    return {
        "rank": 0,
        "plugin": PLUGIN_VERSION,
        "vllm": VLLM_VERSION,
        "runner": "v1",
        "refusal": None,
        "layers": [0, 1],
        "calls": {"0": 1, "1": 1},
        "bundles": ["sha256:a"],
        "requests": 0,
    } | changes


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_registered", True)


@pytest.mark.usefixtures("registered")
def test_proven_workers_pass() -> None:
    handshake.check([report(), report(rank=1)], ["sha256:a"])


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([], "no worker answered"),
        (
            [report(), report(rank=3, refusal="its layers are odd")],
            "worker 3 cannot steer this model: its layers are odd",
        ),
        ([report(plugin="0.0.1")], "plugin 0.0.1"),
        ([report(vllm="0.31.0")], "vLLM 0.31.0"),
        ([report(calls={"0": 1, "1": 0})], r"layers \[1\] were not called"),
        ([report(layers=[])], "were not called"),
        ([report(bundles=[])], "does not hold bundle sha256:a"),
    ],
)
def test_a_worker_that_is_not_proven_is_refused(reports: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        handshake.check(reports, ["sha256:a"])


def test_a_front_end_without_the_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_registered", False)
    with pytest.raises(Unsupported, match="not active in the front end"):
        handshake.check([report()])


class Mute:
    """An engine whose workers know no trimtab: what vLLM raises for an unknown RPC."""

    async def collective_rpc(self, method: str) -> list[Any]:
        raise AttributeError(f"'CPUWorker' object has no attribute '{method}'")


async def test_workers_without_the_plugin_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"do not answer the handshake.*VLLM_PLUGINS"):
        await handshake.prove(Mute())  # type: ignore[arg-type]
