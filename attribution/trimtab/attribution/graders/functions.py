"""A Python function as a grader."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from trimtab.attribution.errors import GraderError
from trimtab.attribution.graders.grade import VERDICTS, Grade

__all__ = ["Function"]


class Function:
    """`module:function`, called as (prompt, completion); it gives a `Grade`, a verdict, or whether the behaviour shows."""

    n_parallel = 1

    def __init__(self, name: str, function: Callable[[str, str], Any], digest: str) -> None:
        self.name, self._function, self.digest = name, function, digest

    @classmethod
    def load(cls, name: str) -> Self:
        """Import it, the current folder included; the digest is that of its file.

        Raises:
            GraderError: there is no such module or function.
        """
        module_name, _, attribute = name.partition(":")
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)
        try:
            function = getattr(importlib.import_module(module_name), attribute)
            file = inspect.getsourcefile(function)
        except (ImportError, AttributeError, TypeError, ValueError) as e:
            raise GraderError(f"there is no grader {name!r} ({e}); give an importable module:function") from e
        source = Path(file).read_bytes() if file is not None else b""
        return cls(name, function, "sha256:" + hashlib.sha256(source + name.encode()).hexdigest())

    def grade(self, prompt: str, completion: str) -> Grade:
        """The grade that the function gives.

        Raises:
            GraderError: it raised, or gave something that is no grade.
        """
        try:
            found = self._function(prompt, completion)
        except Exception as e:
            raise GraderError(f"grader {self.name} failed on {completion[:60]!r}: {e!r}; mend the function") from e
        match found:
            case Grade():
                return found
            case bool():
                return Grade("shows" if found else "lacks")
            case str() if found in VERDICTS:
                return Grade(found)
        raise GraderError(
            f"grader {self.name} gave {found!r}; give a Grade, a truth value, or one of {', '.join(VERDICTS)}"
        )

    def usd(self, input_tokens: int, output_tokens: int) -> float | None:
        """Nobody charges."""
        return None
