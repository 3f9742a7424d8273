"""Regular expressions: the cheapest grader, and one that anybody can check."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from trimtab.attribution.graders.grade import Grade

__all__ = ["Patterns", "PatternsFile"]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{pattern!r} is no regular expression ({e})") from e
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


class PatternsFile(BaseModel):
    """A grader file of `kind = "regex"`; patterns are searched, letter case ignored unless `match_case`."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["regex"]
    shows: tuple[Pattern, ...] = Field(min_length=1)
    """Any of them shows the behaviour."""
    lacks: tuple[Pattern, ...] = ()
    """Any of them shows its absence; without these, whatever `shows` does not match lacks it."""
    match_case: bool = False


class Patterns:
    """A completion that both kinds of patterns match, or neither, is unclear."""

    n_parallel = 1

    def __init__(self, file: PatternsFile, name: str, digest: str) -> None:
        self.name, self.digest = name, digest
        flags = re.MULTILINE if file.match_case else re.MULTILINE | re.IGNORECASE
        self._shows = [re.compile(p, flags) for p in file.shows]
        self._lacks = [re.compile(p, flags) for p in file.lacks]

    def grade(self, prompt: str, completion: str) -> Grade:
        """The grade, with the text that decided it."""
        text = completion.replace("’", "'")
        shows, lacks = _first(self._shows, text), _first(self._lacks, text)
        if shows is not None and lacks is not None:
            return Grade("unclear", reason=f"{shows!r} and {lacks!r}")
        if shows is not None:
            return Grade("shows", reason=shows)
        if lacks is not None:
            return Grade("lacks", reason=lacks)
        return Grade("unclear") if self._lacks else Grade("lacks")

    def usd(self, input_tokens: int, output_tokens: int) -> float | None:
        """Nobody charges."""
        return None


def _first(patterns: list[re.Pattern[str]], text: str) -> str | None:
    return next((match[0] for pattern in patterns if (match := pattern.search(text))), None)
