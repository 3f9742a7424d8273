"""The latents of a bundle that are most active on each token of a text, read in the engine while it runs the text.

    {"bundle", "prompt" | "messages", "top_count", "steering"}

The text is run once, past the prefix cache, so that every token is read; with `steering` it is run under those edits, with the
proof of any steered request. The first token has no latents: it is the attention sink, which SAEs are not trained on.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.sampling_params import SamplingParams

from trimtab.attribution.bundle import Bundle
from trimtab.server.engine.admission import uses_graphs
from trimtab.server.engine.probe import PROBE, Reading, take, wire
from trimtab.server.errors import Forbidden, InvalidRequest, Revoked, Unavailable, UnknownBundle, Unsupported, Violation
from trimtab.server.service.admission import XARG, Admission
from trimtab.server.service.applied import applied, unsteered
from trimtab.server.service.generation import Generation, checked, parsed
from trimtab.server.service.witness import Witness
from trimtab.server.steering import Steering

__all__ = ["MAX_TOP", "Asked", "Inspector"]

MAX_TOP = 64
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]


class Asked(BaseModel):
    """A text to read, and by which bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str
    prompt: str | Annotated[tuple[TokenId, ...], Field(min_length=1)] | None = None
    messages: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    top_count: Annotated[int, Field(strict=True, ge=1, le=MAX_TOP)] = 5
    steering: Any = None

    @model_validator(mode="after")
    def _one(self) -> "Asked":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of `prompt` and `messages`")
        return self


class Inspector:
    """Reads texts through one engine."""

    def __init__(self, generation: Generation, tokenization: ServingTokenization) -> None:
        self._generation = generation
        self._tokenization = tokenization

    async def inspect(self, document: Mapping[str, Any], request_id: str) -> dict[str, Any]:
        """The reading, as the HTTP API tells it.

        Raises:
            TrimtabError: what cannot be read as asked.
        """
        asked = _asked(document)
        bundle = self._bundle(asked.bundle)
        if uses_graphs(self._generation.engine.vllm_config):
            raise Unsupported("latents cannot be read inside CUDA graphs; start the server with --enforce-eager")
        admission = self._admitted(asked)
        # Before anything else runs on the loop: the rows that are read, and those that steer, stay while this is under way.
        flight = self._generation.flights.start(admission.content_hashes | {bundle.content_hash})
        ids = await flight.whole(self._token_ids(asked))
        # The names are those of the request that was admitted: the shelf may change while the text runs.
        read = self._read(bundle, asked.top_count, ids, admission, request_id)
        reading, steering = await flight.whole(checked(read))
        return {
            "object": "steering.inspection",
            "bundle": asked.bundle,
            "content_hash": bundle.content_hash,
            "hook_point": bundle.header.hook_point,
            "tokens": self._tokens(bundle, ids, reading),
            "steering": steering,
        }

    async def _token_ids(self, asked: Asked) -> list[int]:
        if isinstance(asked.prompt, tuple):
            return list(asked.prompt)
        if asked.prompt is not None:
            ask = parsed(TokenizeCompletionRequest, {"prompt": asked.prompt})
        else:
            body = {"messages": list(asked.messages or ()), "add_generation_prompt": False}
            ask = parsed(TokenizeChatRequest, body)
        found = await checked(self._tokenization.create_tokenize(ask, None))  # type: ignore[arg-type] # none is fine
        if not found.tokens:
            raise InvalidRequest([Violation("prompt", "holds no token")])
        return list(found.tokens)

    def _admitted(self, asked: Asked) -> Admission:
        if asked.steering is None:
            return Admission({}, None)
        return self._generation.admission({"steering": asked.steering}, ())

    def _bundle(self, name: str) -> Bundle:
        """The bundle that the caller may read by.

        Raises:
            TrimtabError: there is none that it may.
        """
        rules = self._generation.rules()
        try:
            rules.allow(Steering(bundle=name))
        except (Forbidden, Revoked, Unavailable, UnknownBundle) as e:
            e.field = "bundle"
            raise
        bundle = self._generation.bundles.get(name)
        if bundle is None:
            raise UnknownBundle(
                f"bundle {name!r} is not loaded; GET /v1/steering/bundles lists those that are", field="bundle"
            )
        return bundle

    async def _read(
        self, bundle: Bundle, top: int, ids: list[int], admission: Admission, request_id: str
    ) -> tuple[Reading, dict[str, Any]]:
        engine, steered = self._generation.engine, admission.steered
        probe_id, text = wire(bundle.content_hash, bundle.header.layer, top)
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            skip_reading_prefix_cache=True,
            extra_args={PROBE: text, **({XARG: steered.plan.wire()} if steered and steered.plan.rows else {})},
        )
        witness = Witness(engine, "closed")
        async for _ in witness.generate({"prompt_token_ids": ids}, params, request_id):
            pass
        done = unsteered(admission.killed) if steered is None else applied(steered, witness.runs, witness.n_started)
        return await take(engine, probe_id), done

    def _tokens(self, bundle: Bundle, ids: list[int], reading: Reading) -> list[dict[str, Any]]:
        tokenizer = self._tokenization.renderer.get_tokenizer()
        latents = bundle.header.latents
        tokens = []
        for position, (token, rows, activations) in enumerate(
            zip(ids, reading.rows_PT, reading.activations_PT, strict=True)
        ):
            fired = [
                {
                    "latent": latents[row].latent,
                    "activation": activation,
                    "fraction_of_max": activation / latents[row].max_activation,
                }
                for row, activation in zip(rows, activations, strict=True)
                if row >= 0 and position
            ]
            tokens.append({"id": token, "text": tokenizer.decode([token]), "latents": fired})
        return tokens


def _asked(document: Mapping[str, Any]) -> Asked:
    try:
        return Asked.model_validate(document)
    except ValidationError as e:
        found: dict[str, list[str]] = {}
        for error in e.errors(include_url=False, include_input=False, include_context=False):
            field = next((str(part) for part in error["loc"]), "prompt")
            found.setdefault(field, []).append(error["msg"].removeprefix("Value error, "))
        raise InvalidRequest([Violation(field, ", or: ".join(said)) for field, said in found.items()]) from e
