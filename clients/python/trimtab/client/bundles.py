"""What a server says of its bundles, and of edits that it was asked to check."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from trimtab.client.errors import TrimtabError

__all__ = [
    "BundleLatent",
    "BundleSummary",
    "Validation",
    "read",
    "read_bundle",
    "read_bundles",
    "read_latents",
    "read_validation",
]

T = TypeVar("T")


@dataclass(frozen=True)
class BundleSummary:
    """A bundle that is loaded in the server."""

    name: str
    """What requests call it."""
    content_hash: str
    behaviour: str
    """One sentence: what the positive completions do."""
    model: str
    """The one model that its rows were made for."""
    hook_point: str
    n_latents: int
    n_vectors: int
    edits: tuple[Mapping[str, Any], ...]
    """What it applies when a request names it alone."""
    pinned: bool
    """It can be neither replaced nor removed."""


@dataclass(frozen=True)
class BundleLatent:
    """A latent that a bundle holds, with its evidence; what was not measured is None."""

    latent: int
    """Its index in the SAE."""
    label: str | None
    """What it seems to mean, for people."""
    attribution: float | None
    """Predicted share in the behaviour."""
    effect: float | None
    """What intervening did, measured."""
    max_activation: float
    """Largest activation on the SAE's own data, SAE units: the unit `max_act`."""
    strength_range: tuple[float, float] | None
    """Strengths that were measured and kept the text coherent."""
    top_tokens: tuple[str, ...]


@dataclass(frozen=True)
class Validation:
    """What the server would do with some edits."""

    plan: str
    """Canonical hash; the same edits spelt differently have the same."""
    bundles: tuple[str, ...]
    hook_points: tuple[str, ...]
    """Where they act."""
    n_rows: int
    """Rows of the formula that they compile to; 0 does nothing."""


def read_bundles(document: Any) -> tuple[BundleSummary, ...]:
    """The bundles of a listing."""
    return read(lambda listing: tuple(_summary(item) for item in listing["data"]), document)


def read_bundle(document: Any) -> BundleSummary:
    """The bundle of an answer about one."""
    return read(_summary, document)


def read_latents(document: Any) -> tuple[BundleLatent, ...]:
    """The latents of one bundle's description."""
    return read(lambda header: tuple(_latent(item) for item in header["latents"]), document)


def read_validation(document: Any) -> Validation:
    """The answer to a validation."""

    def parse(answer: Any) -> Validation:
        names = tuple(map(str, answer["bundles"])), tuple(map(str, answer["hook_points"]))
        return Validation(str(answer["plan"]), *names, int(answer["n_rows"]))

    return read(parse, document)


def _summary(item: Any) -> BundleSummary:
    return BundleSummary(
        name=str(item["name"]),
        content_hash=str(item["content_hash"]),
        behaviour=str(item["behaviour"]),
        model=str(item["model"]),
        hook_point=str(item["hook_point"]),
        n_latents=int(item["n_latents"]),
        n_vectors=int(item["n_vectors"]),
        edits=tuple(MappingProxyType(dict(edit)) for edit in item["edits"]),
        pinned=bool(item["pinned"]),
    )


def _latent(item: Any) -> BundleLatent:
    low_high = item.get("strength_range")
    return BundleLatent(
        latent=int(item["latent"]),
        label=item.get("label"),
        attribution=item.get("attribution"),
        effect=item.get("effect"),
        max_activation=float(item["max_activation"]),
        strength_range=None if low_high is None else (float(low_high[0]), float(low_high[1])),
        top_tokens=tuple(map(str, item.get("top_tokens", ()))),
    )


def read(parse: Callable[[Any], T], value: Any) -> T:
    """What `parse` makes of a server's answer.

    Raises:
        TrimtabError: it cannot be read.
    """
    try:
        return parse(value)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise TrimtabError(
            f"the server's answer cannot be read ({e!r}); use a client of the server's own release, and check that "
            "base_url is a Trimtab server"
        ) from e
