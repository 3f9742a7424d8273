"""The soak (`make soak`): thousands of random requests against one real server, and nothing left of them at the end.

Edits of the whole language, generated and by hand; streams; several samples; stop strings; grammars; log-probabilities; clients
that go away; what is refused; a bundle that is loaded, replaced and removed meanwhile; a small KV cache. Every reply must prove
its plan; every greedy answer must be the same whenever it is given, and the one that an idle server gives. At the end the workers
must hold no request, slot or gate, the mismatch counter must be 0 and memory flat.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.soak.memory import Memory, processes
from tests.soak.replies import Ledger, Refusal, Reply, read_stream, read_whole
from tests.soak.traffic import LONGEST, MOVING, MOVING_STEERING, Ask, draw, moving, served
from trimtab.attribution.bundle import ModelIdentity
from trimtab.attribution.model import identify
from trimtab.server.plan import compile_plan
from trimtab.server.steering import parse_steering

MODEL = "smollm2-135m-instruct"
OUT = Path("build/soak.json")
SEQUENCES = 16
ENGINE = {
    "dtype": "float32",
    "max-model-len": 256,
    "max-num-seqs": SEQUENCES,
    "max-num-batched-tokens": 96,
    "block-size": 32,
    # 20 usable blocks for 16 requests of up to 8.
    "num-gpu-blocks-override": 21,
}
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""glibc gives tensors of a megabyte back when they are freed. By default it learns to keep even those of logits, and resident
memory then grows by one of them, 18 MiB, whenever one more is alive at once or a hole is too small: by what was used, not by what
is held."""
FLAT_MIB = 16.0
"""Per 1,000 requests, over the second half: more is a leak."""
FIRST = 1000
"""Requests until memory has settled: a shorter soak is not judged by it."""
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Runs the soak, prints what was found, writes it as JSON; 1 when anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15.0, help="send no more after so many")
    parser.add_argument("--alone", type=int, default=60, help="greedy answers that are asked for again, one by one")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    model = identify(MODEL)[0]
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder), model) as (pid, url):
        found = asyncio.run(_soak(args, model, pid, url))
    found |= {"seed": args.seed, "commit": _commit(), "cpus": os.cpu_count()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    _print(found)
    return 1 if found["wrong"] else 0


@contextlib.contextmanager
def _server(folder: Path, model: ModelIdentity) -> Iterator[tuple[int, str]]:
    """The pid and address of a server with the pool's bundles, ended at the end."""
    bundles = []
    for name, bundle in served(model).items():
        bundle.save(folder / f"{name}.tt")
        bundles += ["--bundle", str(folder / f"{name}.tt")]
    flags = [part for name, value in ENGINE.items() for part in (f"--{name}", str(value))]
    trimtab = Path(sys.executable).with_name("trimtab")
    command = [str(trimtab), "serve", MODEL, "--port", "0", "--allow-bundle-upload", *bundles, "--", *flags]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | RETURNED, start_new_session=True
        )
    try:
        while not (match := re.search(r"serving \S+ on (http://\S+)", log.read_text(errors="replace"))):
            if process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)
        yield process.pid, match[1]
        process.send_signal(signal.SIGTERM)
        code, text = process.wait(60), log.read_text(errors="replace")
        before, raised, after = text.partition("Traceback")
        if code != 0 or raised:
            told = before[-1000:] + raised + after[:4000] if raised else text[-4000:]
            raise SystemExit(f"the server ended with {code}:\n{told}")
    except httpx.HTTPError as e:
        ended = "still runs" if process.poll() is None else f"has ended with {process.returncode}"
        e.add_note(f"The server {ended}. Its last words:\n{log.read_text(errors='replace')[-4000:]}")
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


