"""What the plugin says to real engines whose layers it does not know, and to a model of several streams."""

from typing import Any
from unittest.mock import patch

from tests.parity.architectures.compare import compare, start
from tests.parity.architectures.zoo import SEVERAL_STREAMS, ZOO
from trimtab.server.engine.handshake import measure_llm, prove_llm
from trimtab.server.engine.kinds import KINDS
from trimtab.server.engine.worker import Steering
from trimtab.server.errors import Unsupported

__all__ = ["refusals"]

_QWEN = "vllm.model_executor.models.qwen2.Qwen2DecoderLayer"
_COHERE = "vllm.model_executor.models.commandr.CohereDecoderLayer"


def refusals() -> dict[str, str]:
    """Situation → the handshake's refusal, or "steers"; and the error of a kind that is wrong in the table."""
    said = {}
    with patch.dict(KINDS), start("qwen2", ZOO["qwen2"]) as engine:
        del KINDS[_QWEN]
        said["unlisted"] = _handshake(engine.llm)
        said["declared a pair"] = _handshake(engine.llm, {_QWEN: "pair"})
        said["declared a decoy"] = _handshake(engine.llm, {_QWEN: "decoy"})
        said["declared nonsense"] = _handshake(engine.llm, {_QWEN: "pears"})
    with patch.dict(KINDS, {_COHERE: "pair"}):
        said["a decoy read as a pair"] = str(compare("cohere").error)
    with start("gemma3n", SEVERAL_STREAMS) as engine:
        said["several streams"] = _handshake(engine.llm)
        said["several streams, measured"] = str({reading.kind for reading in measure_llm(engine.llm)})
    return said


def _handshake(llm: Any, declared: dict[str, str] | None = None) -> str:
    """What the handshake says after the plugin is installed anew with these declarations."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    worker.vllm_config.additional_config = {"trimtab": {"kinds": declared or {}}}
    worker.trimtab = Steering(worker)
    try:
        prove_llm(llm)
    except Unsupported as e:
        return e.message
    return "steers"
