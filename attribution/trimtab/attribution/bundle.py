"""A bundle: the chosen latents of one SAE at one hook point, with their rows, evidence and provenance, in one safetensors file.

No pickle is ever read. The header is one JSON document under the safetensors metadata key `trimtab`; the tensors are

    decoder   [n_latents, d_model] f32   decoder directions d, as trained
    encoder   [n_latents, d_model] f32   encoder rows e, input normalisation folded in
    bias      [n_latents] f32            encoder biases b, likewise folded
    threshold [n_latents] f32            θ of φ(x) = x if x > θ else 0 (0: ReLU; > 0: JumpReLU)
    baseline  [n_latents] f32            ā·u, the mean activation's projection on the unit direction u = d / ‖d‖
    vectors   [n_vectors, d_model] f32   dense directions that are no SAE latent (difference in means, …)

and row i of the first five belongs to `header.latents[i]`, row j of `vectors` to `header.vectors[j]`.
"""

import hashlib
import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors import numpy as st

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "BundleError",
    "Header",
    "LatentRecord",
    "ModelIdentity",
    "Name",
    "RecommendedEdit",
    "SAEIdentity",
    "VectorRecord",
    "now",
]

FORMAT_VERSION = 1
MAX_BYTES = 1 << 30
Array = NDArray[np.float32]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class BundleError(ValueError):
    """A bundle cannot be read or written; the message is one sentence with the fix."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelIdentity(_Record):
    """The one model that a bundle's rows were made for."""

    id: str
    architecture: str
    d_model: int = Field(gt=0)
    n_layers: int = Field(gt=0)
    fingerprint: str
    """`fingerprint.model_fingerprint` of its weights."""
    tokenizer: str
    """`fingerprint.tokenizer_digest`."""


class SAEIdentity(_Record):
    """The SAE that the latents come from."""

    id: str
    digest: str
    d_sae: int = Field(gt=0)


class LatentRecord(_Record):
    """The evidence on one latent."""

    latent: int = Field(ge=0)
    attribution: Finite | None
    """Predicted rise of the loss gap, positive minus negative completions, under the recommended edit; nats per completion
    token. Above 0 the edit works against the behaviour: it removes a latent that causes it, or turns up one that opposes it.
    None: a person named the latent."""
    attribution_se: Finite | None = None
    """Standard error over prompts."""
    attribution_interval: tuple[Finite, Finite] | None = None
    """95 % bootstrap interval over prompts."""
    attribution_p: Finite | None = Field(default=None, ge=0, le=1)
    """Sign-flip p-value over prompts, for all leading latents at once (max-T)."""
    attribution_project: Finite | None = None
    """The same for projecting out to the mean activation, whatever is recommended: above 0 the latent causes the behaviour,
    below 0 it opposes it."""
    projection: Finite | None = None
    """Mean of the positives minus ā along the unit direction. Below 0 where `attribution_project` is above: the *absence* of the
    direction supports the behaviour."""
    delta_activation: Finite | None = None
    """Mean activation on positive minus on negative completions, SAE units."""
    effect: Finite | None = None
    """Measured change of the log-probability margin on held-out pairs under the recommended edit, nats per token."""
    effect_se: Finite | None = None
    max_activation: Finite = Field(ge=0)
    """Largest activation seen on the SAE's own data, SAE units; the unit `max_act`."""
    density: Finite | None = Field(default=None, ge=0, le=1)
    """Fraction of tokens on which the latent fires."""
    strength_range: tuple[Finite, Finite] | None = None
    """Strengths of the recommended edit that were measured and kept the text coherent."""
    label: str | None = None
    top_tokens: tuple[str, ...] = ()


class VectorRecord(_Record):
    """One dense direction."""

    name: Name
    source: str
    """How it was made, for people."""
    norm: Finite = Field(gt=0)


