"""Tiny models on real engines, one engine after another in this process; each finding is a line of JSON.

python -m tests.parity.architectures gpt2 cohere        these architectures beside transformers: see `compare`
python -m tests.parity.architectures --refusals        what engines are told whose layers are not known: see `refusals`
python -m tests.parity.architectures --lora        an adapter beside steering: see `lora`
python -m tests.parity.architectures --write        all that build/architectures.jsonl lacks, then docs/architectures.md anew
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

_KEPT = Path("build/architectures.jsonl")

_parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
_parser.add_argument("names", nargs="*")
_parser.add_argument("--refusals", action="store_true")
_parser.add_argument("--lora", action="store_true")
_parser.add_argument("--write", action="store_true")


def main() -> None:
    given = _parser.parse_args()
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    from tests.parity.architectures import lora, refusals, table
    from tests.parity.architectures.compare import compare
    from tests.parity.architectures.zoo import ZOO

    if given.refusals:
        _say("REFUSALS", refusals.refusals())
    if given.lora:
        _say("LORA", lora.lora()._asdict())
    for name in given.names:
        _say("FOUND", compare(name)._asdict())
    if given.write:
        kept = [json.loads(line) for line in _KEPT.read_text().splitlines()] if _KEPT.exists() else []
        _KEPT.parent.mkdir(exist_ok=True)
        for name in ZOO.keys() - {found["name"] for found in kept}:
            found = compare(name)._asdict()
            kept.append(found)
            with _KEPT.open("a") as out:
                out.write(json.dumps(found) + "\n")
        table.write(kept)


def _say(what: str, found: Any) -> None:
    sys.stdout.write(f"\n{what} {json.dumps(found)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
