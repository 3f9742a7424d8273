"""The log, on standard error: text for people, or one JSON object a line, ours and the engine's alike.

Every record of a request carries its id, the one that names it in the engine. A request is one record of its own when it ends:
route, status, seconds, caller, and how it was steered. What it said, and what was answered, is never in the log.
"""

import logging
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

from trimtab.server.service import current

__all__ = ["ENGINE_FLAGS", "configure"]

ENGINE_FLAGS = ("--logging-config.formatter", "json")
"""What makes vLLM write JSON, in all its processes."""
_FIELDS = ("route", "status", "seconds", "caller", "steering", "plan", "experiment")


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = [f"{name}={getattr(record, name)}" for name in _FIELDS if getattr(record, name, None) is not None]
        request_id = getattr(record, "request_id", None)
        told += [] if request_id is None else [f"request_id={request_id}"]
        return " ".join((super().format(record), *told))


def configure(log_format: Literal["text", "json"]) -> None:
    """Writes our log in this format from now on; the engine's takes `ENGINE_FLAGS`."""
    handler = logging.StreamHandler()
    handler.addFilter(_with_request_id)
    if log_format == "json":
        renamed = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=renamed))
    else:
        handler.setFormatter(_Text("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log = logging.getLogger("trimtab")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def _with_request_id(record: logging.LogRecord) -> bool:
    if (request_id := current.request_id.get(None)) is not None:
        record.request_id = request_id
    return True
