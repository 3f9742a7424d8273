"""The table of docs/architectures.md, from findings."""

from pathlib import Path
from typing import Any

from trimtab.server.engine.kinds import KINDS

__all__ = ["write"]

PAGE = Path("docs/architectures.md")
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def write(findings: list[dict[str, Any]]) -> None:
    """Put the table of these findings between the page's marks."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + _table(findings) + END + after)


def _table(findings: list[dict[str, Any]]) -> str:
    rows = [
        "| architecture | decoder layers in vLLM | kind | measured | tokens | max \\|Δ log-prob\\| | least effect |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in sorted(findings, key=lambda found: str(found["architecture"]).lower()):
        parity = f"{'same' if found['same'] else 'DIFFERENT'} | {found['error']:.1e} | {found['effect']:.1e}"
        for name, kinds in found["measured"].items():
            where = name.removeprefix("vllm.model_executor.models.").removeprefix("transformers.models.")
            rows.append(
                f"| {found['architecture']} | `{where}` | {KINDS[name]} | {', '.join(map(str, kinds))} | {parity} |"
            )
    return "\n".join(rows) + "\n"
