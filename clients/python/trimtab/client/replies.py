"""Replies with their proof: the `openai` SDK's own models, and `steering`, typed.

A chunk of a stream carries `steering` in the first chunk (what was admitted) and in the last (what was applied).
"""

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from trimtab.client.proof import Applied, raw_proof

__all__ = ["SteeredChatChunk", "SteeredChatCompletion", "SteeredCompletion"]


class SteeredChatCompletion(ChatCompletion):
    """A chat reply."""

    @property
    def steering(self) -> Applied:
        """What was applied.

        Raises:
            NotAppliedError: the reply carries no proof.
        """
        return Applied.of(self)


class SteeredCompletion(Completion):
    """A text reply, or a chunk of one."""

    @property
    def steering(self) -> Applied:
        """What was applied.

        Raises:
            NotAppliedError: the reply carries no proof.
        """
        return Applied.of(self)


class SteeredChatChunk(ChatCompletionChunk):
    """A chunk of a chat reply."""

    @property
    def steering(self) -> Applied | None:
        """What was admitted (first chunk) or applied (last chunk); None in between."""
        return None if raw_proof(self) is None else Applied.of(self)
