"""What can be done with the versions of bundles, for every transport: the same bodies, the same answers, as JSON."""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import Field

from trimtab.server.registry.version import Running, Version, split
from trimtab.server.service import current
from trimtab.server.service.document import Body, Reason
from trimtab.server.service.replica import Replica

__all__ = ["Choice", "Promotion", "Revocation", "Versions"]


class Promotion(Body):
    """What goes with a promotion."""

    reason: Reason = ""
    default: bool = False
    """Make it what the name alone means, too."""


class Choice(Body):
    """What goes with a new default, and with a revocation of a key."""

    reason: Reason = ""


class Revocation(Body):
    """What goes with the revocation of a version."""

    reason: Annotated[Reason, Field(min_length=1)]
    running: Running = "end"


class Versions:
    """The registry as a replica serves it; the actor of every change is the caller of the request."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def upload(self, data: bytes, signature: str | None) -> tuple[dict[str, Any], bool]:
        """The version of these bytes, and whether it is new."""
        options = {"actor": _actor(), "signature": signature}
        version, is_new = await self._replica.change(self._replica.registry.upload, data, **options)
        return self._shown(version), is_new

    async def listed(self) -> list[dict[str, Any]]:
        """All versions, by name and number."""
        return [self._shown(version) for version in await asyncio.to_thread(self._replica.registry.list)]

    async def show(self, reference: str) -> dict[str, Any]:
        """One version."""
        return self._shown(await self._find(reference))

    async def file(self, reference: str) -> tuple[bytes, str]:
        """The bytes of a version's file, and their digest."""
        version = await self._find(reference)
        return await asyncio.to_thread(self._replica.registry.data, version), version.file_digest

    async def promote(self, reference: str, asked: Promotion) -> dict[str, Any]:
        """The version, active from now on."""
        options = {"actor": _actor(), "reason": asked.reason, "default": asked.default}
        return self._shown(await self._replica.change(self._replica.registry.promote, *split(reference), **options))

    async def set_default(self, reference: str, asked: Choice) -> dict[str, Any]:
        """The version, which its name alone means from now on."""
        options = {"actor": _actor(), "reason": asked.reason}
        return self._shown(await self._replica.change(self._replica.registry.set_default, *split(reference), **options))

    async def revoke(self, reference: str, asked: Revocation) -> dict[str, Any]:
        """The version, revoked for good."""
        options = {"actor": _actor(), "reason": asked.reason, "running": asked.running}
        return self._shown(await self._replica.change(self._replica.registry.revoke, *split(reference), **options))

    async def _find(self, reference: str) -> Version:
        return await asyncio.to_thread(self._replica.registry.find, *split(reference))

    def _shown(self, version: Version) -> dict[str, Any]:
        fields = asdict(version) | {"reference": version.reference, "signed": version.signature is not None}
        del fields["signature"]
        return fields | {"not_loaded": self._replica.not_loaded.get(version.reference)}


def _actor() -> str:
    return current.caller.get().name
