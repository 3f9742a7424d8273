"""What is known of the request that the running task serves: set at the edge of each transport, and nowhere else.

There is no default: code that asks who the caller is, where nobody has found out, fails instead of serving anybody.
"""

from collections.abc import Mapping
from contextvars import ContextVar

from trimtab.server.keys.key import Caller

__all__ = ["caller", "headers", "request_id"]

caller: ContextVar[Caller] = ContextVar("trimtab_caller")
"""Who sent it."""
request_id: ContextVar[str] = ContextVar("trimtab_request_id")
"""What the engine, the log and the reply's `X-Request-Id` call it."""
headers: ContextVar[Mapping[str, str]] = ContextVar("trimtab_headers")
"""Its headers that start with `x-trimtab-`, or such metadata, by their names in lower case."""