class RecommendedEdit(_Record):
    """One edit that the bundle applies when a request names the bundle alone."""

    latent: int | None = Field(default=None, ge=0)
    vector: Name | None = None
    operation: Literal["add", "ablate", "clamp", "scale", "project"]
    amount: Finite | None = None
    """`add`: amount; `clamp`: target; `scale`: factor; `ablate` and `project` have none."""
    unit: Literal["raw", "max_act", "resid_norm"] = "raw"
    scope: Literal["prompt", "completion", "all"] = "all"
    exclude_special: bool = False
    """Leave alone the positions whose token is one of the tokenizer's special ones."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.latent is None) == (self.vector is None):
            raise ValueError("name exactly one of `latent` and `vector`")
        if self.vector is not None and self.operation not in ("add", "project"):
            raise ValueError(f"`{self.operation}` needs a latent; a dense vector can be added or projected out")
        if (self.amount is None) != (self.operation in ("ablate", "project")):
            raise ValueError("`amount` goes with add, clamp and scale, and with no other operation")
        return self


class Header(_Record):
    """Everything in a bundle that is not a tensor."""

    format: Literal["trimtab.bundle"] = "trimtab.bundle"
    version: Literal[1] = 1
    name: Name
    behaviour: str
    """One sentence: what the positive completions do."""
    created: str
    model: ModelIdentity
    sae: SAEIdentity
    layer: int = Field(ge=0)
    """0-based; the hook point is `blocks.{layer}.resid_post`."""
    resid_norm: Finite = Field(gt=0)
    """Median ‖h‖ at the hook point over tokens that are no sinks; the unit `resid_norm`."""
    latents: tuple[LatentRecord, ...]
    vectors: tuple[VectorRecord, ...] = ()
    edits: tuple[RecommendedEdit, ...] = Field(min_length=1)
    provenance: dict[str, Any] = {}
    """Command, data digests, scope and loss normalisation of the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        latents, vectors = [r.latent for r in self.latents], [r.name for r in self.vectors]
        if len(set(latents)) != len(latents) or len(set(vectors)) != len(vectors):
            raise ValueError("a latent or vector is listed twice")
        if self.layer >= self.model.n_layers:
            raise ValueError(f"layer {self.layer} is outside the model's {self.model.n_layers} layers")
        for record in self.latents:
            if record.latent >= self.sae.d_sae:
                raise ValueError(f"latent {record.latent} is outside the SAE's {self.sae.d_sae} latents")
        for edit in self.edits:
            if edit.latent is not None and edit.latent not in latents:
                raise ValueError(f"a recommended edit names latent {edit.latent}, which the bundle does not hold")
            if edit.vector is not None and edit.vector not in vectors:
                raise ValueError(f"a recommended edit names vector {edit.vector!r}, which the bundle does not hold")
        return self

    @property
    def hook_point(self) -> str:
        """`blocks.{layer}.resid_post`."""
        return f"blocks.{self.layer}.resid_post"


_PER_LATENT = ("encoder", "decoder", "bias", "threshold", "baseline")


