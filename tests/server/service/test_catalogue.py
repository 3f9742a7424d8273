from dataclasses import replace
from typing import Any

import pytest

from tests.bundles import random_bundle
from trimtab.attribution.bundle import Bundle
from trimtab.server.errors import Revoked, Unavailable, UnknownBundle
from trimtab.server.fleet.snapshot import EMPTY
from trimtab.server.registry.version import Version
from trimtab.server.service.catalogue import Catalogue

OWN = random_bundle(name="own", seed=5)


def bundle(number: int) -> Bundle:
    return random_bundle(seed=number)


def version(number: int, state: Any = "active", **changes: Any) -> Version:
    return replace(
        Version(
            "calm", number, state, False, bundle(number).content_hash, "sha256:f", 1, "tiny", "sha256:tiny",
            "blocks.1.resid_post", "", None, "", "", "", "rude", None,
        ),
        **changes,
    )  # fmt: skip


def catalogue(*versions: Version, loaded: tuple[int, ...] = (1, 2, 3)) -> Catalogue:
    shelf = {"own": OWN} | {f"calm:v{number}": bundle(number) for number in loaded}
    made = Catalogue(shelf, fingerprint="sha256:tiny")
    made.snapshot = replace(EMPTY, versions=versions)
    return made


def test_a_name_means_its_default_version() -> None:
    known = catalogue(version(1), version(2, is_default=True))
    assert (known.resolve("calm"), known.resolve("calm:v1"), known.resolve("own")) == ("calm:v2", "calm:v1", "own")
    assert known["calm"].content_hash == bundle(2).content_hash
    assert set(known) == {"own", "calm", "calm:v1", "calm:v2"}


@pytest.mark.parametrize(
    ("versions", "name", "error", "message"),
    [
        ((version(1),), "calm", UnknownBundle, "no default version; name one: calm:v1"),
        ((version(1),), "wild", UnknownBundle, "loaded: calm:v1, own"),
        ((version(1),), "calm:v7", UnknownBundle, "not loaded"),
        ((version(1, "draft"),), "calm:v1", UnknownBundle, "a draft"),
        ((version(1, "revoked"),), "calm:v1", Revoked, "calm:v1 was revoked: rude"),
        ((version(9),), "calm:v9", Unavailable, "not loaded here yet"),
        ((version(1, fingerprint="sha256:other"),), "calm:v1", UnknownBundle, "another model"),
        ((version(1, "revoked"),), "calm", UnknownBundle, "not loaded"),
    ],
)
def test_a_name_that_means_nothing_says_why(
    versions: tuple[Version, ...], name: str, error: type[Exception], message: str
) -> None:
    known = catalogue(*versions)
    with pytest.raises(error, match=message):
        known.resolve(name)
    assert name not in known


def test_no_other_version_takes_the_place_of_a_revoked_default() -> None:
    known = catalogue(version(1), version(2, "revoked"))
    with pytest.raises(UnknownBundle, match="name one: calm:v1"):
        known.resolve("calm")


def test_what_was_revoked_is_revoked_under_every_name() -> None:
    """A server that was started with the same bytes as a file of its own does not use them either."""
    known = catalogue(version(1, "revoked", content_hash=OWN.content_hash))
    with pytest.raises(Revoked, match="'own' is calm:v1, which was revoked"):
        known.resolve("own")
    assert set(known) == set()
