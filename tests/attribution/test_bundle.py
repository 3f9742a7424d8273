"""The bundle file: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as st

from tests.bundles import TINY, random_bundle
from trimtab.attribution.bundle import Bundle, BundleError, Header, LatentRecord, RecommendedEdit


def rewritten(bundle: Bundle, *, tensors: dict[str, Any] | None = None, **header: Any) -> bytes:
    """The bundle's bytes with header fields or tensors replaced by hand, its content hash left as it was."""
    data = bundle.to_bytes()
    n = int.from_bytes(data[:8], "little")
    document = json.loads(json.loads(data[8 : 8 + n])["__metadata__"]["trimtab"])
    arrays = {**st.load(data), **(tensors or {})}
    return st.save(arrays, metadata={"trimtab": json.dumps({**document, **header}, sort_keys=True)})


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    bundle = random_bundle()
    file = tmp_path / "deep" / "b.safetensors"
    bundle.save(file)
    loaded = Bundle.load(file)
    assert loaded.header == bundle.header
    assert loaded.content_hash == bundle.content_hash
    assert loaded.to_bytes() == bundle.to_bytes() == file.read_bytes()
    assert (loaded.decoder == bundle.decoder).all()
    assert list(file.parent.iterdir()) == [file]


def test_the_content_hash_names_rows_and_header() -> None:
    hashes = {
        random_bundle().content_hash,
        random_bundle(seed=1).content_hash,
        random_bundle(name="other").content_hash,
        random_bundle(layer=2).content_hash,
    }
    assert len(hashes) == 4
    assert random_bundle().content_hash in hashes


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    file = tmp_path / "b.safetensors"
    file.write_bytes(random_bundle().to_bytes()[:length])
    with pytest.raises(BundleError, match="not a whole trimtab bundle"):
        Bundle.load(file)


def test_a_renamed_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    file = tmp_path / "b.safetensors"
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(BundleError, match="not a whole trimtab bundle"):
        Bundle.load(file)
    assert not (tmp_path / "sprung").exists()


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "b.safetensors"
    st.save_file({"x": np.zeros(3, np.float32)}, file)
    with pytest.raises(BundleError, match="a safetensors file but not a trimtab bundle"):
        Bundle.load(file)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "format version 2; this release reads version 1"),
        ({"name": "renamed"}, "does not match its content hash"),
        ({"content_hash": "sha256:0"}, "does not match its content hash"),
        ({"tensors": {"decoder": np.ones((3, 4), np.float32)}}, "does not match its content hash"),
        ({"tensors": {"extra": np.ones(3, np.float32)}}, "holds tensors"),
    ],
)
def test_an_altered_file_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BundleError, match=says):
        Bundle.from_bytes(rewritten(random_bundle(), **change))


def test_nan_in_a_row_is_refused() -> None:
    bundle = random_bundle()
    decoder = bundle.decoder.copy()
    decoder[1, 2] = np.nan
    with pytest.raises(BundleError, match="'decoder' holds NaN or infinity"):
        Bundle(
            bundle.header,
            decoder=decoder,
            encoder=bundle.encoder,
            bias=bundle.bias,
            threshold=bundle.threshold,
            baseline=bundle.baseline,
            vectors=bundle.vectors,
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 8),
        ("n_layers", 4),
        ("architecture", "Other"),
        ("fingerprint", "sha256:x"),
        ("tokenizer", "sha256:x"),
    ],
)
def test_another_model_is_refused_and_the_difference_named(field: str, value: Any) -> None:
    bundle = random_bundle()
    bundle.check_model(TINY)
    bundle.check_model(TINY.model_copy(update={"id": "another folder of the same weights"}))
    with pytest.raises(BundleError, match=f"made for tiny \\({field} "):
        bundle.check_model(TINY.model_copy(update={field: value}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": "red"}, "colour"),
        ({"layer": 3}, "outside the model's 3 layers"),
        ({"latents": (LatentRecord(latent=7, attribution=0.1, max_activation=1.0),) * 2}, "listed twice"),
        (
            {"latents": (LatentRecord(latent=100, attribution=0.1, max_activation=1.0),)},
            "outside the SAE's 100 latents",
        ),
        ({"edits": (RecommendedEdit(latent=1, operation="ablate"),)}, "names latent 1, which the bundle does not hold"),
        ({"edits": ()}, "edits"),
        ({"name": "two words"}, "name"),
        ({"resid_norm": float("nan")}, "resid_norm"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(change: dict[str, Any], says: str) -> None:
    header = dict(random_bundle().header)
    with pytest.raises(ValueError, match=says):
        Header(**{**header, **change})


@pytest.mark.parametrize(
    "edit",
    [
        {"latent": 7, "vector": "mean", "operation": "add", "amount": 1.0},
        {"operation": "add", "amount": 1.0},
        {"vector": "mean", "operation": "ablate"},
        {"latent": 7, "operation": "add"},
        {"latent": 7, "operation": "ablate", "amount": 1.0},
        {"latent": 7, "operation": "add", "amount": float("inf")},
        {"latent": 7, "operation": "ablate", "strength": 2.0},
    ],
)
def test_an_edit_that_says_too_much_or_too_little_is_refused(edit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        RecommendedEdit(**edit)


def test_a_folder_that_cannot_be_written_to_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot write bundle"):
        random_bundle().save(tmp_path / "file" / "b.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
