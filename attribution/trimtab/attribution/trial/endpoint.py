"""The server of a trial: sampled replies and the likelihood of given ones, each under an edit, each with its proof."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from trimtab.attribution.bundle import Bundle
from trimtab.attribution.errors import ServingError
from trimtab.attribution.serving import reachable
from trimtab.client import Steering, Trimtab, TrimtabError

__all__ = ["Endpoint", "Reply"]


class Reply(NamedTuple):
    """One sampled reply."""

    text: str
    prompt_ids: list[int]
    ids: list[int]
    finished: bool
    """It ended by itself, and not at the limit."""
    max_relative_norm: float
    """Largest ‖Δ‖/‖h‖ over the edited tokens, by the reply's proof; 0 where nothing was asked for."""
    cached_tokens: int
    """Prompt tokens that came from the prefix cache; 0 where the server does not tell."""


class Endpoint:
    """A Trimtab server with the bundles of a trial; safe to use from several threads."""

    def __init__(self, client: Trimtab, url: str, model: str) -> None:
        self._client, self._url, self.model = client, url, model

    @classmethod
    @contextmanager
    def open(cls, url: str, model: str | None, api_key: str | None, bundles: Sequence[Bundle]) -> Iterator[Endpoint]:
        """The server at `url`, with `bundles` loaded as long as it is open; those it has already stay.

        Raises:
            ServingError: it cannot be reached, takes no bundles, or has another bundle of that name.
        """
        with Trimtab(url, api_key=api_key, max_retries=4) as client:
            loaded: list[str] = []
            try:
                with _served(url):
                    name = model or next(iter(client.openai.models.list())).id
                    there = {b.name: b.content_hash for b in client.steering.bundles()}
                    for bundle in bundles:
                        if there.get(bundle.header.name) != bundle.content_hash:
                            client.steering.load(bundle.to_bytes())
                            loaded.append(bundle.header.name)
                yield cls(client, url, name)
            finally:
                for bundle_name in loaded:
                    with _served(url):
                        client.steering.unload(bundle_name)

    def reply(self, request: dict[str, Any], steering: Steering | None) -> Reply:
        """A reply to `prompt` or `messages`.

        Raises:
            ServingError: the server refuses, is gone, or did not steer as asked.
        """
        extra = {"return_token_ids": True}
        with _served(self._url):
            if "messages" in request:
                chat = self._client.chat.completions.create(
                    model=self.model, steering=steering, extra_body=extra, **request
                )
                text, choice, prompt_ids = (
                    chat.choices[0].message.content,
                    chat.choices[0],
                    _extra(chat, "prompt_token_ids"),
                )
                usage, norm = chat.usage, chat.steering.max_relative_norm
            else:
                plain = self._client.completions.create(
                    model=self.model, steering=steering, extra_body=extra, **request
                )
                text, choice = plain.choices[0].text, plain.choices[0]
                prompt_ids = _extra(choice, "prompt_token_ids")
                usage, norm = plain.usage, plain.steering.max_relative_norm
        details = usage.prompt_tokens_details if usage is not None else None
        return Reply(
            text=text or "",
            prompt_ids=prompt_ids,
            ids=_extra(choice, "token_ids"),
            finished=choice.finish_reason == "stop",
            max_relative_norm=norm,
            cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
        )

    def nats(self, prompt_ids: list[int], ids: list[int], steering: Steering | None = None) -> float:
        """Mean cross-entropy of `ids` after `prompt_ids`, nats per token, under an edit if one is given.

        Raises:
            ServingError: the server refuses, or gives no log-probabilities of a prompt.
        """
        with _served(self._url):
            reply = self._client.completions.create(
                model=self.model,
                prompt=[*prompt_ids, *ids],
                max_tokens=1,
                temperature=0.0,
                steering=steering,
                extra_body={"prompt_logprobs": 0},
            )
        given = _extra(reply.choices[0], "prompt_logprobs")[len(prompt_ids) :]
        return -sum(float(at[str(token)]["logprob"]) for at, token in zip(given, ids, strict=True)) / len(ids)


@contextmanager
def _served(url: str) -> Iterator[None]:
    """As `reachable`, with what a Trimtab server refuses."""
    try:
        with reachable(url):
            yield
    except TrimtabError as e:
        raise ServingError(f"{url}: {e}") from e
    except (KeyError, TypeError, StopIteration) as e:
        raise ServingError(f"{url} does not answer as a Trimtab server of this release does ({e!r})") from e


def _extra(thing: Any, field: str) -> Any:
    return thing.model_extra[field]