async def _soak(args: argparse.Namespace, model: ModelIdentity, pid: int, url: str) -> dict[str, Any]:
    rng, ledger, memory = random.Random(args.seed), Ledger(), Memory(processes(pid))
    versions = {}
    for bundle in moving(model):
        plan = compile_plan(parse_steering(MOVING_STEERING), {MOVING: bundle})
        versions[plan.hash] = plan
    asks = iter([draw(rng, MODEL, model) for _ in range(args.requests)])
    started = time.monotonic()
    limits = httpx.Limits(max_connections=None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("soak", total=args.requests)

            async def work() -> None:
                for ask in asks:
                    if time.monotonic() - started > 60 * args.minutes:
                        return
                    ledger.enter(ask, await _send(client, ask), versions)
                    if ledger.n_answered % 10 == 0:
                        memory.sample(ledger.n_answered)
                    wrong = f", {len(ledger.wrong)} wrong" if ledger.wrong else ""
                    progress.update(task, completed=ledger.n_answered, description=f"soak{wrong}")

            mover = asyncio.create_task(_move(client, model, random.Random(args.seed + 1)))
            await asyncio.gather(*(work() for _ in range(SEQUENCES + 8)))
            mover.cancel()
            seconds = time.monotonic() - started
        changes = await mover
        await _idle(client, len(served(model)))
        n_answered = ledger.n_answered
        memory.sample(n_answered)
        n_alone = await _alone(client, ledger, rng, args.alone)
        metrics = (await client.get("/metrics")).text
        (report,) = (await client.get("/v1/steering/workers")).json()["data"]
    in_use = {name: report[name] for name in ("requests", "slots", "gates")}
    mismatches = _metric(metrics, "trimtab_steering_mismatch_total")
    growth = memory.growth()
    wrong = list(ledger.wrong)
    if n_answered < args.requests:
        wrong.append(f"only {n_answered} requests in {args.minutes} minutes")
    if any(in_use.values()) or mismatches:
        wrong.append(f"left in the worker: {in_use}; mismatches: {mismatches}")
    kept = {bundle.content_hash for bundle in served(model).values()}
    if set(report["bundles"]) != kept:
        wrong.append(f"the worker holds {len(report['bundles'])} bundles, and {len(kept)} are listed")
    if args.requests >= 2 * FIRST:
        wrong += [f"{g.name} grows by {g.slope:.1f} MiB per 1,000 requests" for g in growth if g.slope > FLAT_MIB]
    return {
        "requests": n_answered,
        "seconds": round(seconds),
        "endings": dict(sorted(ledger.kinds.items())),
        "completion_tokens": ledger.n_tokens,
        "greedy_answers": len(ledger.greedy),
        "asked_again_alone": n_alone,
        "bundle_changes": changes,
        "preemptions": _metric(metrics, "vllm:num_preemptions_total"),
        "mismatches": mismatches,
        "in_use": in_use,
        "memory": [g._asdict() for g in growth],
        "samples": memory.samples[:: max(1, len(memory.samples) // 40)],
        "wrong": wrong,
    }


async def _send(client: httpx.AsyncClient, ask: Ask) -> Reply | Refusal | None:
    if not ask.body["stream"]:
        try:
            # A client that does not wait for its reply.
            async with asyncio.timeout(ask.leave_after):
                return read_whole(await client.post("/v1/completions", json=ask.body))
        except TimeoutError:
            return None
    async with client.stream("POST", "/v1/completions", json=ask.body) as response:
        if response.status_code != 200:
            await response.aread()
            return read_whole(response)
        return await read_stream(response.aiter_lines(), ask.leave_after)


async def _move(client: httpx.AsyncClient, model: ModelIdentity, rng: random.Random) -> int:
    """How many times the moving bundle was loaded, replaced or removed, until cancelled; then it is gone."""
    versions = [bundle.to_bytes() for bundle in moving(model)]
    octets = {"content-type": "application/octet-stream"}
    n, path = 0, f"/v1/steering/bundles/{MOVING}"
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(rng.uniform(0.2, 2.0))
            if rng.random() < 0.15:
                await client.delete(path)
            else:
                url = "/v1/steering/bundles?replace=true"
                (await client.post(url, content=rng.choice(versions), headers=octets)).raise_for_status()
            n += 1
    await client.delete(path)
    return n


async def _alone(client: httpx.AsyncClient, ledger: Ledger, rng: random.Random, n: int) -> int:
    """Ask an idle server, one by one, for greedy answers that were given in the crowd."""
    chosen = rng.sample(sorted(ledger.asked), min(n, len(ledger.asked)))
    for key in chosen:
        ask = ledger.asked[key]
        again = ask._replace(body=ask.body | {"max_tokens": LONGEST, "stream": False})
        ledger.enter(again, await _send(client, again), {})
    return len(chosen)


async def _idle(client: httpx.AsyncClient, n_bundles: int) -> None:
    """Until the engine has no request, and the rows of what was removed are gone."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        metrics = (await client.get("/metrics")).text
        (report,) = (await client.get("/v1/steering/workers")).json()["data"]
        busy = _metric(metrics, "vllm:num_requests_running") + _metric(metrics, "vllm:num_requests_waiting")
        if not busy and not report["requests"] and len(report["bundles"]) == n_bundles:
            return
        await asyncio.sleep(0.5)


def _metric(text: str, name: str) -> int:
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in text.splitlines() if re.match(rf"{name}[{{ ]", line))


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _print(found: dict[str, Any]) -> None:
    for name in ("requests", "seconds", "completion_tokens", "greedy_answers", "asked_again_alone", "bundle_changes"):
        console.print(f"{name.replace('_', ' ')}: {found[name]}")
    for name, n in found["endings"].items():
        console.print(f"    {name}: {n}")
    console.print(f"preemptions: {found['preemptions']}; mismatches: {found['mismatches']}; in use: {found['in_use']}")
    for g in found["memory"]:
        at = f"{g['at_half']:.0f} MiB at half, {g['at_end']:.0f} at the end"
        console.print(f"memory of {g['name']}: {at}, {g['slope']:+.1f} MiB per 1,000 requests")
    for line in found["wrong"][:20]:
        console.print(f"WRONG {line}")
    console.print("nothing was wrong" if not found["wrong"] else f"{len(found['wrong'])} things were wrong")


if __name__ == "__main__":
    sys.exit(main())
