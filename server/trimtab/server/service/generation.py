"""One generation request, from its JSON to its reply: admitted by us, run and rendered by vLLM's serving code, and proven.

    admit(route, JSON) ──► Asked          run(Asked) ──► Whole | Streamed

Every transport takes this one way. A request that cannot be steered as asked never looks as if it had been: it is refused at
admission, or its reply is withheld.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pydantic import ValidationError
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.exceptions import VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError

from trimtab.attribution.bundle import Bundle
from trimtab.server.errors import InvalidRequest, Killed, NotApplied, Revoked, TrimtabError, Violation
from trimtab.server.fleet.switch import OFF, Switch
from trimtab.server.service import body
from trimtab.server.service.admission import Admission, OnFailure, Steered, admit
from trimtab.server.service.applied import applied, failed_open, requested, unsteered
from trimtab.server.service.flights import Flight, Flights
from trimtab.server.service.metrics import Metrics
from trimtab.server.service.problem import Problem, Refused, of_exception, of_vllm
from trimtab.server.service.responses import admissible, responses_told
from trimtab.server.service.rules import FREE, Rules
from trimtab.server.service.stream import Event, told
from trimtab.server.service.witness import Witness

__all__ = ["Asked", "Generation", "Route", "Streamed", "Whole", "checked", "parsed"]

MAX_VIOLATIONS = 10
log = logging.getLogger("trimtab")


class Route(NamedTuple):
    """One kind of request, and vLLM's serving code for it."""

    model: type[Any]
    """vLLM's request model."""
    serving: Any
    create: Callable[[Any, Any], Awaitable[Any]]
    """(serving, request) → the reply, its stream, or an `ErrorResponse`."""
    told: Callable[..., AsyncGenerator[Event, None]] = told
    """How its stream is told of the steering."""
    admissible: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    """Its own refusals, before admission."""
    id_prefix: str = ""
    """Of ids that the reply shows as they are."""


@dataclass
class _Ending:
    """How one request ended, for the count of them."""

    status: str = "abandoned"


class Asked(NamedTuple):
    """An admitted request."""

    route: Route
    ask: Any
    """Of `route.model`."""
    steered: Steered | None
    killed: Switch | None
    """The kill switch keeps it from being steered as asked."""
    flight: Flight
    ending: _Ending


class Whole(NamedTuple):
    """A reply in one piece."""

    document: dict[str, Any]

    @property
    def steering(self) -> Mapping[str, Any]:
        """What was applied."""
        found: Mapping[str, Any] = self.document["steering"]
        return found


class Streamed(NamedTuple):
    """A reply in events; the last one says what was applied."""

    steering: Mapping[str, Any]
    """What was admitted."""
    events: AsyncGenerator[Event, None]


