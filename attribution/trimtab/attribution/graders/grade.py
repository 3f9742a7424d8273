"""What a grader is, and what it says."""

import re
from typing import Any, Literal, NamedTuple, Protocol, Self, get_args

__all__ = ["VERDICTS", "Grade", "Grader", "Verdict", "coherent"]

Verdict = Literal["shows", "lacks", "unclear"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


class Grade(NamedTuple):
    """What a grader says of one completion."""

    verdict: Verdict
    score: float | None = None
    """The number behind the verdict, in the grader's own unit, where it has one."""
    reason: str | None = None
    """Why, for people."""
    input_tokens: int = 0
    """What a judge read for it."""
    output_tokens: int = 0
    """What a judge wrote for it."""

    def to_dict(self) -> dict[str, Any]:
        """As a journal keeps it, defaults left out."""
        default = Grade(self.verdict)._asdict()
        return {k: v for k, v in self._asdict().items() if k == "verdict" or v != default[k]}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """A kept grade; fields of the record that are not a grade's are ignored."""
        return cls(**{k: record[k] for k in cls._fields if k in record})


class Grader(Protocol):
    """Judges completions; safe to call from several threads."""

    name: str
    """What it is, for people."""
    digest: str
    """`sha256:…` over all that decides its verdicts."""
    n_parallel: int
    """How many calls at once are worth while: 1 for what only computes."""

    def grade(self, prompt: str, completion: str) -> Grade:
        """The grade of a completion.

        Raises:
            GraderError: there is none to be had, now or ever; the message says what to do.
        """
        ...

    def usd(self, input_tokens: int, output_tokens: int) -> float | None:
        """What a judge charges for these tokens; None where nobody charges, or no price was given."""
        ...


def coherent(text: str) -> bool:
    """Whether the text has at least five words, half of them distinct, and no broken characters."""
    words = re.findall(r"[\w']+", text.lower())
    return len(words) >= 5 and len(set(words)) * 2 >= len(words) and "�" not in text
