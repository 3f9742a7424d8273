import json
from pathlib import Path

import pytest

from trimtab.server.errors import Unsupported
from trimtab.server.operations.logs import ENGINE_FLAGS
from trimtab.server.service.flags import parse


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32"}))
    return tmp_path


def test_flags_reach_the_engine(model: Path) -> None:
    args, _ = parse(["--max-model-len", "512", "--no-enforce-eager", "--dtype", "bfloat16"], model=model, served="m")
    assert (args.max_model_len, args.enforce_eager, args.dtype) == (512, False, "bfloat16")
    assert (args.model, args.served_model_name) == (str(model), ["m"])


def test_what_is_chosen_for_the_caller_on_a_cpu_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")
    args, chosen = parse([], model=model, served="m")
    assert (args.enforce_eager, args.dtype) == (True, "float32")
    assert [choice.split()[0] for choice in chosen] == ["VLLM_CPU_KVCACHE_SPACE=2", "--enforce-eager", "--dtype"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--api-server-count", "2"],
        ["--enable-dbo"],
        ["--tokenizer", "gpt2"],
        ["--load-format", "dummy"],
        ["--headless"],
        ["--middleware", "a.B"],
        ["--host", "0.0.0.0"],
        ["--api-key", "k"],
        ["--kv-transfer-config", '{"kv_connector": "SharedStorageConnector", "kv_role": "kv_both"}'],
    ],
)
def test_a_flag_that_would_be_ignored_or_break_steering_is_refused(model: Path, flags: list[str]) -> None:
    with pytest.raises(Unsupported, match=f"{flags[0]} is refused"):
        parse(flags, model=model, served="m")


def test_all_refusals_come_at_once(model: Path) -> None:
    with pytest.raises(Unsupported, match=r"--port is refused.*--enable-dbo is refused"):
        parse(["--enable-dbo", "--port", "1"], model=model, served="m")


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--max-model-len", "long"], ["--enable-auto-tool-choice"]])
def test_what_vllm_does_not_take_is_refused_in_one_sentence(model: Path, flags: list[str]) -> None:
    with pytest.raises(Unsupported, match="engine flags: "):
        parse(flags, model=model, served="m")


def test_the_engine_writes_json_where_the_server_does(model: Path) -> None:
    args, _ = parse(ENGINE_FLAGS, model=model, served="m")
    assert args.logging_config.formatter == "json"
