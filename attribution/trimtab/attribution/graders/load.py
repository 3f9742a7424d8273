"""From what a person names to a grader."""

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from trimtab.attribution.errors import GraderError
from trimtab.attribution.graders.classifiers import Profanity, ProfanityFile, Vader, VaderFile
from trimtab.attribution.graders.functions import Function
from trimtab.attribution.graders.grade import Grader
from trimtab.attribution.graders.judge import Judge, JudgeFile
from trimtab.attribution.graders.patterns import Patterns, PatternsFile

__all__ = ["load_grader"]

_File = TypeAdapter[JudgeFile | VaderFile | ProfanityFile | PatternsFile](
    Annotated[JudgeFile | VaderFile | ProfanityFile | PatternsFile, Field(discriminator="kind")]
)


def load_grader(source: str) -> Grader:
    """The grader of a TOML file, or the Python function `module:function`.

    Raises:
        GraderError: neither, or not a whole one; the message says what is wrong with it.
    """
    if not source.endswith(".toml"):
        if ":" not in source:
            raise GraderError(f"{source!r} is no grader; give a .toml file, or a Python function as module:function")
        return Function.load(source)
    path = Path(source)
    try:
        data = path.read_bytes()
        file = _File.validate_python(tomllib.loads(data.decode()))
    except OSError as e:
        raise GraderError(f"cannot read grader {path}: {e.strerror}; check the path") from e
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise GraderError(f"grader {path}, {where}: {first['msg']}; docs/validation.md lists the fields") from e
    except ValueError as e:
        raise GraderError(f"grader {path} is no TOML: {e}; mend that line") from e
    name, digest = path.stem, "sha256:" + hashlib.sha256(data).hexdigest()
    match file:
        case JudgeFile():
            return Judge(file, name, digest)
        case VaderFile():
            return Vader(file, name, digest)
        case ProfanityFile():
            return Profanity(file, name, digest)
        case PatternsFile():
            return Patterns(file, name, digest)
