"""An engine whose workers are not all proven is refused with a sentence that says what to do."""

from typing import Any

import pytest

from trimtab.server.engine import handshake, plugin
from trimtab.server.engine.pin import PLUGIN_VERSION, VLLM_VERSION
from trimtab.server.errors import Unsupported


def report(**changes: Any) -> dict[str, Any]:
    return {
        "core": 0,
        "rank": 0,
        "stage": 0,
        "plugin": PLUGIN_VERSION,
        "vllm": VLLM_VERSION,
        "runner": "v1",
        "refusal": None,
        "layers": [0, 1],
        "elsewhere": [],
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
def test_stages_together_hook_every_layer_in_each_engine_core() -> None:
    stages = [
        report(
            core=core, rank=rank, stage=rank // 2, layers=own, calls=dict.fromkeys(map(str, own), 1), elsewhere=other
        )
        for core in (0, 1)
        for rank, (own, other) in enumerate([([0, 1], [2]), ([0, 1], [2]), ([2], [0, 1]), ([2], [0, 1])])
    ]
    handshake.check(stages, ["sha256:a"])
    # A stage may own no layer that this server steers.
    handshake.check([report(elsewhere=[]), report(rank=1, stage=1, layers=[], calls={}, elsewhere=[0, 1])])


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
        ([report(layers=[])], "hook layers none"),
        ([report(), report(rank=1, layers=[0])], r"worker 1 hooks layers \[0\] and another rank"),
        ([report(), report(core=1, refusal="its layers are odd")], "worker 0 of engine core 1 cannot steer"),
        (
            [report(elsewhere=[2, 3]), report(rank=1, stage=1, layers=[3], calls={"3": 1}, elsewhere=[0, 1])],
            r"stages hook layers \[0, 1, 3\], and the model has \[0, 1, 2, 3\]",
        ),
        ([report(elsewhere=[2]), report(core=1, layers=[2], calls={"2": 1}, elsewhere=[0, 1])], "stages hook layers"),
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

    @property
    def engine_core(self) -> "Mute":
        return self

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        raise AttributeError(f"'CPUWorker' object has no attribute '{args[0]}'")


class TwoCores:
    """An engine of two data-parallel cores, as its client answers for them: one list of workers for each."""

    def __init__(self, *by_core: list[dict[str, Any]]) -> None:
        self.by_core = by_core

    @property
    def engine_core(self) -> "TwoCores":
        return self

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        assert (method, args) == ("collective_rpc", ("trimtab_handshake",))
        return list(self.by_core)


@pytest.mark.usefixtures("registered")
async def test_the_workers_of_every_engine_core_are_asked() -> None:
    both: Any = TwoCores([report(), report(rank=1)], [report(core=1), report(core=1, rank=1)])
    assert [(r["core"], r["rank"]) for r in await handshake.prove(both)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    lame: Any = TwoCores([report()], [report(core=1, bundles=[])])
    with pytest.raises(Unsupported, match="worker 0 of engine core 1 does not hold bundle sha256:a"):
        await handshake.prove(lame, ["sha256:a"])


async def test_a_client_that_reaches_one_core_alone_is_refused() -> None:
    with pytest.raises(Unsupported, match="does not reach every worker"):
        await handshake.prove(object())  # type: ignore[arg-type]


async def test_workers_without_the_plugin_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"do not answer the handshake.*VLLM_PLUGINS"):
        await handshake.prove(Mute())  # type: ignore[arg-type]
