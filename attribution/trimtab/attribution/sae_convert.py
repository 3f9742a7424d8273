"""An SAE of any format written as a SAELens folder: safetensors, everything folded, so that nothing opens its pickle again.

The tensors are written a block of latents at a time, so an SAE need not fit in memory. SAELens reads the folder too.
"""

from __future__ import annotations

import json
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.attribution.errors import SAEError
from trimtab.attribution.matrix import Stored, blocks
from trimtab.attribution.sae_files import digest, locate, name_of
from trimtab.attribution.sae_formats import Read, read

__all__ = ["convert"]

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def convert(source: str, out: Path, *, layer: int | None = None, model: str | None = None) -> Read:
    """Write `source` as the folder `out`, whole or not at all, and say what was read.

    Raises:
        SAEError: the SAE cannot be read, or the folder cannot be written.
    """
    path = locate(source, pickles=True)
    found = read(path, layer=layer, pickles=True)
    if out.exists():
        raise SAEError(f"{out} is there already; remove it, or name another folder")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "cfg.json").write_text(json.dumps(_config(found, name_of(path), model), indent=1) + "\n")
        _write(partial / "sae_weights.safetensors", found)
        partial.rename(out)
    except OSError as e:
        raise SAEError(f"cannot write {out}: {e.strerror}; choose a folder you can write to, with room for it") from e
    finally:
        with suppress(OSError):
            shutil.rmtree(partial)
    return found


def _config(found: Read, name: str, model: str | None) -> dict[str, Any]:
    n_latents, d_model = found.d_LD.shape
    return {
        "architecture": "jumprelu" if found.k is None else "topk",
        "d_in": d_model,
        "d_sae": n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": found.normalisation,
        "reshape_activations": "none",
        **({} if found.k is None else {"k": found.k, "rescale_acts_by_decoder_norm": False}),
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": model,
            "hook_name": f"blocks.{found.layer}.hook_resid_post",
            "hf_hook_name": f"model.layers.{found.layer}",
            "converted_from": name,
            "source_digest": digest(found.files),
            "notes": list(found.notes),
        },
    }


def _write(file: Path, found: Read) -> None:
    """The safetensors file: a length, a JSON header, the tensors one after the other."""
    n_latents, d_model = found.d_LD.shape
    tensors: dict[str, tuple[torch.dtype, list[int]]] = {
        "W_enc": (_dtype(found.e_LD), [d_model, n_latents]),
        "W_dec": (_dtype(found.d_LD), [n_latents, d_model]),
        "b_dec": (torch.float32, [d_model]),
        "b_enc": (torch.float32, [n_latents]),
        **({"threshold": (torch.float32, [n_latents])} if found.k is None else {}),
    }
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + dtype.itemsize * int(np.prod(shape))
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        f.truncate(8 + len(head) + end)

    def place(name: str) -> np.ndarray[Any, Any]:
        dtype, shape = tensors[name]
        offset = 8 + len(head) + header[name]["data_offsets"][0]
        return np.memmap(file, dtype=_numpy(dtype), mode="r+", offset=offset, shape=tuple(shape))

    W_enc_DL, W_dec_LD = place("W_enc"), place("W_dec")
    for block in blocks(found.d_LD):
        W_enc_DL[:, block] = _bits(found.e_LD[block].T, tensors["W_enc"][0])
        W_dec_LD[block] = _bits(found.d_LD[block], tensors["W_dec"][0])
    place("b_dec")[:], place("b_enc")[:] = found.b_dec_D.numpy(), found.b_L.numpy()
    if found.k is None:
        place("threshold")[:] = found.theta_L.numpy()


def _dtype(matrix: Stored) -> torch.dtype:
    """The file's own dtype where the rows are as the file has them, else fp32."""
    as_is = matrix.scale_L is None and not matrix.centred and matrix.W_LD.dtype in _NAMES
    return matrix.W_LD.dtype if as_is else torch.float32


def _numpy(dtype: torch.dtype) -> Any:
    return np.float32 if dtype == torch.float32 else np.int16  # NumPy has no bfloat16; two bytes are two bytes.


def _bits(rows: Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    rows = rows.to(dtype).contiguous()
    array: np.ndarray[Any, Any] = (rows if dtype == torch.float32 else rows.view(torch.int16)).numpy()
    return array
