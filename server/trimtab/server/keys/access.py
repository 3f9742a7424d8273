"""The route × scope table: which scopes open which route. What is not written down here opens for nobody. Pure."""

import re
from collections.abc import Mapping

from trimtab.server.keys.key import Scope

__all__ = ["OPEN", "ROUTES", "is_generation", "methods_of", "route_of", "scopes_for"]

OPEN: tuple[Scope, ...] = ()
"""No key is asked for."""

_INFER: tuple[Scope, ...] = ("infer",)
_READ: tuple[Scope, ...] = ("infer", "steer", "author", "admin")
_AUTHOR: tuple[Scope, ...] = ("author",)
_REGISTRY: tuple[Scope, ...] = ("author", "admin")
_ADMIN: tuple[Scope, ...] = ("admin",)
_WATCH: tuple[Scope, ...] = ("observe", "admin")
_TELL: tuple[Scope, ...] = ("infer", "admin")

ROUTES: Mapping[tuple[str, str], tuple[Scope, ...]] = {
    ("GET", "/livez"): OPEN,
    ("GET", "/readyz"): OPEN,
    ("GET", "/startupz"): OPEN,
    ("GET", "/metrics"): ("observe", "admin"),
    ("GET", "/openapi.json"): _READ,
    ("POST", "/v1/chat/completions"): _INFER,
    ("POST", "/v1/completions"): _INFER,
    ("POST", "/v1/responses"): _INFER,
    ("POST", "/v1/tokenize"): _READ,
    ("POST", "/v1/detokenize"): _READ,
    ("POST", "/v1/steering/compare"): _INFER,
    ("POST", "/v1/steering/inspect"): _INFER,
    ("GET", "/v1/models"): _READ,
    ("GET", "/v1/steering/schema"): _READ,
    ("GET", "/v1/steering/workers"): ("observe", "admin"),
    ("POST", "/v1/steering/validate"): _READ,
    ("GET", "/v1/steering/bundles"): _READ,
    ("GET", "/v1/steering/bundles/{name}"): _READ,
    ("POST", "/v1/steering/bundles"): _AUTHOR,
    ("DELETE", "/v1/steering/bundles/{name}"): _AUTHOR,
    ("PUT", "/v1/steering/bundles/{name}/pin"): _AUTHOR,
    ("DELETE", "/v1/steering/bundles/{name}/pin"): _AUTHOR,
    ("GET", "/admin/v1/bundles"): _REGISTRY,
    ("POST", "/admin/v1/bundles"): _REGISTRY,
    ("GET", "/admin/v1/bundles/{reference}"): _REGISTRY,
    ("GET", "/admin/v1/bundles/{reference}/file"): _REGISTRY,
    ("POST", "/admin/v1/bundles/{reference}/promote"): _ADMIN,
    ("POST", "/admin/v1/bundles/{reference}/default"): _ADMIN,
    ("POST", "/admin/v1/bundles/{reference}/revoke"): _ADMIN,
    ("GET", "/admin/v1/keys"): _ADMIN,
    ("POST", "/admin/v1/keys"): _ADMIN,
    ("POST", "/admin/v1/keys/{id}/rotate"): _ADMIN,
    ("POST", "/admin/v1/keys/{id}/revoke"): _ADMIN,
    ("GET", "/admin/v1/defaults"): _ADMIN,
    ("PUT", "/admin/v1/defaults/{kind}"): _ADMIN,
    ("PUT", "/admin/v1/defaults/{kind}/{subject}"): _ADMIN,
    ("DELETE", "/admin/v1/defaults/{kind}"): _ADMIN,
    ("DELETE", "/admin/v1/defaults/{kind}/{subject}"): _ADMIN,
    ("GET", "/admin/v1/kill"): ("observe", "admin"),
    ("POST", "/admin/v1/kill"): _ADMIN,
    ("DELETE", "/admin/v1/kill"): _ADMIN,
    ("GET", "/admin/v1/audit"): ("observe", "admin"),
    ("GET", "/admin/v1/experiments"): _WATCH,
    ("POST", "/admin/v1/experiments"): _ADMIN,
    ("GET", "/admin/v1/experiments/{key}"): _WATCH,
    ("PUT", "/admin/v1/experiments/{key}"): _ADMIN,
    ("POST", "/admin/v1/experiments/{key}/start"): _ADMIN,
    ("POST", "/admin/v1/experiments/{key}/ramp"): _ADMIN,
    ("POST", "/admin/v1/experiments/{key}/approve"): _ADMIN,
    ("POST", "/admin/v1/experiments/{key}/pause"): _ADMIN,
    ("POST", "/admin/v1/experiments/{key}/resume"): _ADMIN,
    ("POST", "/admin/v1/experiments/{key}/stop"): _ADMIN,
    ("POST", "/admin/v1/experiments/{key}/kill"): _ADMIN,
    ("POST", "/admin/v1/experiments/{key}/archive"): _ADMIN,
    ("POST", "/admin/v1/experiments/{key}/purge"): _ADMIN,
    ("GET", "/admin/v1/experiments/{key}/health"): _WATCH,
    ("GET", "/admin/v1/experiments/{key}/results"): _WATCH,
    ("GET", "/admin/v1/experiments/{key}/looks"): _WATCH,
    ("GET", "/admin/v1/experiments/{key}/exposures"): _WATCH,
    ("GET", "/admin/v1/experiments/{key}/outcomes"): _WATCH,
    ("GET", "/admin/v1/experiments/{key}/texts"): _ADMIN,
    ("GET", "/admin/v1/holdout"): _WATCH,
    ("PUT", "/admin/v1/holdout"): _ADMIN,
    ("POST", "/v1/outcomes"): _TELL,
    ("GRPC", "/trimtab.v1.InferenceService/Generate"): _INFER,
    ("GRPC", "/trimtab.v1.InferenceService/StreamGenerate"): _INFER,
    ("GRPC", "/trimtab.v1.InferenceService/ChatComplete"): _INFER,
    ("GRPC", "/trimtab.v1.InferenceService/StreamChatComplete"): _INFER,
    ("GRPC", "/trimtab.v1.InferenceService/Compare"): _INFER,
    ("GRPC", "/trimtab.v1.SteeringService/Inspect"): _INFER,
    ("GRPC", "/trimtab.v1.SteeringService/Validate"): _READ,
    ("GRPC", "/trimtab.v1.SteeringService/ListBundles"): _READ,
    ("GRPC", "/trimtab.v1.SteeringService/GetBundle"): _READ,
    ("GRPC", "/trimtab.v1.ExperimentService/CreateExperiment"): _ADMIN,
    ("GRPC", "/trimtab.v1.ExperimentService/EditExperiment"): _ADMIN,
    ("GRPC", "/trimtab.v1.ExperimentService/StartExperiment"): _ADMIN,
    ("GRPC", "/trimtab.v1.ExperimentService/RampExperiment"): _ADMIN,
    ("GRPC", "/trimtab.v1.ExperimentService/ApproveExperiment"): _ADMIN,
    ("GRPC", "/trimtab.v1.ExperimentService/PauseExperiment"): _ADMIN,
    ("GRPC", "/trimtab.v1.ExperimentService/ResumeExperiment"): _ADMIN,
    ("GRPC", "/trimtab.v1.ExperimentService/StopExperiment"): _ADMIN,
    ("GRPC", "/trimtab.v1.ExperimentService/KillExperiment"): _ADMIN,
    ("GRPC", "/trimtab.v1.ExperimentService/ArchiveExperiment"): _ADMIN,
    ("GRPC", "/trimtab.v1.ExperimentService/PurgeExperiment"): _ADMIN,
    ("GRPC", "/trimtab.v1.ExperimentService/GetExperiment"): _WATCH,
    ("GRPC", "/trimtab.v1.ExperimentService/ListExperiments"): _WATCH,
    ("GRPC", "/trimtab.v1.ExperimentService/GetExperimentHealth"): _WATCH,
    ("GRPC", "/trimtab.v1.ExperimentService/GetExperimentResults"): _WATCH,
    ("GRPC", "/trimtab.v1.ExperimentService/WatchExperiment"): _WATCH,
    ("GRPC", "/trimtab.v1.ExperimentService/RecordOutcomes"): _TELL,
    ("GRPC", "/trimtab.v1.RegistryService/UploadBundle"): _REGISTRY,
    ("GRPC", "/trimtab.v1.RegistryService/ListVersions"): _REGISTRY,
    ("GRPC", "/trimtab.v1.RegistryService/Promote"): _ADMIN,
    ("GRPC", "/trimtab.v1.RegistryService/SetDefault"): _ADMIN,
    ("GRPC", "/trimtab.v1.RegistryService/Revoke"): _ADMIN,
    ("GRPC", "/grpc.health.v1.Health/Check"): OPEN,
    ("GRPC", "/grpc.health.v1.Health/Watch"): OPEN,
    ("GRPC", "/grpc.health.v1.Health/List"): OPEN,
    ("GRPC", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"): _READ,
}
"""By HTTP's method, or GRPC, and the path."""

_GENERATION = frozenset(
    {path for (method, path), scopes in ROUTES.items() if scopes == _INFER and method in ("POST", "GRPC")}
)

_PATTERNS = tuple(
    (method, re.compile("[^/]+".join(map(re.escape, re.split(r"\{\w+\}", route)))), route) for method, route in ROUTES
)


def is_generation(method: str, path: str) -> bool:
    """Whether a route runs the model: such requests are limited in number."""
    return method in ("POST", "GRPC") and path in _GENERATION


def route_of(method: str, path: str) -> str | None:
    """The route as the table spells it, `/admin/v1/keys/{id}/rotate`; None where there is none."""
    if (method, path) in ROUTES:
        return path
    return next((route for m, pattern, route in _PATTERNS if m == method and pattern.fullmatch(path)), None)


def methods_of(path: str) -> tuple[str, ...]:
    """The methods that a path takes."""
    return tuple(dict.fromkeys(method for method, pattern, _ in _PATTERNS if pattern.fullmatch(path)))


def scopes_for(method: str, path: str) -> tuple[Scope, ...] | None:
    """The scopes of which a caller needs one; `OPEN`, or None where there is no such route for anybody."""
    route = route_of(method, path)
    return None if route is None else ROUTES[method, route]
