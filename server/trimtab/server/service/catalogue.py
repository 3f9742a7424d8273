"""The catalogue: what bundle names mean in this replica, for whoever asks. Pure but for what it is told.

    calm        a bundle of this server's own, or else the default version of the registry
    calm:v3     that version

A name that means nothing right now says why: revoked, a draft, no default, another model's, not loaded yet. No other version ever
takes its place by itself.
"""

from collections.abc import Iterator, Mapping

from trimtab.attribution.bundle import Bundle
from trimtab.server.errors import Revoked, Unavailable, UnknownBundle
from trimtab.server.fleet.snapshot import EMPTY, Snapshot

__all__ = ["Catalogue"]


class Catalogue(Mapping[str, Bundle]):
    """Names to bundles; `shelf` holds what is loaded, the registry's versions by their references."""

    def __init__(self, shelf: Mapping[str, Bundle], *, fingerprint: str) -> None:
        """`fingerprint` is that of the served model."""
        self._shelf = shelf
        self._fingerprint = fingerprint
        self.snapshot: Snapshot = EMPTY

    def resolve(self, name: str) -> str:
        """What a name means: `calm:v3`, or the name itself for a bundle of this server's own.

        Raises:
            Revoked: the version was revoked.
            Unavailable: it is not loaded yet.
            UnknownBundle: there is none that can be used.
        """
        known = self.snapshot
        own = self._shelf.get(name)
        if own is not None and ":" not in name:
            if (revoked := known.revoked.get(own.content_hash)) is not None:
                raise Revoked(f"bundle {name!r} is {revoked.reference}, which was revoked: {revoked.reason}")
            return name
        reference = name if ":" in name else known.default_of.get(name)
        usable = [v.reference for v in known.versions if v.name == name and v.state == "active"]
        if reference is None and usable:
            raise UnknownBundle(f"bundle {name!r} has no default version; name one: {', '.join(usable)}")
        version = None if reference is None else known.by_reference.get(reference)
        if version is None:
            listed = ", ".join(sorted(self)) or "none"
            raise UnknownBundle(
                f"bundle {name!r} is not loaded (loaded: {listed}); GET /v1/steering/bundles lists them"
            )
        reference = version.reference
        if version.state == "revoked":
            raise Revoked(f"{reference} was revoked: {version.reason}")
        if version.state == "draft":
            raise UnknownBundle(f"{reference} is a draft; it can be named once it is promoted")
        if version.fingerprint != self._fingerprint:
            raise UnknownBundle(f"{reference} was made for {version.model}, and this server serves another model")
        if reference not in self._shelf:
            raise Unavailable(f"{reference} is not loaded here yet; ask again in a moment, or another replica")
        return reference

    def wanted(self) -> list[str]:
        """References of the versions that this replica has to hold."""
        return [
            version.reference
            for version in self.snapshot.versions
            if version.state == "active" and version.fingerprint == self._fingerprint
        ]

    def __getitem__(self, name: str) -> Bundle:
        try:
            return self._shelf[self.resolve(name)]
        except (Revoked, Unavailable, UnknownBundle) as e:
            raise KeyError(name) from e

    def __iter__(self) -> Iterator[str]:
        own = {
            n for n, bundle in self._shelf.items() if ":" not in n and bundle.content_hash not in self.snapshot.revoked
        }
        held = {reference for reference in self.wanted() if reference in self._shelf}
        names = {name for name, reference in self.snapshot.default_of.items() if reference in held}
        return iter(own | held | names)

    def __len__(self) -> int:
        return sum(1 for _ in self)
