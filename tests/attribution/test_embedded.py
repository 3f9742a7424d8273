"""The embedded model's folder is complete or absent, and made once however many ask for it."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from trimtab.attribution import embedded


@pytest.fixture
def fake_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in `tmp_path`, with fetching and converting replaced by tiny files: the real ones take half a minute."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    _replace_steps()
    monkeypatch.setattr(embedded, "_fetch", embedded._fetch)  # Restored at the end of the test, as are the two below.
    return tmp_path


@pytest.fixture(autouse=True)
def _restore_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_fetch", "_convert", "_tensors_sha256"):
        monkeypatch.setattr(embedded, name, getattr(embedded, name))


def _replace_steps() -> None:
    def fetch(work: Path) -> Path:
        return work / "model.gguf"

    def convert(gguf: Path, made: Path) -> None:
        made.mkdir()
        (made / "model.safetensors").write_bytes(b"weights")
        (made / "config.json").write_text("{}")
        with (gguf.parent.parent.parent / "conversions").open("a") as log:
            log.write("1\n")

    embedded._fetch = fetch
    embedded._convert = convert
    embedded._tensors_sha256 = lambda path: embedded._TENSORS_SHA256


def _ask(cache: str) -> None:
    os.environ["TRIMTAB_CACHE"] = cache
    _replace_steps()
    embedded.model_path()


def test_other_names_resolve_to_themselves() -> None:
    assert embedded.resolve("some/hub-id") == "some/hub-id"
    assert embedded.resolve("/a/folder") == "/a/folder"


def test_a_second_call_converts_nothing(fake_steps: Path) -> None:
    first = embedded.model_path()
    assert embedded.model_path(verify=True) == first
    assert embedded.resolve(embedded.EMBEDDED_MODEL) == str(first)
    assert (fake_steps / "conversions").read_text() == "1\n"


def test_two_processes_convert_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    asking = [context.Process(target=_ask, args=(str(tmp_path),)) for _ in range(3)]
    for process in asking:
        process.start()
    for process in asking:
        process.join()
    assert [process.exitcode for process in asking] == [0, 0, 0]
    assert (tmp_path / "conversions").read_text() == "1\n"


@pytest.mark.parametrize("step", ["_fetch", "_convert", "_seal"])
def test_an_interrupted_step_leaves_nothing(fake_steps: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        embedded.model_path()
    assert [path.name for path in (fake_steps / "models").iterdir()] == [f".{embedded.EMBEDDED_MODEL}.lock"]


def test_what_a_killed_process_left_is_swept(fake_steps: Path) -> None:
    stale = fake_steps / "models" / f".{embedded.EMBEDDED_MODEL}.abc.part"
    stale.mkdir(parents=True)
    embedded.model_path()
    assert not stale.exists()


def test_a_truncated_file_is_made_again(fake_steps: Path) -> None:
    weights = embedded.model_path() / "model.safetensors"
    weights.write_bytes(b"wei")
    embedded.model_path()
    assert weights.read_bytes() == b"weights"


def test_verify_finds_a_changed_byte(fake_steps: Path) -> None:
    weights = embedded.model_path() / "model.safetensors"
    weights.write_bytes(b"Weights")
    embedded.model_path()
    assert weights.read_bytes() == b"Weights"  # Sizes alone do not tell.
    embedded.model_path(verify=True)
    assert weights.read_bytes() == b"weights"


def test_other_weights_are_refused(fake_steps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_tensors_sha256", lambda path: "0" * 64)
    with pytest.raises(embedded.EmbeddedModelError, match="not the pinned"):
        embedded.model_path()
    assert not (fake_steps / "models" / embedded.EMBEDDED_MODEL).exists()


def test_the_real_folder_loads_with_its_chat_template() -> None:
    transformers = pytest.importorskip("transformers")
    folder = embedded.model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_start|>1234<|im_end|>").input_ids == [1, 33, 34, 35, 36, 2]
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == 2
    assert "quantization_config" not in config
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