class Bundle:
    """A validated bundle in memory: `header`, and the arrays of the module's docstring as attributes."""

    def __init__(
        self,
        header: Header,
        *,
        decoder: Array,
        encoder: Array,
        bias: Array,
        threshold: Array,
        baseline: Array,
        vectors: Array | None = None,
    ) -> None:
        d = header.model.d_model
        self.header = header
        self.decoder, self.encoder, self.bias = _f32(decoder), _f32(encoder), _f32(bias)
        self.threshold, self.baseline = _f32(threshold), _f32(baseline)
        self.vectors = np.zeros((0, d), np.float32) if vectors is None else _f32(vectors)
        n = len(header.latents)
        shapes = {"decoder": (n, d), "encoder": (n, d), "bias": (n,), "threshold": (n,), "baseline": (n,)}
        for name, shape in {**shapes, "vectors": (len(header.vectors), d)}.items():
            array: Array = getattr(self, name)
            if array.shape != shape:
                raise BundleError(f"tensor {name!r} is {list(array.shape)} but the header asks for {list(shape)}")
            if not np.isfinite(array).all():
                raise BundleError(f"tensor {name!r} holds NaN or infinity; write the bundle again from clean rows")
        if (np.linalg.norm(self.decoder, axis=1) == 0).any() or (np.linalg.norm(self.vectors, axis=1) == 0).any():
            raise BundleError("a direction is all zeros; drop that latent and write the bundle again")
        self.row_of = {record.latent: i for i, record in enumerate(header.latents)}
        self.vector_of = {record.name: i for i, record in enumerate(header.vectors)}

    @cached_property
    def content_hash(self) -> str:
        """`sha256:…` over the header and every tensor; what names this bundle, byte for byte."""
        return _content_hash(self.header.model_dump(mode="json"), self._tensors())

    def _tensors(self) -> dict[str, Array]:
        return {name: getattr(self, name) for name in (*_PER_LATENT, "vectors")}

    def to_bytes(self) -> bytes:
        """The bundle as the bytes of its file."""
        header = self.header.model_dump(mode="json")
        document = {**header, "content_hash": self.content_hash}
        return st.save(self._tensors(), metadata={"trimtab": json.dumps(document, allow_nan=False, sort_keys=True)})

    def save(self, path: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            BundleError: the folder cannot be written to.
        """
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as f:
                f.write(self.to_bytes())
                f.flush()
                os.fsync(f.fileno())
            partial.replace(path)
        except OSError as e:
            raise BundleError(f"cannot write bundle {path}: {e.strerror}; choose a folder you can write to") from e
        finally:
            with suppress(OSError):  # Gone already when it became the bundle.
                partial.unlink()

    @classmethod
    def load(cls, path: Path) -> "Bundle":
        """Read a bundle file.

        Raises:
            BundleError: the file is missing, truncated, no safetensors, no bundle, of another version, or altered.
        """
        try:
            if path.stat().st_size > MAX_BYTES:
                raise BundleError(f"{path} is over {MAX_BYTES >> 30} GiB, which no bundle is; check the path")
            data = path.read_bytes()
        except OSError as e:
            raise BundleError(f"cannot read bundle {path}: {e.strerror}; check the path") from e
        return cls.from_bytes(data, source=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "the upload") -> "Bundle":
        """Read a bundle from the bytes of its file; `source` names it in errors."""
        try:
            document = _document(data)
            tensors = st.load(data)
        except (SafetensorError, ValueError, KeyError) as e:
            raise BundleError(
                f"{source} is not a whole trimtab bundle ({e}); write it again with `trimtab attribute`"
            ) from e
        claimed = document.pop("content_hash", None)
        if document.get("format") != "trimtab.bundle":
            raise BundleError(
                f"{source} is a safetensors file but not a trimtab bundle; `trimtab attribute` writes one"
            )
        if document.get("version") != FORMAT_VERSION:
            raise BundleError(
                f"{source} has format version {document.get('version')!r}; this release reads version {FORMAT_VERSION}, "
                "so write it again with `trimtab attribute`"
            )
        if set(tensors) != {*_PER_LATENT, "vectors"}:
            raise BundleError(
                f"{source} holds tensors {sorted(tensors)}; a bundle holds {sorted((*_PER_LATENT, 'vectors'))}"
            )
        if claimed != _content_hash(document, tensors):
            raise BundleError(f"{source} does not match its content hash: it was altered or damaged; fetch it again")
        try:
            header = Header.model_validate(document)
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "header"
            raise BundleError(f"{source} has a bad header at {where}: {first['msg']}; write the bundle again") from e
        return cls(header, **tensors)

    def check_model(self, model: ModelIdentity) -> None:
        """Refuse a model that the rows were not made for.

        Raises:
            BundleError: another fingerprint, width, depth or tokenizer; the message names the first that differs.
        """
        for field in ("d_model", "n_layers", "architecture", "fingerprint", "tokenizer"):
            mine, theirs = getattr(self.header.model, field), getattr(model, field)
            if mine != theirs:
                raise BundleError(
                    f"bundle {self.header.name!r} was made for {self.header.model.id} ({field} {mine}) but the model is "
                    f"{model.id} ({field} {theirs}); serve the first, or run `trimtab attribute` on the second"
                )


def now() -> str:
    """The time of writing, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _f32(array: Array) -> Array:
    if array.dtype != np.float32:
        raise BundleError(f"bundle tensors are float32, not {array.dtype}")
    return np.ascontiguousarray(array)


def _document(data: bytes) -> dict[str, Any]:
    """The JSON document in the safetensors metadata."""
    if len(data) < 8:
        raise ValueError("the file is empty or cut short")
    n_header = int.from_bytes(data[:8], "little")
    if n_header > len(data) - 8:
        raise ValueError("no safetensors header, or cut short")
    metadata = json.loads(data[8 : 8 + n_header]).get("__metadata__", {})
    document = json.loads(metadata["trimtab"]) if "trimtab" in metadata else {}
    if not isinstance(document, dict):
        raise ValueError("the header is not an object")
    return document


def _content_hash(document: dict[str, Any], tensors: dict[str, Array]) -> str:
    sha = hashlib.sha256(json.dumps(document, allow_nan=False, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f"|{name}|{tensors[name].dtype}|{tensors[name].shape}|".encode())
        sha.update(np.ascontiguousarray(tensors[name]).tobytes())
    return "sha256:" + sha.hexdigest()
