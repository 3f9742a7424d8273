"""The route × scope table: which scopes open which route. What is not written down here opens for nobody. Pure."""

import re
from collections.abc import Mapping

from trimtab.server.keys.key import Scope

__all__ = ["OPEN", "ROUTES", "scopes_for"]

OPEN: tuple[Scope, ...] = ()
"""No key is asked for."""

_INFER: tuple[Scope, ...] = ("infer",)
_READ: tuple[Scope, ...] = ("infer", "steer", "author", "admin")
_AUTHOR: tuple[Scope, ...] = ("author",)
_REGISTRY: tuple[Scope, ...] = ("author", "admin")
_ADMIN: tuple[Scope, ...] = ("admin",)

ROUTES: Mapping[tuple[str, str], tuple[Scope, ...]] = {
    ("GET", "/livez"): OPEN,
    ("GET", "/readyz"): OPEN,
    ("GET", "/startupz"): OPEN,
    ("GET", "/metrics"): ("observe", "admin"),
    ("POST", "/v1/chat/completions"): _INFER,
    ("POST", "/v1/completions"): _INFER,
    ("GET", "/v1/models"): _READ,
    ("GET", "/v1/steering/schema"): _READ,
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
}

_PATTERNS = tuple(
    (method, re.compile(re.sub(r"\{\w+\}", r"[^/]+", re.escape(path).replace(r"\{", "{").replace(r"\}", "}"))), scopes)
    for (method, path), scopes in ROUTES.items()
)


def scopes_for(method: str, path: str) -> tuple[Scope, ...] | None:
    """The scopes of which a caller needs one; `OPEN`, or None where there is no such route for anybody."""
    found = ROUTES.get((method, path))
    if found is not None:
        return found
    return next((scopes for m, pattern, scopes in _PATTERNS if m == method and pattern.fullmatch(path)), None)