@dataclass(frozen=True)
class Generation:
    """The generation routes, over one engine."""

    engine: EngineClient
    chat: OpenAIServingChat
    completion: OpenAIServingCompletion
    responses: OpenAIServingResponses
    models: tuple[str, ...]
    """Ids that requests may name."""
    bundles: Mapping[str, Bundle]
    on_failure: OnFailure
    """For requests that do not say."""
    metrics: Metrics
    keep_alive_seconds: float
    rules: Callable[[], Rules] = lambda: FREE
    """What the request that is being served is admitted under."""
    flights: Flights = field(default_factory=Flights)
    """Steered requests that run."""

    @property
    def chat_route(self) -> Route:
        """Chat completions."""
        return Route(ChatCompletionRequest, self.chat, lambda serving, ask: serving.create_chat_completion(ask))

    @property
    def completion_route(self) -> Route:
        """Text completions."""
        return Route(CompletionRequest, self.completion, lambda serving, ask: serving.create_completion(ask))

    @property
    def responses_route(self) -> Route:
        """Responses."""
        return Route(
            ResponsesRequest,
            self.responses,
            lambda serving, ask: serving.create_responses(ask),
            told=responses_told,
            admissible=admissible,
            id_prefix="resp_",
        )

    def admit(self, route: Route, request: bytes | Mapping[str, Any], request_id: str) -> Asked:
        """The admitted request, from its JSON as bytes or decoded; a refusal is counted.

        Raises:
            TrimtabError: what cannot be served as asked.
        """
        start = time.perf_counter()
        with self.metrics.refusals(_is_the_callers):
            document = body.decode(request) if isinstance(request, bytes) else request
            admission = self.admission(route.admissible(document), route.model.model_fields.keys())
            # Before anything else runs on the loop: whoever revokes a bundle finds every request that was admitted on it.
            flight = self.flights.start(() if admission.steered is None else admission.steered.content_hashes)
            ask = parsed(route.model, {**admission.body, "request_id": route.id_prefix + request_id})
        self.metrics.admission_seconds.observe(time.perf_counter() - start)
        return Asked(route, ask, admission.steered, admission.killed, flight, _Ending())

    def admission(self, document: Mapping[str, Any], fields: Collection[str], *, to_run: bool = True) -> Admission:
        """The document of a request whose model has these fields, admitted under the rules of the moment.

        What is not to be run is admitted whatever the kill switch says.

        Raises:
            TrimtabError: what cannot be served as asked.
        """
        return admit(
            document,
            fields=fields,
            models=self.models,
            bundles=self.bundles,
            on_failure=self.on_failure,
            rules=self.rules() if to_run else replace(self.rules(), switch=OFF),
        )

    async def run(self, asked: Asked) -> Whole | Streamed:
        """The reply, proven; of a stream, closing its events aborts the request.

        Raises:
            Refused: vLLM's serving code does not take the request, or failed.
            NotApplied: the reply was not steered as asked, and fails closed.
        """
        result: Whole | Streamed | None = None
        try:
            result = await self._run(asked)
        except (Killed, Revoked):
            asked.ending.status = "ended"
            raise
        except Exception as e:
            if asked.ending.status == "abandoned":
                asked.ending.status = "refused" if _is_the_callers(e) else "failed"
            raise
        finally:
            if not isinstance(result, Streamed):
                self.metrics.requests.labels(asked.ending.status).inc()
        return result

    async def _run(self, asked: Asked) -> Whole | Streamed:
        steered, serving = asked.steered, asked.route.serving
        witness = Witness(self.engine, "closed" if steered is None else steered.on_failure)
        if steered is not None:
            serving = copy(serving)
            serving.engine_client = witness

        def close() -> dict[str, Any]:
            return self._close(asked, witness)

        def failure() -> TrimtabError | None:
            if asked.flight.error is not None:
                asked.ending.status = "ended"
                return asked.flight.error
            if witness.failure is not None:
                self._mismatch(witness.failure, asked.ending, "not_applied")
            return witness.failure

        # No raw request: its headers would choose the engine's request id, the data-parallel rank and the priority.
        try:
            result = await asked.flight.whole(checked(asked.route.create(serving, asked.ask)))
        except NotApplied:
            failure()
            raise
        if isinstance(result, AsyncGenerator):
            opening = unsteered(asked.killed) if steered is None else requested(steered)
            events = asked.route.told(asked.flight.stream(result), opening, close, failure)
            return Streamed(opening, self._counted(events, asked.ending))
        document = result.model_dump(mode="json", by_alias=True)
        document.pop("kv_transfer_params", None)
        document["steering"] = close()
        return Whole(document)

    def _close(self, asked: Asked, witness: Witness) -> dict[str, Any]:
        """The reply's `steering` object, checked and counted.

        Raises:
            NotApplied: the proof does not match the plan, and the request fails closed.
        """
        steered, ending = asked.steered, asked.ending
        if steered is None:
            plain = unsteered(asked.killed)
            ending.status = plain["status"]
            return plain
        try:
            steering = applied(steered, witness.runs, witness.n_started)
        except NotApplied as e:
            if steered.on_failure == "open":
                self._mismatch(e, ending, "failed_open")
                return failed_open(steered, e.message)
            self._mismatch(e, ending, "not_applied")
            raise
        ending.status = steering["status"]
        for count in ("prompt_tokens", "completion_tokens", "cached_prompt_tokens"):
            self.metrics.edited_tokens.labels(count.removesuffix("_tokens")).inc(steering[count])
        return steering

    def _mismatch(self, error: NotApplied, ending: _Ending, status: str) -> None:
        ending.status = status
        self.metrics.mismatches.inc()
        log.error("a plan was not applied: %s", error.message)

    async def _counted(self, events: AsyncGenerator[Event, None], ending: _Ending) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(events):
                async for event in events:
                    if event.problem is not None and ending.status == "abandoned":
                        ending.status = "failed"
                    yield event
        finally:
            self.metrics.requests.labels(ending.status).inc()


def _is_the_callers(error: Exception) -> bool:
    return of_exception(error).status < 500


def parsed(model: type[Any], document: Mapping[str, Any]) -> Any:
    """vLLM's request model of a document.

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


async def checked(result: Awaitable[Any]) -> Any:
    """What vLLM's serving code returns; its errors become problems, and those of the server are logged.

    Raises:
        Refused: with the problem.
    """
    try:
        found = await result
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
    if isinstance(found, ErrorResponse):
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise asyncio.CancelledError  # vLLM answers a cancel with an error.
        raise Refused(of_vllm(found.error.code, found.error.message, found.error.param))
    return found
