"""What sharing the unedited prefix saves: `python -m tests.bench.sharing`.

Many requests on one long system prompt, each with a plan of its own that begins after it. Cache keys name the edits of their own
block, so the prompt is computed once; keyed by the whole plan, as a `cache_salt` of its hash would do, it is computed by each.
Both run on one engine, in turns, one new token each: the time is that of the prefill, CPU time that of all its processes.
"""

import argparse
import os
import statistics
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.cores import cpu_seconds
from tests.parity.cases import edit
from tests.parity.engine import Engine
from tests.parity.rows import bundles
from trimtab.server.engine.proof import KEY, verify
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

SHARED, OWN = 480, 24
"""Tokens of the system prompt, and of each request's own text."""
KEYS = ("by block", "by plan")
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    engine = Engine(max_model_len=1024, max_num_batched_tokens=512)
    asked = [(prompt(i), plan(i)) for i in range(args.requests)]
    found: dict[str, list[tuple[float, float, int]]] = {key: [] for key in KEYS}
    for _ in range(args.rounds):
        for key in KEYS:
            found[key].append(run(engine, asked, key))
    table = Table("keyed", "prompt tokens computed", "seconds", "CPU seconds")
    medians = {key: [statistics.median(column) for column in zip(*rows, strict=True)] for key, rows in found.items()}
    for key, (seconds, cpu, computed) in medians.items():
        table.add_row(key, f"{computed:.0f} of {args.requests * (SHARED + OWN)}", f"{seconds:.2f}", f"{cpu:.2f}")
    ratios = [a / b for a, b in zip(medians["by plan"], medians["by block"], strict=True)]
    table.add_row("ratio", f"{ratios[2]:.1f}", f"{ratios[0]:.1f}", f"{ratios[1]:.1f}")
    console.print(table)
    engine.close()
    return 0


def plan(i: int) -> Plan:
    """A plan that no other request has, on the completion."""
    wanted = edit("add", 20.0 + i, scope="completion")
    return compile_plan(parse_steering({"edits": [wanted]}), bundles())


def prompt(i: int) -> list[int]:
    """The system prompt, and a text that no other request has."""
    return [*(100 + t % 400 for t in range(SHARED)), *(600 + (i + t) % 300 for t in range(OWN))]


def run(engine: Engine, asked: list[tuple[list[int], Plan]], key: str) -> tuple[float, float, int]:
    """Seconds, CPU seconds and computed prompt tokens of all requests: one first, then the others together."""
    from vllm import SamplingParams

    engine.cold()
    computed, started, cpu = 0, time.monotonic(), cpu_seconds(os.getpid())
    for part in (asked[:1], asked[1:]):
        salt = [{"cache_salt": wanted.hash} if key == "by plan" else {} for _, wanted in part]
        prompts: Any = [{"prompt_token_ids": p} | s for (p, _), s in zip(part, salt, strict=True)]
        params = [SamplingParams(max_tokens=1, extra_args={KEY: wanted.wire()}) for _, wanted in part]
        for output, (p, wanted) in zip(engine.llm.generate(prompts, params, use_tqdm=False), part, strict=True):
            verify(wanted, (output.kv_transfer_params or {}).get(KEY), len(p), [1])
            computed += len(p) - (output.num_cached_tokens or 0)
    return time.monotonic() - started, cpu_seconds(os.getpid()) - cpu, computed


if __name__ == "__main__":
    sys.exit(main())
