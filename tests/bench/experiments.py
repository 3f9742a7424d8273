"""What an experiment costs a request: `make bench-experiments`.

    assignment and exposure   milliseconds of one request, by itself: everything that the serving path does for an experiment
    replies                   time of a round of replies with the experiment paused over that with it running; 1 is free. Once
                              with the database free, and once with it locked by somebody else for the whole round

Both arms of the experiment do nothing, so that the engine's work is the same; rounds of the conditions take turns, and the order
rotates. At the end every reply of the running experiment must have been exposed.
"""

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import httpx
from prometheus_client import CollectorRegistry
from rich.console import Console

from tests.conftest import TRIMTAB, address
from trimtab.server.database.database import Database
from trimtab.server.experiments.exposures import Exposures
from trimtab.server.experiments.outcomes import Outcomes
from trimtab.server.experiments.store import Experiments
from trimtab.server.fleet.snapshot import read_snapshot
from trimtab.server.keys.key import ANONYMOUS
from trimtab.server.keys.secret import Secret
from trimtab.server.service.catalogue import Catalogue
from trimtab.server.service.enrolment import Enroller
from trimtab.server.service.grading import Graders
from trimtab.server.service.metrics import Metrics

MODEL = "smollm2-135m-instruct"
KEY = "aa"
DEFINITION = {
    "key": KEY,
    "hypothesis": "Nothing changes.",
    "unit": "user",
    "arms": [{"key": "a", "weight": 0.5}, {"key": "b", "weight": 0.5}],
    "aa": True,
    "primary": {"key": "harm", "outcome": "harm"},
    "minimum_effect": 0.1,
}
CONDITIONS = ("paused", "running", "running, database locked")
ME = {"actor": "bench", "reason": "a measurement"}
console = Console(highlight=False, soft_wrap=True)


def request_milliseconds(n: int) -> dict[str, float]:
    """Of one request: decided, and its exposure handed over, while a thread writes them to a real database."""
    with tempfile.TemporaryDirectory() as folder, closing(Database(f"sqlite:///{folder}/trimtab.db")) as database:
        database.migrate()
        experiments = Experiments(database)
        experiments.create(DEFINITION, **ME)
        experiments.change(KEY, "start", **ME)
        catalogue = Catalogue({}, fingerprint="")
        catalogue.snapshot = read_snapshot(database)
        exposures = Exposures(database)
        exposures.start()
        graders = Graders({}, Outcomes(database), exposures)
        enroller = Enroller(
            catalogue,
            exposures,
            graders,
            Metrics(CollectorRegistry()),
            digest=Secret("s" * 32).digest,
            is_stale=lambda: False,
        )
        took = []
        for i in range(n):
            document = {"model": MODEL, "prompt": "hi", "user": f"user-{i}"}
            start = time.perf_counter()
            enrolment = enroller.enrol(document, (MODEL,), caller=ANONYMOUS, headers={}, request_id=uuid4().hex)
            assert enrolment is not None
            enroller.expose(enrolment, "applied", n_fired=0)
            took.append(1e3 * (time.perf_counter() - start))
            time.sleep(0.0005)
        exposures.close()
    took.sort()
    return {"median": statistics.median(took), "p99": took[int(0.99 * n)]}


@contextmanager
def serving() -> Iterator[tuple[str, Path]]:
    """A server's address, and its database."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("TRIMTAB_") or k == "TRIMTAB_CACHE"}
        environment = kept | {"TRIMTAB_DATABASE": f"sqlite:///{folder / 'trimtab.db'}"}
        log = folder / "log"
        command = [str(TRIMTAB), "serve", MODEL, "--port", "0", "--", "--dtype", "float32", "--max-model-len", "512"]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            yield address(process, log), folder / "trimtab.db"
        finally:
            process.terminate()
            process.wait(90)


def reply_seconds(n_rounds: int, n_replies: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each round by condition, and the health of the experiment afterwards."""
    found: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
    with serving() as (url, file), httpx.Client(base_url=url, timeout=120) as http, ThreadPoolExecutor(8) as pool:

        def post(path: str, **document: Any) -> None:
            http.post(f"/admin/v1/experiments{path}", json={"reason": "bench", **document}).raise_for_status()

        def ask(i: int) -> bool:
            document = {"model": MODEL, "prompt": f"{i} is", "max_tokens": 16, "ignore_eos": True, "user": f"user-{i}"}
            reply = http.post("/v1/completions", json=document)
            reply.raise_for_status()
            return "experiment" in reply.json()["steering"]

        def health() -> dict[str, Any]:
            return cast(dict[str, Any], http.get(f"/admin/v1/experiments/{KEY}/health").json())

        post("", definition=DEFINITION)
        post(f"/{KEY}/start")
        list(pool.map(ask, range(2 * n_replies)))
        n_exposed = 2 * n_replies
        for number in range(n_rounds):
            shift = number % len(CONDITIONS)
            for condition in CONDITIONS[shift:] + CONDITIONS[:shift]:
                if condition == "paused":
                    post(f"/{KEY}/pause")
                with closing(sqlite3.connect(file, isolation_level=None)) as other:
                    if condition.endswith("locked"):
                        other.execute("BEGIN IMMEDIATE")
                    start = time.perf_counter()
                    exposed = list(pool.map(ask, range(n_replies)))
                    found[condition].append(time.perf_counter() - start)
                if condition == "paused":
                    post(f"/{KEY}/resume")
                if set(exposed) != {condition != "paused"}:
                    raise RuntimeError(f"{condition}: {sum(exposed)} of {len(exposed)} replies were of the experiment")
                n_exposed += sum(exposed)
        deadline = time.monotonic() + 30
        while health()["exposures"]["written"] < n_exposed and time.monotonic() < deadline:
            time.sleep(0.2)
        last = health()
        if last["exposures"]["written"] != n_exposed or last["exposures"]["dropped"]:
            raise RuntimeError(f"{n_exposed} replies were exposed, and the database has {last['exposures']}")
    return found, last


def main() -> int:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--replies", type=int, default=64, help="of a round")
    parser.add_argument("--requests", type=int, default=5000, help="that are decided by themselves")
    args = parser.parse_args()
    alone = request_milliseconds(args.requests)
    found, health = reply_seconds(args.rounds, args.replies)
    paused, *others = CONDITIONS
    ratios = {c: sorted(a / b for a, b in zip(found[paused], found[c], strict=True)) for c in others}
    console.print(f"assignment and exposure: {alone['median']:.3f} ms at the median, {alone['p99']:.3f} ms at the 99th")
    for condition, of_round in ratios.items():
        spread = f"{statistics.median(of_round):.3f} [{of_round[0]:.3f}, {of_round[-1]:.3f}]"
        console.print(f"replies, {condition}: {spread} of the speed without")
    console.print(f"exposures: {json.dumps(health['exposures'])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
