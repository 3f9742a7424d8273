"""docs/benchmarks.md, written from the results: `python -m tests.bench --document`."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from tests.bench.conditions import ALONE, CELLS
from tests.bench.report import flatness, markdown, ratios, spread
from tests.bench.within import Step

__all__ = ["document"]

BARS = {"idle": 0.995, "add": 0.985, "clamp8": 0.975, "add30": 0.965}
"""Least ratio to plain vLLM, of turns-16."""
MILLISECONDS, SECONDS, FLAT = 2.0, 1.0, 0.03

_HEAD = """# What steering costs

Written by `python -m tests.bench --document` from [benchmarks.json](benchmarks.json), which `make bench` measures; do not edit.

| | |
|---|---|
{machine}

## How

- Every engine is resident in processes of its own: plain vLLM (no plugin) **twice**, vLLM with Trimtab, vLLM with vllm-lens,
  and a transformers loop over a static batch with forward hooks. One works at a time (`others' CPU` is what the rest uses
  meanwhile).
- **In turns** (`turns-16`, `turns-64`, which are held against the bars): the runs of a group are begun together, and each
  engine's processes are stopped while another has its tenth of a second. A run takes seconds, and from one run to the next this
  machine differs by a tenth; from one turn to the next, by little. Two processes of one program differ for as long as they live,
  so Trimtab is there twice as well. In `turns-16` both of each run at once, and a round's ratio is of their means; of several
  plans each runs on both by turns. After two rounds all engines are started anew.
  Elsewhere the runs of a round follow each other, and ratios of a few rounds say no more than the two plain runs do.
- **Within one process** (`within`): a bar is not about what two processes differ by. One engine of ours, one process and one
  thread for all of it, lets the plugin step aside for four steps and work for four: the runner's own methods and no hooks,
  against all that is ours. The first two steps of a turn are left out; two steered ones are held against the plain ones before
  and after, by their CPU time. The model's forward and logits are most of a step and scatter with the machine's memory; what is
  around them does not, and is told apart.
- All serve SmolLM2-135M-Instruct in fp32, the vLLMs with the same flags: eager, 64 sequences, 1024 tokens, statistics on, and
  tcmalloc where it is installed, as vLLM's documentation asks on a CPU. A step runs 30 hooked layers.
- A round runs every condition once, in an order that rotates and turns round, on prompts of the same shape that no other run has,
  so that nothing comes out of the prefix cache. Greedy, the end of text ignored: each request makes exactly its number of tokens.
  All requests of a run are in its first step. vLLM's worker has a core of its own, and everybody else keeps off it: libgomp does
  not bind a lone thread, so that else the worker shares a core with whoever polls.
- The memory of the process that runs the model is gathered into huge pages before it is timed, where the benchmark may
  (CAP_SYS_NICE, which root has): a step reads all weights, and the first engine to start was given worse pages than the last,
  which made it 2.5 % slower, whichever it was.
- **Wall ratio**: the mean of the two plain runs of a round over the condition's run in the same round; above 1 is faster than
  plain vLLM. **Worker CPU ratio**: the same of the CPU seconds of the process that runs the model, from the kernel's own account:
  its polling counts and what others take of the machine does not, so that they disturb it less. Medians over the rounds, smallest
  and largest in brackets. What was measured and stopped, and what differs between processes: [the log](log.md).
- `plain` and `plain again` are two processes of one program, each over the other: what they differ by, nothing below resolves.
- `idle`: plugin on, no request steered. `one add`: all requests share a plan. All others: **every request its own plan**.
  `clamp8`: eight latents read and clamped at one layer; `gated`: an add that applies where another latent fires; `add30`: adds at
  all 30 layers. Edits cover all positions. vllm-lens and transformers make the same edits: vllm-lens by its steering vectors, and
  by a hook for `clamp8`, which it has no vector for; transformers by a hook that edits the batch at once, on both cores, where
  vLLM's worker computes on one and leaves the other to its own front end.
- **Calls** (`calls`): how many functions, Python's and built-in, a decode step calls in such a process, by Python's profiler, and
  in plain vLLM's, with the plugin (`aside` is what is left of it in `within`) and without. No time, but exact: what an idle
  engine does not call, it does not pay for, and two processes that run the same forward, call by call, still differ in time by
  what memory each was given.
- Admission of a plan and what is added to a step are CPU time of the one thread that does it: near what it takes where nobody
  disturbs; other processes still cool its caches.
