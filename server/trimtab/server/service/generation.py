"""One generation request, from its JSON to its reply: admitted by us, run and rendered by vLLM's serving code, and proven.

    admit(route, JSON) ──► Asked          run(Asked) ──► Whole | Streamed

Every transport takes this one way. A request that cannot be steered as asked never looks as if it had been: it is refused at
admission, or its reply is withheld.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, contextmanager
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
from trimtab.server.experiments.errors import ArmFailed
from trimtab.server.experiments.exposures import Status
from trimtab.server.fleet.switch import OFF, Switch
from trimtab.server.service import body, current
from trimtab.server.service.admission import Admission, OnFailure, Steered, admit
from trimtab.server.service.applied import applied, failed_open, requested, unsteered
from trimtab.server.service.arm import ArmRule
from trimtab.server.service.enrolment import Enroller, Enrolment
from trimtab.server.service.flights import Flight, Flights
from trimtab.server.service.metrics import Metrics
from trimtab.server.service.problem import Problem, Refused, of_exception, of_vllm
from trimtab.server.service.responses import admissible, responses_told
from trimtab.server.service.rules import FREE, Rules
from trimtab.server.service.stream import Event, told
from trimtab.server.service.texts import piece_of, prompt_of, reply_of
from trimtab.server.service.witness import Witness

__all__ = ["Asked", "Generation", "Route", "Streamed", "Whole", "checked", "parsed"]

MAX_VIOLATIONS = 10
_STATUSES: Mapping[str, Status] = {
    "applied": "applied",
    "not_requested": "applied",
    "ended": "ended",
    "abandoned": "abandoned",
}
"""How a request of an experiment ended, by how it ended for the count of all requests."""
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
    said: list[str] = field(default_factory=list)
    """What was answered, where it is read."""
    n_fired: int = 0
    """Tokens on which a gate was open."""
    mismatched: bool = False
    """What the engine applied is not what was asked for."""
    failed_open: str | None = None
    """Why the arm of its experiment could not be had, where it is served without."""


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
    enrolment: Enrolment | None = None
    """Its part in an experiment."""
    prompt: str = ""
    """What was asked, where the reply is read."""

    @property
    def is_read(self) -> bool:
        """Whether its experiment reads the reply: to grade it, or to keep it."""
        return self.enrolment is not None and self.enrolment.is_read


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
    experiments: Enroller | None = None
    """Enrols requests in experiments, where there are any."""

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

    def admit(self, route: Route, request: bytes | Mapping[str, Any], request_id: str, *, enrols: bool = True) -> Asked:
        """The admitted request, from its JSON as bytes or decoded; a refusal is counted. `enrols`: experiments may have it.

        Raises:
            TrimtabError: what cannot be served as asked.
        """
        start = time.perf_counter()
        with self.metrics.refusals(_is_the_callers):
            document = body.decode(request) if isinstance(request, bytes) else request
            enrolment = self._enrolled(document, request_id) if enrols else None
            ending = _Ending()
            with self._exposed(enrolment):
                admission = self._admission_of(route, document, enrolment, ending)
                # Before anything else runs on the loop: whoever revokes a bundle, or kills an experiment, finds every request
                # that was admitted on it.
                flight = self.flights.start(admission.content_hashes, None if enrolment is None else enrolment.alters)
                ask = parsed(route.model, {**admission.body, "request_id": route.id_prefix + request_id})
        self.metrics.admission_seconds.observe(time.perf_counter() - start)
        asked = Asked(route, ask, admission.steered, admission.killed, flight, ending, enrolment)
        return asked._replace(prompt=prompt_of(document)) if asked.is_read else asked

    def _enrolled(self, document: Mapping[str, Any], request_id: str) -> Enrolment | None:
        if self.experiments is None:
            return None
        caller, headers = current.caller.get(), current.headers.get()
        return self.experiments.enrol(document, self.models, caller=caller, headers=headers, request_id=request_id)

    def _admission_of(
        self, route: Route, document: Mapping[str, Any], enrolment: Enrolment | None, ending: _Ending
    ) -> Admission:
        """The request admitted as its arm has it; without it, where that cannot be had and the experiment fails open."""
        fields = route.model.model_fields.keys()
        if enrolment is None:
            return self.admission(route.admissible(document), fields)
        try:
            return self.admission(route.admissible(enrolment.prompted(document)), fields, arm=enrolment.rule)
        except ArmFailed as e:
            if enrolment.rule.on_failure == "closed":
                raise
            log.error("%s", e.message)
            ending.failed_open = e.message
            return self.admission(route.admissible(document), fields)

    @contextmanager
    def _exposed(self, enrolment: Enrolment | None) -> Iterator[None]:
        """What fails inside is told of the arm, or counted as refused."""
        try:
            yield
        except Exception as e:
            if enrolment is not None and self.experiments is not None:
                if _is_the_callers(e):
                    self.experiments.refused(enrolment)
                else:
                    self.experiments.expose(enrolment, "failed", n_fired=0)
            raise

    def admission(
        self, document: Mapping[str, Any], fields: Collection[str], *, to_run: bool = True, arm: ArmRule | None = None
    ) -> Admission:
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
            arm=arm,
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
                self._ended(asked)
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
            opening = _told(asked, self._opening(asked))
            events = asked.route.told(asked.flight.stream(result), opening, close, failure)
            return Streamed(opening, self._counted(events, asked))
        document = result.model_dump(mode="json", by_alias=True)
        document.pop("kv_transfer_params", None)
        document["steering"] = close()
        if asked.is_read:
            asked.ending.said.append(reply_of(document))
        return Whole(document)

    def _opening(self, asked: Asked) -> dict[str, Any]:
        """The `steering` object before the first token."""
        if asked.steered is None or asked.steered.watches:
            return _unsteered(asked)
        return requested(asked.steered)

    def _close(self, asked: Asked, witness: Witness) -> dict[str, Any]:
        """The reply's `steering` object, checked and counted, as the caller may know it.

        Raises:
            NotApplied: the proof does not match the plan, and the request fails closed.
        """
        return _told(asked, self._closed(asked, witness))

    def _closed(self, asked: Asked, witness: Witness) -> dict[str, Any]:
        """The whole of it.

        Raises:
            NotApplied: the proof does not match the plan, and the request fails closed.
        """
        steered, ending = asked.steered, asked.ending
        if steered is None:
            plain = _unsteered(asked)
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
        ending.n_fired = steering["gate_firings"]
        if steered.watches:
            ending.status = "not_requested"
            return _unsteered(asked)
        ending.status = steering["status"]
        for count in ("prompt_tokens", "completion_tokens", "cached_prompt_tokens"):
            self.metrics.edited_tokens.labels(count.removesuffix("_tokens")).inc(steering[count])
        return steering

    def _mismatch(self, error: NotApplied, ending: _Ending, status: str) -> None:
        ending.status = status
        ending.mismatched = True
        self.metrics.mismatches.inc()
        log.error("a plan was not applied: %s", error.message)

    async def _counted(self, events: AsyncGenerator[Event, None], asked: Asked) -> AsyncGenerator[Event, None]:
        ending = asked.ending
        try:
            async with aclosing(events):
                async for event in events:
                    if event.problem is not None and ending.status == "abandoned":
                        ending.status = "failed"
                    if asked.is_read and event.document is not None:
                        ending.said.append(piece_of(event.document))
                    yield event
        finally:
            self._ended(asked)

    def _ended(self, asked: Asked) -> None:
        """Counts the request, and hands over its exposure."""
        ending, enrolment = asked.ending, asked.enrolment
        self.metrics.requests.labels(ending.status).inc()
        if enrolment is None or self.experiments is None:
            return
        if ending.status == "refused":
            self.experiments.refused(enrolment)
            return
        status = _STATUSES.get(ending.status, "failed")
        if ending.mismatched:
            status = "not_applied"
        elif ending.failed_open is not None:
            status = "failed_open"
        is_whole = status in ("applied", "failed_open")
        text = (asked.prompt, "".join(ending.said)) if asked.is_read and is_whole else None
        self.experiments.expose(enrolment, status, n_fired=ending.n_fired, text=text)
        if text is not None and enrolment.grading:
            self.experiments.grade(enrolment, *text)


def _unsteered(asked: Asked) -> dict[str, Any]:
    """The `steering` object of a reply that nothing altered."""
    if asked.ending.failed_open is not None:
        return {"status": "failed_open", "reason": asked.ending.failed_open}
    return unsteered(asked.killed)


def _told(asked: Asked, steering: dict[str, Any]) -> dict[str, Any]:
    return steering if asked.enrolment is None else asked.enrolment.tell(steering)


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
    except (AttributeError, LookupError) as e:  # Some look into fields before anything has made sure of what they are.
        why = f"has a field of another kind than vLLM reads: {e}"
        raise InvalidRequest([Violation("body", why[:400])]) from e


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
