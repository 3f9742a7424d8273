"""Classifiers that come whole in a package: their score, and two thresholds that make a verdict of it.

`shows` and `lacks` are scores: on the far side of `shows`, as seen from `lacks`, the behaviour is there; on the far side of
`lacks` it is not; between them it is unclear. `shows = -0.3, lacks = 0.3` looks for gloom, the other way about for cheer.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab.attribution.errors import GraderError
from trimtab.attribution.graders.grade import Grade

__all__ = ["Profanity", "ProfanityFile", "Vader", "VaderFile"]


class _Thresholds(BaseModel):
    model_config = ConfigDict(extra="forbid")

    shows: float = Field(allow_inf_nan=False)
    lacks: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.shows == self.lacks:
            raise ValueError(
                "`shows` and `lacks` are the same score; which side shows the behaviour is told by their order"
            )
        return self


class VaderFile(_Thresholds):
    """A grader file of `kind = "vader"`: VADER's compound score, −1 (gloomy) to 1 (cheerful)."""

    kind: Literal["vader"]


class ProfanityFile(_Thresholds):
    """A grader file of `kind = "profanity"`: a linear classifier's probability, 0 to 1."""

    kind: Literal["profanity"]


class _Scored:
    """Turns a score into a grade."""

    n_parallel = 1

    def __init__(self, file: _Thresholds, name: str, digest: str) -> None:
        self.name, self.digest, self._file = name, digest, file

    def _grade(self, score: float) -> Grade:
        shows, lacks = self._file.shows, self._file.lacks
        if (score >= shows) if shows > lacks else (score <= shows):
            return Grade("shows", score)
        if (score <= lacks) if shows > lacks else (score >= lacks):
            return Grade("lacks", score)
        return Grade("unclear", score)

    def usd(self, input_tokens: int, output_tokens: int) -> float | None:
        """Nobody charges."""
        return None


class Vader(_Scored):
    """Sentiment of the completion, by a lexicon with rules for negation and emphasis (Hutto and Gilbert 2014)."""

    def __init__(self, file: VaderFile, name: str, digest: str) -> None:
        super().__init__(file, name, digest)
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ModuleNotFoundError as e:
            raise GraderError("the grader vader needs a package: pip install vaderSentiment") from e
        self._analyzer: Any = SentimentIntensityAnalyzer()

    def grade(self, prompt: str, completion: str) -> Grade:
        """The grade, with the compound score."""
        return self._grade(round(float(self._analyzer.polarity_scores(completion)["compound"]), 4))


class Profanity(_Scored):
    """Probability that the completion is profane."""

    def __init__(self, file: ProfanityFile, name: str, digest: str) -> None:
        super().__init__(file, name, digest)
        try:
            from profanity_check import predict_prob
        except ModuleNotFoundError as e:
            raise GraderError("the grader profanity needs a package: pip install 'trimtab[profanity]'") from e
        self._predict: Any = predict_prob

    def grade(self, prompt: str, completion: str) -> Grade:
        """The grade, with the probability."""
        return self._grade(round(float(self._predict([completion])[0]), 4))
