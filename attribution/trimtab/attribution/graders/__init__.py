"""Graders: whether a completion shows the behaviour, lacks it, or is unclear. No torch: the server may grade too.

`load_grader` reads one from a TOML file, whose `kind` says how it judges, or takes a Python function by `module:function`:

    kind = "judge"        an LLM at any OpenAI-compatible endpoint, with a rubric                 `judge`
    kind = "vader"        sentiment, −1 to 1, by the lexicon of the package vaderSentiment        `classifiers`
    kind = "profanity"    probability of profanity, by the classifier of alt-profanity-check      `classifiers`
    kind = "regex"        regular expressions                                                     `patterns`
    module:function       (prompt, completion) → a Grade, a verdict, or a truth value             `functions`

A grader's digest names what it does: a run that is started again grades again only what another grader graded.
"""

from trimtab.attribution.errors import GraderError
from trimtab.attribution.graders.grade import Grade, Grader, Verdict, coherent
from trimtab.attribution.graders.load import load_grader

__all__ = ["Grade", "Grader", "GraderError", "Verdict", "coherent", "load_grader"]
