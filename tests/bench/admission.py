"""What a plan costs before the first token, and how soon an uploaded bundle steers."""

import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.bench.conditions import D_MODEL, LAYER, N_LAYERS, all_bundles, authored, bundle
from trimtab.attribution.embedded import EMBEDDED_MODEL, model_path
from trimtab.client import Steering, Trimtab
from trimtab.server.engine import bundles as engine_bundles
from trimtab.server.engine.admission import refusal
from trimtab.server.engine.bundles import Loaded
from trimtab.server.engine.edit_state import EditState
from trimtab.server.engine.tables import Tables
from trimtab.server.engine.wire import decode
from trimtab.server.service.admission import admit

__all__ = ["plan_milliseconds", "upload_seconds"]

N_UPLOADS = 9


def plan_milliseconds(edits: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Median CPU milliseconds of admitting a plan that nobody has seen: in the service (parsed, validated, compiled, written to
    the wire), in the engine's front end (decoded, checked against the engine), in the worker (decoded, resolved, folded)."""
    from vllm.engine.arg_utils import EngineArgs  # here, because the engines' processes import this module too

    tables = Tables(torch.device("cpu"), 4096)
    for loaded in all_bundles().values():
        tables.load(loaded)
        known = Loaded(loaded.header.name, loaded.header.layer, D_MODEL, len(loaded.header.latents), 0)
        engine_bundles._loaded[loaded.content_hash] = known
    state = EditState(list(range(N_LAYERS)), tables)
    config = EngineArgs(model=str(model_path()), dtype="float32", enforce_eager=True).create_engine_config()
    found = {}
    gc.collect()
    gc.freeze()  # as the service and the engine do once they have started
    for edit in (*edits, "64 latents"):
        service, front, worker, wires = [], [], [], []
        for which in range(200):
            body = {"model": "m", "prompt": "hi", "steering": _steering(edit, which)}
            start = time.thread_time()
            admission = admit(body, fields={"model", "prompt"}, models=("m",), bundles=all_bundles())
            compiled = time.thread_time()
            wire = admission.body["vllm_xargs"]["trimtab"]
            if (reason := refusal(wire, config)) is not None:
                raise RuntimeError(reason)
            checked = time.thread_time()
            service.append(1e3 * (compiled - start))
            front.append(1e3 * (checked - compiled))
            wires.append(wire)
        for wire in wires:  # by themselves: the worker is another process
            decode.cache_clear()
            start = time.thread_time()
            state.arrive("r", wire, 8)
            state.prepare(["r"], [8], [1])
            worker.append(1e3 * (time.thread_time() - start))
            state.finish(["r"])
        totals = [sum(each) for each in zip(service, front, worker, strict=True)]
        parts = {"service": service, "engine": front, "worker": worker, "total": totals}
        found[edit] = {name: statistics.median(values) for name, values in parts.items()}
    return found


def _steering(edit: str, which: int) -> dict[str, Any]:
    if edit != "64 latents":
        return authored(edit, which)
    one = {"operation": "clamp", "target": 1.0 + which / 256}
    return {"edits": [one | {"bundle": f"l{layer}", "latent": i} for layer in range(8) for i in range(8)]}


def upload_seconds(say: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds from the bytes of a bundle of 100 latents, which the server has never seen, to the first token steered by it:
    on an idle server, and beside eight streams."""
    from trimtab.attribution.model import identify

    identity = identify(EMBEDDED_MODEL)[0]

    def fresh(seed: int) -> tuple[str, bytes]:
        made = bundle(LAYER, name=f"b{seed}", n_latents=100, seed=seed)
        made.header = made.header.model_copy(update={"model": identity})
        return made.header.name, made.to_bytes()

    with _server() as url, Trimtab(url, max_retries=0) as client:
        ask: dict[str, Any] = {"model": EMBEDDED_MODEL, "prompt": "The sea is", "temperature": 0}

        def first_token(name: str, data: bytes) -> float:
            start = time.perf_counter()
            client.steering.load(data)
            stream = client.completions.create(max_tokens=2, stream=True, steering=Steering(bundle=name), **ask)
            next(iter(chunk for chunk in stream if chunk.choices and chunk.choices[0].text))
            took = time.perf_counter() - start
            stream.close()
            client.steering.unload(name)
            return took

        client.completions.create(max_tokens=4, **ask)
        say("uploads to an idle server")
        idle = [first_token(*fresh(seed)) for seed in range(N_UPLOADS)]
        done = threading.Event()

        def stream_on() -> None:
            with Trimtab(url, max_retries=0) as other:
                while not done.is_set():
                    chunks = other.completions.create(
                        max_tokens=200, stream=True, extra_body={"ignore_eos": True}, **ask
                    )
                    for _ in chunks:
                        if done.is_set():
                            break
                    chunks.close()

        threads = [threading.Thread(target=stream_on) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(3)
        say("uploads beside eight streams")
        busy = [first_token(*fresh(100 + seed)) for seed in range(N_UPLOADS)]
        done.set()
        for thread in threads:
            thread.join()
    return {"idle": idle, "beside 8 streams": busy}


@contextmanager
def _server() -> Iterator[str]:
    trimtab = Path(sys.executable).with_name("trimtab")
    flags = ["--", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [str(trimtab), "serve", EMBEDDED_MODEL, "--port", "0", "--allow-bundle-upload", *flags],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in os.environ.items() if k != "TRIMTAB_API_KEY"},
            )
        try:
            while not (match := re.search(r"serving \S+ on (http://\S+)", log.read_text(errors="replace"))):
                if process.poll() is not None:
                    raise SystemExit(log.read_text(errors="replace")[-3000:])
                time.sleep(0.2)
            yield match[1]
        finally:
            process.terminate()
            process.wait(60)
