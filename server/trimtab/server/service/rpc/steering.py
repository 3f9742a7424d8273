"""`SteeringService`: what can be steered, and what a server would make of some edits, what latents read in a text."""

from typing import Any

from trimtab.server.service.bundle_routes import summary_of
from trimtab.server.service.generation import Generation
from trimtab.server.service.inspect import Inspector
from trimtab.server.service.rpc import replies, requests
from trimtab.server.service.rpc.calls import Calls
from trimtab.server.service.shelf import Shelf
from trimtab.server.service.steering_routes import validation
from trimtab.v1 import steering_pb2, steering_service_pb2
from trimtab.v1.steering_service_pb2_grpc import SteeringServiceServicer

__all__ = ["SteeringCalls"]


class SteeringCalls(SteeringServiceServicer):  # type: ignore[misc] # generated without types
    """What can be steered."""

    def __init__(self, generation: Generation, shelf: Shelf, inspector: Inspector, calls: Calls) -> None:
        self._generation = generation
        self._shelf = shelf
        self._inspector = inspector
        self._calls = calls

    async def Validate(self, request: steering_service_pb2.ValidateRequest, context: Any) -> steering_pb2.Validation:
        """The plan of some edits."""
        async with self._calls.begun(context, requests.path):
            body = {"steering": requests.steering_field(request.steering)} if request.HasField("steering") else {}
            return replies.validation(validation(self._generation, body))

    async def ListBundles(
        self, _: steering_service_pb2.ListBundlesRequest, context: Any
    ) -> steering_service_pb2.ListBundlesResponse:
        """The bundles by name."""
        async with self._calls.begun(context):
            listed = [replies.summary(summary_of(self._shelf, name)) for name in sorted(self._shelf)]
            return steering_service_pb2.ListBundlesResponse(bundles=listed)

    async def GetBundle(
        self, request: steering_service_pb2.GetBundleRequest, context: Any
    ) -> steering_service_pb2.Bundle:
        """One bundle."""
        async with self._calls.begun(context):
            header = self._shelf.find(request.name).header.model_dump(mode="json")
            return replies.bundle(summary_of(self._shelf, request.name), header)

    async def Inspect(
        self, request: steering_service_pb2.InspectRequest, context: Any
    ) -> steering_service_pb2.InspectResponse:
        """What latents read in a text."""
        prompt = request.WhichOneof("prompt") or "prompt"
        async with self._calls.begun(context, lambda field: requests.inspect_path(field, prompt)) as call:
            return replies.inspection(await self._inspector.inspect(requests.inspect(request), call.id))
