"""The commands and the code of the pages for users, as they stand there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["PAGES", "Block", "Command", "blocks", "commands"]

ROOT = Path(__file__).parents[2]
GENERATED = ("api.md", "api-grpc.md", "log.md")
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in GENERATED),
)
_PROGRAMS = ("trimtab", "make", "openssl", "docker", "kubectl", "helm", "vllm", "nsys", "pip", "git", "python", "curl")
_METHODS = ("GET", "PUT", "POST", "DELETE")
_INLINE = re.compile(r"`((?:trimtab|make|pip install) [^`]+)`")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Command(NamedTuple):
    """One command line."""

    page: str
    text: str
    inline: bool = False
    """It stands in a sentence, perhaps without all that it needs."""

    @property
    def words(self) -> list[str]:
        """The program, or the method, and the rest."""
        return self.text.split()

    @property
    def is_route(self) -> bool:
        """Whether it is a request rather than a program."""
        return self.words[0] in _METHODS


class Block(NamedTuple):
    """A fenced block."""

    page: str
    language: str
    text: str


def commands() -> Iterator[Command]:
    """Those that stand in lines of their own, and those within sentences."""
    for page in PAGES:
        text = page.read_text()
        prose = _FENCE.sub("", text)
        shell = [block for language, block in _FENCE.findall(text) if language in ("sh", "bash", "console")]
        lines = [line[4:] for line in _joined(prose) if line.startswith("    ") and not line.startswith("     ")]
        for line in [*lines, *(line for block in shell for line in _joined(block))]:
            for part in re.split(r";\s+", line):
                command = _without_remark(part)
                if _is_command(command):
                    yield Command(page.name, command)
        for found in _INLINE.findall(prose):
            yield Command(page.name, " ".join(found.split()), inline=True)


def blocks(language: str) -> list[Block]:
    """The fenced blocks of a language."""
    return [
        Block(page.name, language, text)
        for page in PAGES
        for found, text in _FENCE.findall(page.read_text())
        if found == language
    ]


def _joined(text: str) -> list[str]:
    return re.sub(r"\\\n\s*", "", text).splitlines()


def _without_remark(line: str) -> str:
    """The command in front of what is said about it: a remark stands two spaces or more behind."""
    line = line.strip()
    if line.startswith(_METHODS):
        return " ".join(line.split()[:2])
    return re.split(r"\s{2,}(?![\s-]|[a-z]\S*\.(?:toml|jsonl|safetensors)\b)|\s+# ", line)[0]


def _is_command(part: str) -> bool:
    words = part.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return bool(words) and (words[0] in _PROGRAMS or (words[0] in _METHODS and len(words) > 1 and words[1][0] == "/"))
