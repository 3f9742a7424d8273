"""Where an SAE's tensors lie, and reading them without loading them.

safetensors files and uncompressed `.npz` archives are memory-mapped: a tensor is a view of the file, and the pages that are read
can be dropped again. Pickles are opened by `trimtab sae convert` alone, and only as tensors (`weights_only=True`).
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trimtab.attribution.errors import SAEError

__all__ = ["PICKLES", "digest", "document", "locate", "name_of", "npz", "pickled", "safetensors"]

PICKLES = (".pt", ".pth", ".bin", ".pkl")
_ENDINGS = ["*.safetensors", "*.npz", "*.json", "*.jsonl.gz"]


def locate(source: str, *, pickles: bool = False) -> Path:
    """The local file or folder of a path, or of a hub id with a folder in it: `org/repository/layer_20/width_16k`.

    Raises:
        SAEError: there is neither such a path nor such a folder on a reachable hub.
    """
    if Path(source).exists():
        return Path(source)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./ -]+?))?/?", source)
    if match is None or source.startswith((".", "/")):
        raise SAEError(f"there is no SAE at {source}; give a SAELens folder, or one of the formats in the README")
    from huggingface_hub import snapshot_download

    repository, inside = match[1], match[2] or ""
    wanted = [*_ENDINGS, *(f"*{ending}" for ending in PICKLES if pickles)]
    if inside:
        wanted = [f"{inside}/{ending}" for ending in wanted] + ([inside] if pickles or "." in inside else [])
    try:
        root = Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as e:  # The hub client raises many kinds; each means that the SAE is not here.
        reason = str(e).split("\n")[0]
        raise SAEError(
            f"{source} is neither a path nor an SAE that the hub gives ({reason}); give a SAELens folder"
        ) from e
    if not (root / inside).exists():
        raise SAEError(f"hub repository {repository} has no {inside}; look up the folder of the SAE there")
    return root / inside


def name_of(path: Path) -> str:
    """What to call an SAE: its path within its hub repository, or its last two folders."""
    for i, part in enumerate(path.parts):
        if part.startswith("models--") and path.parts[i + 1 : i + 2] == ("snapshots",):
            return "/".join([*part.split("--")[1:], *path.parts[i + 3 :]])
    return f"{path.parent.name}/{path.name}"


def document(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        SAEError: the file is missing, no JSON, or no object.
    """
    try:
        found = json.loads(file.read_text())
    except OSError as e:
        raise SAEError(f"cannot read {file}: {e.strerror}; give a SAELens folder") from e
    except ValueError as e:
        raise SAEError(f"{file} is not JSON ({e}); fetch the SAE again") from e
    if not isinstance(found, dict):
        raise SAEError(f"{file} is not a JSON object; give a SAELens folder")
    return found


def safetensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, mapped.

    Raises:
        SAEError: the file is cut short or no safetensors.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as e:
        raise SAEError(f"{file} is not a whole safetensors file ({e}); fetch it again") from e


def npz(file: Path) -> dict[str, Tensor]:
    """Every array of an archive, mapped where it is stored uncompressed; an array of objects is a pickle, and refused.

    Raises:
        SAEError: the file is damaged or holds something else than numbers.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        with np.load(file, allow_pickle=False) as arrays:
            found = {}
            for name, info in infos.items():
                stored = info.compress_type == zipfile.ZIP_STORED
                array = _mapped(file, info.header_offset) if stored else arrays[name]
                found[name] = torch.from_numpy(array)
        return found
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as e:
        raise SAEError(f"{file} is not a whole archive of arrays ({e}); fetch it again") from e


def _mapped(file: Path, offset: int) -> Any:
    """The array of a stored member, copy-on-write over the file; `offset` is where its local header starts."""
    read_format: Any = np.lib.format  # Its readers are untyped.
    with file.open("rb") as f:
        f.seek(offset)
        n_name, n_extra = struct.unpack("<HH", f.read(30)[26:30])
        f.seek(n_name + n_extra, 1)
        read = getattr(read_format, "read_array_header_{}_{}".format(*read_format.read_magic(f)))
        shape, fortran, dtype = read(f)
        if dtype.hasobject:
            raise ValueError("an array of Python objects")
        order: Literal["F", "C"] = "F" if fortran else "C"
        return np.memmap(file, dtype=dtype, mode="c", offset=f.tell(), shape=shape or (1,), order=order).reshape(shape)


def pickled(file: Path) -> dict[str, Any]:
    """A state dict out of a PyTorch file, nothing but tensors and numbers; for the converter alone.

    Raises:
        SAEError: the file holds anything else, or is damaged.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as e:
        reason = str(e).split("\n")[0]
        raise SAEError(
            f"{file} holds more than tensors and is not opened ({reason}); ask its author for safetensors"
        ) from e
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as e:
        raise SAEError(f"{file} is not a whole PyTorch file ({str(e).splitlines()[0]}); fetch it again") from e
    if not isinstance(found, dict):
        raise SAEError(f"{file} holds a {type(found).__name__}, not a state dict; ask its author for safetensors")
    return found


def digest(files: Sequence[Path]) -> str:
    """`sha256:…` over the files' bytes, in order."""
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as f:
            while chunk := f.read(1 << 22):
                sha.update(chunk)
    return "sha256:" + sha.hexdigest()
