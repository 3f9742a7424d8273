"""Every worker proves, before the first request, that its hooks are installed and called; else the server refuses to start.

Every worker is each rank of each engine core (of data parallelism). A layer is hooked by the pipeline stage that owns it, in all
of the stage's tensor-parallel ranks.

    async   await prove(engine_client, {content hashes})      sync    prove_llm(llm, {content hashes})

A worker whose hooks have not been called yet runs one dummy forward before it answers. Where the table does not
list a layer's class, what it is gets measured first (`measurement`): for the refusal to tell, or against what was declared.
"""

from typing import TYPE_CHECKING, Any

from trimtab.server.engine.bundles import everywhere
from trimtab.server.engine.measurement import PROMPT, Reading
from trimtab.server.engine.pin import PLUGIN_VERSION, VLLM_VERSION
from trimtab.server.errors import Unsupported

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm import LLM
    from vllm.engine.protocol import EngineClient

__all__ = ["check", "measure_llm", "prove", "prove_llm"]

_START = "start the engine through `trimtab serve`, or with VLLM_PLUGINS unset or naming trimtab"


async def prove(engine: "EngineClient", bundles: "Collection[str]" = ()) -> list[dict[str, Any]]:
    """The reports of all workers of a running engine, checked.

    Raises:
        Unsupported: a worker is not proven; the message says which, and what to do.
    """
    try:
        reports: list[dict[str, Any]] = await everywhere(engine, "collective_rpc", "trimtab_handshake")
        if any(report.get("unmeasured") for report in reports):
            await _measure(engine)
            reports = await everywhere(engine, "collective_rpc", "trimtab_handshake")
    except Unsupported:
        raise
    except Exception as e:
        raise Unsupported(f"the engine's workers do not answer the handshake ({_first_line(e)}); {_START}") from e
    check(reports, bundles)
    return reports


def prove_llm(llm: "LLM", bundles: "Collection[str]" = ()) -> list[dict[str, Any]]:
    """`prove` for the offline `vllm.LLM`."""
    try:
        reports: list[dict[str, Any]] = llm.collective_rpc("trimtab_handshake")
        if any(report.get("unmeasured") for report in reports):
            measure_llm(llm)
            reports = llm.collective_rpc("trimtab_handshake")
    except Exception as e:
        raise Unsupported(f"the engine's workers do not answer the handshake ({_first_line(e)}); {_START}") from e
    check(reports, bundles)
    return reports


def check(reports: list[dict[str, Any]], bundles: "Collection[str]" = ()) -> None:
    """Nothing, when every rank reports this plugin, hooked layers that were all called, and the bundles.

    Raises:
        Unsupported: the first thing that is not proven.
    """
    from trimtab.server.engine import plugin

    if not plugin.registered():
        raise Unsupported(f"the trimtab plugin is not active in the front end, so no plan would be checked; {_START}")
    if not reports:
        raise Unsupported(f"no worker answered the handshake; {_START}")
    for rank, report in enumerate(reports):
        who = _name(report, rank)
        if report.get("refusal"):
            raise Unsupported(f"{who} cannot steer this model: {report['refusal']}")
        if (report.get("plugin"), report.get("vllm")) != (PLUGIN_VERSION, VLLM_VERSION):
            raise Unsupported(
                f"{who} runs plugin {report.get('plugin')} on vLLM {report.get('vllm')}, but this server is plugin "
                f"{PLUGIN_VERSION} for vLLM {VLLM_VERSION}; install the same release on every node"
            )
        calls: dict[int, int] = {int(layer): n for layer, n in report.get("calls", {}).items()}
        silent = [layer for layer in report.get("layers", []) if not calls.get(layer)]
        if silent:
            raise Unsupported(
                f"{who}: the hooks of layers {silent} were not called in a forward pass, so edits there would be lost; turn off "
                "weight offloading and clear the compile cache (~/.cache/vllm), then start again"
            )
        missing = sorted(set(bundles) - set(report.get("bundles", [])))
        if missing:
            raise Unsupported(f"{who} does not hold bundle {missing[0]}; load it again")
    for core in {report.get("core", 0) for report in reports}:
        _check_stages([report for report in reports if report.get("core", 0) == core])


def _check_stages(reports: list[dict[str, Any]]) -> None:
    """Nothing, when every steerable layer is hooked by one stage of an engine core, in all ranks of that stage."""
    hooked: dict[int, list[int]] = {}
    for rank, report in enumerate(reports):
        layers = hooked.setdefault(report.get("stage", 0), report["layers"])
        if layers != report["layers"]:
            raise Unsupported(
                f"{_name(report, rank)} hooks layers {report['layers']} and another rank of its pipeline stage {layers}; install "
                "the same release on every node"
            )
    own = [layer for layers in hooked.values() for layer in layers]
    wanted = set(own).union(*(report.get("elsewhere", []) for report in reports))
    if not own or sorted(own) != sorted(wanted):
        raise Unsupported(
            f"the pipeline stages hook layers {sorted(own) or 'none'}, and the model has {sorted(wanted) or 'none'}; start the "
            "workers of every stage with the plugin"
        )


def _name(report: dict[str, Any], rank: int) -> str:
    name = f"worker {report.get('rank', rank)}"
    return f"{name} of engine core {report['core']}" if report.get("core") else name


def measure_llm(llm: "LLM") -> list[Reading]:
    """What the decoder layers of a `vllm.LLM` measure as, its first rank's."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    for _ in range(max(llm.collective_rpc("trimtab_measure"))):
        llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    return [Reading(**fields) for fields in llm.collective_rpc("trimtab_measured")[0]]


async def _measure(engine: "EngineClient") -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    for i in range(max(await everywhere(engine, "collective_rpc", "trimtab_measure"))):
        async for _ in engine.generate({"prompt_token_ids": PROMPT}, params, f"trimtab-measure-{i}"):
            pass
    await everywhere(engine, "collective_rpc", "trimtab_measured")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
