"""What the sync and the async client share: how a call becomes a request, and what must hold of its reply.

Everything here is pure; `http` and `aio` differ from each other by `await` alone.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import openai
from openai._types import RequestOptions
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat

from trimtab.client.errors import InvalidSteeringError, NotAppliedError, TrimtabError
from trimtab.client.proof import Applied, raw_proof, require_applied
from trimtab.client.spec import Steering

__all__ = ["ChatParams", "ChatStreamParams", "CompletionParams", "CompletionStreamParams", "Ending", "Verb"]

Verb = Literal["chat", "completion", "compare", "validate", "inspect", "bundles", "bundle", "load", "unload", "pin"]
"""What a transport can be asked for."""

ChatParams = chat.CompletionCreateParamsNonStreaming
ChatStreamParams = chat.CompletionCreateParamsStreaming
CompletionParams = completion.CompletionCreateParamsNonStreaming
CompletionStreamParams = completion.CompletionCreateParamsStreaming


def root(base_url: str) -> str:
    """The OpenAI base URL of a server given with or without its `/v1`."""
    if urlsplit(base_url).scheme not in ("http", "https"):
        raise ValueError(
            f"base_url {base_url!r} is no http(s) or grpc(s) URL; give the server's root, such as http://127.0.0.1:8000"
        )
    trimmed = base_url.rstrip("/")
    return trimmed if trimmed.endswith("/v1") else f"{trimmed}/v1"


def is_grpc(base_url: str) -> bool:
    """Whether a URL is of a server's gRPC port."""
    return urlsplit(base_url).scheme in ("grpc", "grpcs")


def key(api_key: str | None) -> str:
    """The key to send. Never OPENAI_API_KEY, which is no business of another server."""
    return api_key or os.environ.get("TRIMTAB_API_KEY") or "none"


def body(
    steering: Steering | None, extra_body: Mapping[str, object] | None, params: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON of a request."""
    merged = {**params, **(extra_body or {})}
    if steering is not None:
        if "steering" in merged:
            raise InvalidSteeringError("steering is given twice: as `steering` and inside `extra_body`; drop one")
        merged["steering"] = steering.to_dict()
    return merged


def bundle_path(name: str) -> str:
    """The route of one bundle."""
    return f"/steering/bundles/{quote(name, safe='')}"


def upload(replace: bool, pin: bool) -> RequestOptions:
    """How the bytes of a bundle are sent."""
    switches = {"replace": replace, "pin": pin}
    return {
        "headers": {"Content-Type": "application/octet-stream"},
        "params": {name: "true" for name, value in switches.items() if value},
    }


def must_be_applied(steering: Steering | None) -> bool:
    """Whether a reply without proof of these edits is an error."""
    return steering is not None and steering.on_failure != "open" and not steering.is_off


@contextmanager
def typed_errors() -> Iterator[None]:
    """Steering errors of the server raised as this package's own; all others stay the SDK's."""
    try:
        yield
    except openai.APIError as e:
        if (known := TrimtabError.of(e)) is not None:
            raise known from e
        raise


class Ending:
    """The proof of a stream, gathered while it passes."""

    def __init__(self, steering: Steering | None) -> None:
        self._required = must_be_applied(steering)
        self._last: dict[str, Any] | None = None
        self._ended = False

    def saw(self, chunk: object) -> None:
        """Takes note of one chunk."""
        self._last = raw_proof(chunk) or self._last

    def ended(self) -> None:
        """The stream is complete.

        Raises:
            NotAppliedError: edits were asked for and the last proof does not show them.
        """
        self._ended = True
        if self._required:
            require_applied({"steering": self._last})

    @property
    def proof(self) -> Applied:
        """What was applied; known when the stream is complete.

        Raises:
            NotAppliedError: the stream is not complete, or carried no proof.
        """
        if not self._ended:
            raise NotAppliedError("the stream is not complete; read it to the end, its last chunk carries the proof")
        return Applied.of({"steering": self._last})
