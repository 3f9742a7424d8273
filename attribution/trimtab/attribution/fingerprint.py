"""What tells one model, or one tokenizer, from another, cheaply enough to check at every start.

A model's fingerprint hashes every tensor's name, dtype, shape and two samples of its bytes; it does not depend on how the
tensors are spread over files. It is an identity check against serving the wrong model, not a proof against tampering.
"""

import hashlib
import json
import struct
from pathlib import Path

__all__ = ["FingerprintError", "model_fingerprint", "model_folder", "tokenizer_digest"]

_SAMPLE_BYTES = 4096


class FingerprintError(ValueError):
    """A model folder has nothing that can be fingerprinted; the message says what is missing."""


def model_folder(model: str) -> Path:
    """The local folder of an HF folder or hub id (from the local hub cache, downloaded when a hub is reachable).

    Raises:
        FingerprintError: there is neither a folder of that name nor a reachable hub repository.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "tokenizer*"]))
    except Exception as e:
        raise FingerprintError(
            f"model {model!r} is neither a folder nor a hub id that can be fetched: {e}; "
            "give the path of an ordinary HF folder"
        ) from e


def model_fingerprint(folder: Path) -> str:
    """`sha256:…` over the folder's safetensors weights.

    Raises:
        FingerprintError: the folder has no safetensors weights, or one is broken.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FingerprintError(f"{folder} holds no *.safetensors weights; save the model with save_pretrained first")
    entries: dict[str, bytes] = {}
    for file in files:
        with file.open("rb") as f:
            head = f.read(8)
            n_header = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 0 < n_header <= 100_000_000:
                raise FingerprintError(f"{file} is not a safetensors file; fetch it again")
            try:
                header = json.loads(f.read(n_header))
            except ValueError as e:
                raise FingerprintError(f"{file} has a broken header ({e}); fetch it again") from e
            for name, info in header.items():
                if name == "__metadata__":
                    continue
                lo, hi = info["data_offsets"]
                sha = hashlib.sha256(f"{name}|{info['dtype']}|{info['shape']}|".encode())
                for start in (lo, max(lo, (lo + hi) // 2)):
                    f.seek(8 + n_header + start)
                    sha.update(f.read(min(_SAMPLE_BYTES, hi - start)))
                entries[name] = sha.digest()
    return "sha256:" + hashlib.sha256(b"".join(entries[name] for name in sorted(entries))).hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """`sha256:…` over the vocabulary and the added tokens of `tokenizer.json`.

    Raises:
        FingerprintError: the folder has no tokenizer.json.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FingerprintError(f"{folder} holds no tokenizer.json; save the fast tokenizer there with save_pretrained")
    spec = json.loads(file.read_text())
    vocab = spec["model"].get("vocab", [])
    pairs = sorted(vocab.items()) if isinstance(vocab, dict) else vocab
    added = sorted((token["id"], token["content"]) for token in spec.get("added_tokens", []))
    return "sha256:" + hashlib.sha256(json.dumps([pairs, added], ensure_ascii=True).encode()).hexdigest()
