"""One generation request, from its body to its reply: admitted by us, run and rendered by vLLM's serving code, and proven.

A request that cannot be steered as asked never looks as if it had been: it is refused at admission, or its reply is withheld.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.exceptions import VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError

from trimtab.attribution.bundle import Bundle
from trimtab.server.errors import InvalidRequest, NotApplied, TrimtabError, Violation
from trimtab.server.service import body
from trimtab.server.service.admission import OnFailure, Steered, admit
from trimtab.server.service.applied import NOT_REQUESTED, applied, failed_open, requested
from trimtab.server.service.metrics import Metrics
from trimtab.server.service.problem import Problem, of_error, of_vllm
from trimtab.server.service.stream import told
from trimtab.server.service.witness import Witness

__all__ = ["Generation", "Refused"]

MAX_VIOLATIONS = 10
log = logging.getLogger("trimtab")


class Refused(Exception):
    """A request ends with this problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


@dataclass
class _Ending:
    """How one request ended, for the count of them."""

    status: str = "abandoned"


@dataclass(frozen=True)
class Generation:
    """The two generation routes, over one engine."""

    engine: EngineClient
    chat: OpenAIServingChat
    completion: OpenAIServingCompletion
    models: tuple[str, ...]
    """Ids that requests may name."""
    bundles: Mapping[str, Bundle]
    on_failure: OnFailure
    """For requests that do not say."""
    metrics: Metrics
    keep_alive_seconds: float

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._reply(
            request, ChatCompletionRequest, self.chat, lambda serving, ask: serving.create_chat_completion(ask)
        )

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._reply(
            request, CompletionRequest, self.completion, lambda serving, ask: serving.create_completion(ask)
        )

    async def _reply(
        self,
        request: Request,
        model: type[Any],
        serving: Any,
        create: Callable[[Any, Any], Awaitable[Any]],
    ) -> Response:
        ending = _Ending()
        response: Response | None = None
        try:
            response = await self._run(request, model, serving, create, ending)
        except Exception as e:
            if ending.status == "abandoned":
                ending.status = "refused" if _is_the_callers(e) else "failed"
            raise
        finally:
            if not isinstance(response, StreamingResponse):
                self.metrics.requests.labels(ending.status).inc()
        return response

    async def _run(
        self,
        request: Request,
        model: type[Any],
        serving: Any,
        create: Callable[[Any, Any], Awaitable[Any]],
        ending: _Ending,
    ) -> Response:
        raw = await body.read(request.stream(), request.headers)
        start = time.perf_counter()
        admission = admit(
            body.decode(raw),
            fields=model.model_fields.keys(),
            models=self.models,
            bundles=self.bundles,
            on_failure=self.on_failure,
        )
        ask = _parse(model, {**admission.body, "request_id": request.state.request_id})
        self.metrics.admission_seconds.observe(time.perf_counter() - start)
        steered = admission.steered
        witness = Witness(self.engine, "closed" if steered is None else steered.on_failure)
        if steered is not None:
            serving = copy(serving)
            serving.engine_client = witness

        def close() -> dict[str, Any]:
            return self._close(steered, witness, ending)

        def failure() -> NotApplied | None:
            if witness.failure is not None:
                self._mismatch(witness.failure, ending, "not_applied")
            return witness.failure

        # No raw request: its headers would choose the engine's request id, the data-parallel rank and the priority.
        try:
            result = await _unless_gone(request, _checked(create(serving, ask)))
        except NotApplied:
            failure()
            raise
        if result is None:
            return Response(status_code=499)
        if isinstance(result, AsyncGenerator):
            opening = NOT_REQUESTED if steered is None else requested(steered.plan, steered.bundles)
            events = told(result, opening, close, failure)
            return StreamingResponse(
                with_sse_keep_alive(self._counted(events, ending), self.keep_alive_seconds),
                media_type="text/event-stream",
                headers={**_headers(opening), "cache-control": "no-cache"},
            )
        if isinstance(result, ErrorResponse):
            raise Refused(of_vllm(result.error.code, result.error.message, result.error.param))
        document = result.model_dump()
        document.pop("kv_transfer_params", None)
        document["steering"] = close()
        return JSONResponse(document, headers=_headers(document["steering"]))

    def _close(self, steered: Steered | None, witness: Witness, ending: _Ending) -> dict[str, Any]:
        """The reply's `steering` object, checked and counted.

        Raises:
            NotApplied: the proof does not match the plan, and the request fails closed.
        """
        if steered is None:
            ending.status = "not_requested"
            return dict(NOT_REQUESTED)
        try:
            steering = applied(steered.plan, steered.bundles, witness.runs, witness.n_started)
        except NotApplied as e:
            if steered.on_failure == "open":
                self._mismatch(e, ending, "failed_open")
                return failed_open(steered.plan, steered.bundles, e.message)
            self._mismatch(e, ending, "not_applied")
            raise
        ending.status = "applied"
        for count in ("prompt_tokens", "completion_tokens", "cached_prompt_tokens"):
            self.metrics.edited_tokens.labels(count.removesuffix("_tokens")).inc(steering[count])
        return steering

    def _mismatch(self, error: NotApplied, ending: _Ending, status: str) -> None:
        ending.status = status
        self.metrics.mismatches.inc()
        log.error("a plan was not applied: %s", error.message)

    async def _counted(self, events: AsyncGenerator[str, None], ending: _Ending) -> AsyncGenerator[str, None]:
        try:
            async with aclosing(events):
                async for event in events:
                    if event.startswith('data: {"error"') and ending.status == "abandoned":
                        ending.status = "failed"
                    yield event
        finally:
            self.metrics.requests.labels(ending.status).inc()


