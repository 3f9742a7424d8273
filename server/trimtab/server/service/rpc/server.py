"""The gRPC server: our services, health and reflection, on one port, with TLS when the server has a certificate."""

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trimtab.server.errors import Unsupported
from trimtab.server.service.body import MAX_BODY_BYTES
from trimtab.server.service.gate import Gate
from trimtab.server.service.generation import Generation
from trimtab.server.service.inspect import Inspector
from trimtab.server.service.preflight import TLS
from trimtab.server.service.replica import Replica
from trimtab.server.service.rpc.calls import Calls, Keys
from trimtab.server.service.rpc.experiments import ExperimentCalls
from trimtab.server.service.rpc.inference import Inference
from trimtab.server.service.rpc.registry import RegistryCalls
from trimtab.server.service.rpc.steering import SteeringCalls
from trimtab.server.service.shelf import Shelf
from trimtab.server.service.versions import Versions
from trimtab.v1 import (
    experiment_service_pb2,
    experiment_service_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    registry_service_pb2,
    registry_service_pb2_grpc,
    steering_service_pb2,
    steering_service_pb2_grpc,
)

__all__ = ["RPC"]

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BODY_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.so_reuseport", 0),  # Else two servers share a port, and each gets some of the calls.
)
_SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    steering_service_pb2.DESCRIPTOR.services_by_name["SteeringService"].full_name,
    registry_service_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name,
    experiment_service_pb2.DESCRIPTOR.services_by_name["ExperimentService"].full_name,
)


class RPC:
    """A gRPC server over a running engine."""

    def __init__(
        self,
        generation: Generation,
        shelf: Shelf,
        inspector: Inspector,
        gate: Gate,
        replica: Replica,
        spans: Any = None,
    ) -> None:
        """`spans` is OpenTelemetry's tracer provider, or None."""
        self._server = grpc.aio.server(interceptors=(Keys(gate, generation.metrics),), options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        calls = Calls(gate, generation.metrics, spans)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(generation, calls), self._server)
        steering_service_pb2_grpc.add_SteeringServiceServicer_to_server(
            SteeringCalls(generation, shelf, inspector, calls), self._server
        )
        registry = RegistryCalls(Versions(replica), calls)
        registry_service_pb2_grpc.add_RegistryServiceServicer_to_server(registry, self._server)
        experiment_service_pb2_grpc.add_ExperimentServiceServicer_to_server(
            ExperimentCalls(replica, calls), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int, tls: TLS | None) -> int:
        """The port that it listens on; 0 asks for any free one.

        Raises:
            Unsupported: the port is taken, or a file of `tls` cannot be read.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, _credentials(tls))
        except RuntimeError as e:
            raise Unsupported(f"cannot listen on {address} for gRPC; --grpc-port 0 takes a free port") from e
        await self._server.start()
        for service in _SERVICES:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return int(bound)

    async def not_serving(self) -> None:
        """Health says from now on that new calls should go elsewhere."""
        await self._health.enter_graceful_shutdown()

    async def stop(self) -> None:
        """Stop at once."""
        await self._server.stop(None)


def _credentials(tls: TLS) -> Any:
    pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
    authority = None if tls.client_ca is None else tls.client_ca.read_bytes()
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)
