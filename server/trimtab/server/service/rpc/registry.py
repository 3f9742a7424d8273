"""`RegistryService`: the verbs of `/admin/v1/bundles`, in messages."""

from collections.abc import AsyncIterator
from typing import Any

from trimtab.server.errors import InvalidRequest, Violation
from trimtab.server.registry.store import MAX_BUNDLE_BYTES, digest_of
from trimtab.server.service.body import BodyTooLarge
from trimtab.server.service.document import body_of
from trimtab.server.service.rpc import replies, requests
from trimtab.server.service.rpc.calls import Calls
from trimtab.server.service.versions import Choice, Promotion, Revocation, Versions
from trimtab.v1 import registry_service_pb2 as v1
from trimtab.v1.registry_service_pb2_grpc import RegistryServiceServicer

__all__ = ["RegistryCalls"]


class RegistryCalls(RegistryServiceServicer):  # type: ignore[misc] # generated without types
    """The versions of bundles."""

    def __init__(self, versions: Versions, calls: Calls) -> None:
        self._versions = versions
        self._calls = calls

    async def UploadBundle(self, parts: AsyncIterator[v1.UploadBundleRequest], context: Any) -> v1.UploadBundleResponse:
        """A draft, once all of its bytes are there."""
        async with self._calls.begun(context, lambda field: "chunk" if field == "body" else field):
            data, end = await _whole(parts)
            shown, is_new = await self._versions.upload(data, end.signature if end.HasField("signature") else None)
            return v1.UploadBundleResponse(version=replies.version(shown), is_new=is_new)

    async def Promote(self, request: v1.PromoteRequest, context: Any) -> v1.BundleVersion:
        """An active version."""
        async with self._calls.begun(context, requests.change_path):
            asked = body_of(Promotion, requests.change(request))
            return replies.version(await self._versions.promote(request.reference, asked))

    async def SetDefault(self, request: v1.SetDefaultRequest, context: Any) -> v1.BundleVersion:
        """The default version of a name."""
        async with self._calls.begun(context, requests.change_path):
            asked = body_of(Choice, requests.change(request))
            return replies.version(await self._versions.set_default(request.reference, asked))

    async def Revoke(self, request: v1.RevokeRequest, context: Any) -> v1.BundleVersion:
        """A revoked version."""
        async with self._calls.begun(context, requests.change_path):
            asked = body_of(Revocation, requests.change(request))
            return replies.version(await self._versions.revoke(request.reference, asked))

    async def ListVersions(self, _: v1.ListVersionsRequest, context: Any) -> v1.ListVersionsResponse:
        """All versions."""
        async with self._calls.begun(context):
            return v1.ListVersionsResponse(versions=map(replies.version, await self._versions.listed()))


async def _whole(parts: AsyncIterator[v1.UploadBundleRequest]) -> tuple[bytes, v1.UploadEnd]:
    """The bytes of a file that was sent to its end.

    Raises:
        BodyTooLarge: they are too many.
        InvalidRequest: the stream breaks off, goes on after its end, or its digest is of other bytes.
    """
    data = bytearray()
    end: v1.UploadEnd | None = None
    async for part in parts:
        if end is not None:
            raise _wrong("end", "is not the last message of the stream")
        match part.WhichOneof("part"):
            case "chunk":
                data += part.chunk
                if len(data) > MAX_BUNDLE_BYTES:
                    raise BodyTooLarge(f"the file is over {MAX_BUNDLE_BYTES} bytes, which is what a registry takes")
            case "end":
                end = part.end
            case _:
                raise _wrong("part", "is missing; give `chunk` or `end`")
    if end is None:
        raise _wrong("end", "is missing: the stream broke off, and nothing was stored; send the file anew")
    found = digest_of(bytes(data))
    if end.digest != found:
        raise _wrong("end.digest", f"is {end.digest[:80]!r}, but the bytes that came are {found}; nothing was stored")
    return bytes(data), end


def _wrong(field: str, message: str) -> InvalidRequest:
    return InvalidRequest([Violation(field, message)])