def _is_the_callers(error: Exception) -> bool:
    match error:
        case Refused():
            return error.problem.status < 500
        case TrimtabError():
            return of_error(error).status < 500
        case _:
            return isinstance(error, body.BodyTooLarge)


def _headers(steering: Mapping[str, Any]) -> dict[str, str]:
    plan = {"x-steering-plan": steering["plan"]} if "plan" in steering else {}
    return {"x-steering-status": steering["status"], **plan}


def _parse(model: type[Any], document: Mapping[str, Any]) -> Any:
    """vLLM's request model of the body.

    Raises:
        InvalidRequest: with the fields at fault.
    """
    try:
        return model.model_validate(document)
    except ValidationError as e:
        found: dict[str, list[str]] = {}
        for error in e.errors(include_url=False, include_input=False, include_context=False):
            found.setdefault(clean_loc_for_param(error["loc"]) or "body", []).append(error["msg"])
        # A field of several types fails once for each.
        violations = [Violation(field, ", or: ".join(messages)[:400]) for field, messages in found.items()]
        raise InvalidRequest(violations[:MAX_VIOLATIONS]) from e
    except (
        VLLMClientError,
        ValueError,
        TypeError,
        NotImplementedError,
    ) as e:  # vLLM's validators raise some as they are.
        raise InvalidRequest([Violation(getattr(e, "parameter", None) or "body", str(e)[:400])]) from e


async def _checked(result: Awaitable[Any]) -> Any:
    """What vLLM's serving code returns; its exceptions become problems, and those of the server are logged."""
    try:
        return await result
    except TrimtabError:
        raise
    except EngineDeadError as e:
        raise Refused(
            Problem(503, "engine_dead", "the engine has stopped, and so does this server; ask again once it is back")
        ) from e
    except Exception as e:
        error = create_error_response(e).error
        message = error.message
        if error.code == 500:
            log.exception("a generation failed")
            message = f"the engine failed on this request ({type(e).__name__}); the server's log has the cause"
        raise Refused(of_vllm(error.code, message, error.param)) from e


async def _unless_gone(request: Request, result: Any) -> Any:
    """`result`, or None as soon as the client goes away: the engine then stops at the next step."""
    work = asyncio.ensure_future(result)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