- Every steered reply's proof was checked. Random rows: what an edit costs does not depend on what it means.
"""


def document(results: dict[str, Any]) -> str:
    """The page."""
    table = {
        "commit": _by(results, lambda by: f"`{by['commit']}`"),
        "machine": _by(results, lambda by: _hardware(by["machine"])),
        "versions": _by(results, lambda by: _versions(by["machine"])),
        "load average at the end": ", ".join(f"{x:.1f}" for x in results.get("load_average", ())),
    }
    head = _HEAD.format(machine="\n".join(f"| {name} | {value} |" for name, value in table.items()))
    done = {name: len(cell["rounds"]) for name, cell in results["cells"].items()}
    missing = [name for name, cell in CELLS.items() if done.get(name, 0) < cell.n_entries]
    missing += [name for name in ALONE if name not in results]
    if missing:
        head += f"\n**Not measured yet, or not in full**: {', '.join(missing)}. `make bench` on a quiet machine adds them.\n"
    body = f"{head}\n## Against the bars\n\n{_bars(results)}\n{_same(results)}\n## All of it\n\n{markdown(results)}"
    return body.rstrip() + "\n"


def _by(results: dict[str, Any], told: Callable[[dict[str, Any]], str]) -> str:
    """Where and of what the cells were measured: of which ones, where it is not the same for all."""
    found: dict[str, list[str]] = {}
    for name, by in results["by"].items():
        found.setdefault(told(by), []).append(name)
    return "; ".join(found if len(found) == 1 else (f"{what}: {', '.join(names)}" for what, names in found.items()))


def _hardware(machine: dict[str, Any]) -> str:
    malloc, pages = machine.get("malloc", "glibc's malloc"), machine.get("pages", "pages as the kernel gave them")
    return f"{machine['cpu']}, {machine['n_cpus']} cores; {machine['os']}; {malloc}; {pages}"


def _versions(machine: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {number}" for name, number in (machine["versions"] | {"Python": machine["python"]}).items()
    )


def _bars(results: dict[str, Any]) -> str:
    lines = ["| | bar | wall | worker CPU |", "|---|---:|---:|---:|"]
    cell = results["cells"].get("turns-16", {"rounds": []})
    for condition, bar in BARS.items():
        wall, cpu = (ratios(cell["rounds"], condition, figure) for figure in ("seconds", "worker_cpu"))
        if wall:
            shown = f"{_judged(wall, bar)} | {_judged(cpu, bar)}"
            lines.append(f"| 16 × 64 tokens, {condition}, {len(wall)} rounds | ≥ {bar} | {shown} |")
            lens = ratios(cell["rounds"], f"vllm-lens {condition}", "seconds")
            if lens:
                lines.append(f"| the same by vllm-lens, {len(lens)} rounds | less | {_told(lens)} | |")
        if turns := results.get("within", {}).get(condition):
            pairs = [(Step(*plain), Step(*steered)) for plain, steered in turns]
            within = [sum(plain) / sum(steered) for plain, steered in pairs]
            lines.append(f"| the same within one process, {len(within)} turns | ≥ {bar} | | {_judged(within, bar)} |")
            if condition == "idle":
                around = [sum(plain) / (sum(plain) + steered.around - plain.around) for plain, steered in pairs]
                what = "the same by what is around the model, whose forward is plain's call for call"
                lines.append(f"| {what} | ≥ {bar} | | {_judged(around, bar)} |")
    if steps := results["cells"].get("turns-64"):
        for edit in ("add", "clamp8"):
            wall, cpu = (flatness(steps["rounds"], edit, figure) for figure in ("seconds", "worker_cpu"))
            if wall:
                lines.append(f"| 64 distinct plans over one, {edit} | ≤ {1 + FLAT} | {_under(wall)} | {_under(cpu)} |")
    if admission := results.get("admission"):
        for edit, parts in admission.items():
            admitted = parts["service"] + parts["engine"]
            met = "" if admitted <= MILLISECONDS else " ✗"
            what = f"a new plan of {edit}, validated and admitted, CPU, median"
            shown = f"{admitted:.2f} ms{met}; {parts['total']:.2f} with its rows folded in the worker"
            lines.append(f"| {what} | ≤ {MILLISECONDS} ms | {shown} | |")
    for name, values in results.get("upload", {}).items():
        took = statistics.median(values)
        met = "" if took <= SECONDS else " ✗"
        lines.append(
            f"| uploaded bundle to first steered token, {name}, median | ≤ {SECONDS} s | {took:.2f} s{met} | |"
        )
    return "\n".join(lines) + "\n\n✗ marks what misses its bar.\n"


def _judged(values: list[float], bar: float) -> str:
    return _told(values) + ("" if statistics.median(values) >= bar else " ✗")


def _told(values: list[float]) -> str:
    """Median, and the mean with its standard error, which says what the rounds can tell apart."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{statistics.median(values):.3f} (mean {statistics.mean(values):.3f} ± {error:.3f})"


def _under(values: list[float]) -> str:
    found = statistics.median(values)
    return spread(values) + ("" if found <= 1 + FLAT else " ✗")


def _same(results: dict[str, Any]) -> str:
    same = results.get("same_edit", {})
    if not same:
        return ""
    edits = sorted({edit for found in same.values() for edit in found})
    lines = [f"| | {' | '.join(edits)} |", f"|---{'|---:' * len(edits)}|"]
    for name, found in same.items():
        if name != "trimtab":
            lines.append(f"| {name} | " + " | ".join(f"{found.get(edit, 0):.0%}" for edit in edits) + " |")
    told = "Of the greedy tokens under the same strong edits, so many are Trimtab's; plain vLLM edits nothing, and must differ:"
    return f"### The same edit?\n\n{told}\n\n" + "\n".join(lines) + "\n"
