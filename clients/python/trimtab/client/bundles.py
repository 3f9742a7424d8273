"""What a server says of its bundles, and of edits that it was asked to check."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from trimtab.client.errors import TrimtabError

__all__ = ["BundleLatent", "BundleSummary", "Validation", "read_bundles", "read_validation"]

T = TypeVar("T")


@dataclass(frozen=True)
class BundleLatent:
    """A latent that a bundle holds."""

    latent: int
    """Its index in the SAE."""
    label: str | None
    """What it seems to mean, for people."""
    max_activation: float
    """Largest activation on the SAE's own data, SAE units: the unit `max_act`."""


@dataclass(frozen=True)
class BundleSummary:
    """A bundle that is loaded in the server."""

    name: str
    """What requests call it."""
    content_hash: str
    behaviour: str
    """One sentence: what the positive completions do."""
    hook_point: str
    latents: tuple[BundleLatent, ...]
    vectors: tuple[str, ...]
    """Names of its dense vectors."""
    raw: Mapping[str, Any]
    """All that the server said of it."""


@dataclass(frozen=True)
class Validation:
    """What the server would do with some edits."""

    plan: str
    """Canonical hash; the same edits spelt differently have the same."""
    raw: Mapping[str, Any]
    """All that the server said of it."""


def read_bundles(document: Any) -> tuple[BundleSummary, ...]:
    """The bundles of a listing."""
    return tuple(_read(_bundle, item) for item in _read(lambda listing: list(listing["data"]), document))


def read_validation(document: Any) -> Validation:
    """The answer to a validation."""
    return _read(lambda answer: Validation(str(answer["plan"]), MappingProxyType(answer)), document)


def _bundle(item: Any) -> BundleSummary:
    vectors = tuple(
        str(vector["name"] if isinstance(vector, Mapping) else vector) for vector in item.get("vectors", ())
    )
    return BundleSummary(
        name=str(item["name"]),
        content_hash=str(item["content_hash"]),
        behaviour=str(item["behaviour"]),
        hook_point=str(item["hook_point"]),
        latents=tuple(
            BundleLatent(int(record["latent"]), record.get("label"), float(record["max_activation"]))
            for record in item["latents"]
        ),
        vectors=vectors,
        raw=MappingProxyType(item),
    )


def _read(parse: Callable[[Any], T], value: Any) -> T:
    try:
        return parse(value)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise TrimtabError(
            f"the server's answer cannot be read ({e!r}); use a client of the server's own release, and check that "
            "base_url is a Trimtab server"
        ) from e
