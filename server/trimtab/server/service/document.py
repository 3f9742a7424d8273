"""The JSON bodies of administration, as typed documents: unknown fields are refused, every mistake at once."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.server.errors import InvalidRequest, Violation
from trimtab.server.service import body

__all__ = ["Body", "Reason", "body_of", "parsed"]

Reason = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")]


class Body(BaseModel):
    """Base of such bodies."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Kind = TypeVar("Kind", bound=Body)


def body_of(kind: type[Kind], fields: Mapping[str, Any]) -> Kind:
    """The document of these fields.

    Raises:
        InvalidRequest: they are not those of `kind`.
    """
    try:
        # As JSON and strictly: what would be taken for something else (a time in 1970 for 0, 1 for true) is refused.
        return kind.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as e:
        raise InvalidRequest(
            [
                Violation(".".join(map(str, error["loc"])) or "body", error["msg"])
                for error in e.errors(include_url=False, include_input=False, include_context=False)
            ]
        ) from e


async def parsed(request: Request, kind: type[Kind]) -> Kind:
    """The body as `kind`; no body at all is an empty one."""
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    return body_of(kind, body.decode(await body.read(request.stream(), request.headers)) if has_body else {})
