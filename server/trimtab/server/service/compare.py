"""One prompt with one seed under several steerings, side by side: all arms are admitted, or none runs.

    {"model", "messages" | "prompt", sampling …, "arms": [{"name", "steering", "system_prompt"}, …]}

An arm is an ordinary request, so it is proven like one. An arm that fails ends the comparison: one without an arm is none.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trimtab.server.errors import InvalidRequest, InvalidSteering, UnknownBundle, Violation
from trimtab.server.service.generation import Asked, Generation, Route, Streamed, Whole
from trimtab.server.service.problem import Problem, Refused, of_exception

__all__ = ["MAX_ARMS", "Arm", "Comparison", "Piece", "run", "stream"]

MAX_ARMS = 16
MAX_SEED = 2**31 - 1
_QUEUED = 256
"""Chunks that wait for a reader who is slower than the engine."""


class Arm(BaseModel):
    """One of the requests that are compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    steering: Any = None
    system_prompt: str | None = None


_ARMS = TypeAdapter(Annotated[tuple[Arm, ...], Field(min_length=1, max_length=MAX_ARMS)])


class Piece(NamedTuple):
    """What is new of one arm."""

    arm: int
    chunk: Mapping[str, Any]


class Comparison(NamedTuple):
    """An admitted comparison."""

    names: tuple[str, ...]
    asked: tuple[Asked, ...]
    seed: int

    @classmethod
    def admit(
        cls, generation: Generation, document: Mapping[str, Any], request_id: str, *, streamed: bool
    ) -> "Comparison":
        """The comparison of a request's JSON; without a seed, one is drawn.

        Raises:
            TrimtabError: what cannot be served as asked, with the arm at fault in the path.
        """
        with generation.metrics.refusals():
            body = {key: value for key, value in document.items() if key not in ("arms", "stream", "stream_options")}
            arms = _arms(body, document.get("arms"), generation.models)
        if body.get("seed") is None:
            body["seed"] = secrets.randbelow(MAX_SEED)
        if streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        route = generation.chat_route if "messages" in body else generation.completion_route
        asked = _admitted(generation, route, [_body(body, arm) for arm in arms], request_id)
        return cls(tuple(arm.name for arm in arms), asked, body["seed"])


def _arms(body: Mapping[str, Any], given: Any, models: tuple[str, ...]) -> tuple[Arm, ...]:
    violations = []
    arms: tuple[Arm, ...] = ()
    try:
        arms = _ARMS.validate_python(given)
    except ValidationError as e:
        errors = e.errors(include_url=False, include_input=False, include_context=False)
        inner = [error for error in errors if error["loc"]]  # An arm at fault makes the list too short as well.
        violations = [Violation(_path(error["loc"]), error["msg"]) for error in inner or errors]
    if "steering" in body:
        violations.append(Violation("steering", "is for each arm to say: `arms[].steering`"))
    model = body.get("model")
    if isinstance(model, str) and model not in models and "@" in model:
        violations.append(Violation("model", "names a bundle, which would steer the control too; name the base model"))
    names = [arm.name for arm in arms]
    violations += [
        Violation(f"arms[{i}].name", f"{name!r} is the name of another arm too")
        for i, name in enumerate(names)
        if name in names[:i]
    ]
    violations += [
        Violation(f"arms[{i}].system_prompt", "goes with `messages`, and this is a text completion")
        for i, arm in enumerate(arms)
        if arm.system_prompt is not None and "messages" not in body
    ]
    if violations:
        raise InvalidRequest(violations)
    return arms


def _path(loc: tuple[int | str, ...]) -> str:
    return "arms" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)


def _body(body: Mapping[str, Any], arm: Arm) -> dict[str, Any]:
    own = dict(body)
    if arm.steering is not None:
        own["steering"] = arm.steering
    if arm.system_prompt is not None and isinstance(own["messages"], list):
        own["messages"] = [{"role": "system", "content": arm.system_prompt}, *own["messages"]]
    return own


def _admitted(generation: Generation, route: Route, bodies: list[dict[str, Any]], request_id: str) -> tuple[Asked, ...]:
    asked: list[Asked] = []
    steering: list[Violation] = []
    others: dict[str, Violation] = {}
    unknown: list[UnknownBundle] = []
    for i, body in enumerate(bodies):
        try:
            asked.append(generation.admit(route, body, f"{request_id}-{i}", enrols=False))
        except InvalidSteering as e:
            steering += _of_arm(i, e.violations)
        except InvalidRequest as e:
            others |= {violation.field: violation for violation in e.violations}
        except UnknownBundle as e:
            unknown.append(UnknownBundle(e.message, field=f"arms[{i}].{e.field or 'steering'}"))
    if steering:
        raise InvalidSteering([*steering, *others.values(), *(Violation(e.field or "", e.message) for e in unknown)])
    if others:
        raise InvalidRequest([*others.values(), *(Violation(e.field or "", e.message) for e in unknown)])
    if unknown:
        raise unknown[0]
    return tuple(asked)


def _of_arm(i: int, violations: list[Violation]) -> Iterator[Violation]:
    for violation in violations:
        own = violation.field.startswith("steering")
        yield Violation(f"arms[{i}].{violation.field}", violation.message) if own else violation


async def run(generation: Generation, comparison: Comparison) -> list[dict[str, Any]]:
    """The arms' replies, in order; the first failure stops the others.

    Raises:
        Refused: with the arm at fault.
    """

    async def reply(i: int, asked: Asked) -> dict[str, Any]:
        try:
            result = await generation.run(asked)
        except Exception as e:
            raise Refused(_of(i, of_exception(e))) from e
        assert isinstance(result, Whole)
        return result.document

    tasks = [asyncio.ensure_future(reply(i, asked)) for i, asked in enumerate(comparison.asked)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _stopped(tasks)


async def stream(generation: Generation, comparison: Comparison) -> AsyncGenerator[Piece, None]:
    """The arms' chunks as they come.

    Raises:
        Refused: with the arm at fault; the others are stopped.
    """
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(_QUEUED)

    async def pump(i: int, asked: Asked) -> None:
        try:
            result = await generation.run(asked)
            assert isinstance(result, Streamed)
            async with aclosing(result.events) as events:
                async for event in events:
                    if event.problem is not None:
                        raise Refused(event.problem)
                    if event.document is not None:
                        await queue.put(Piece(i, event.document))
            await queue.put(None)
        except Exception as e:  # noqa: BLE001 — raised again where the arms meet.
            await queue.put(Refused(_of(i, of_exception(e))))

    tasks = [asyncio.ensure_future(pump(i, asked)) for i, asked in enumerate(comparison.asked)]
    n_running = len(tasks)
    try:
        while n_running:
            match await queue.get():
                case None:
                    n_running -= 1
                case Piece() as piece:
                    yield piece
                case error:
                    raise error
    finally:
        await _stopped(tasks)


async def _stopped(tasks: Sequence["asyncio.Future[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _of(arm: int, problem: Problem) -> Problem:
    return problem._replace(param=problem.param or f"arms[{arm}]", message=f"arms[{arm}]: {problem.message}")
