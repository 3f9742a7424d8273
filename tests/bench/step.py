"""What steering adds to one decode step in the worker, measured alone: next to nothing else runs, so noise is small.

Preparing the step, the operator at every layer, and the reports, pickled as they are sent. The cold caches that a forward leaves
behind are not in it; the engines' ratios have them.
"""

import pickle
import statistics
import time

import torch

from tests.bench.conditions import D_MODEL, N_LAYERS, all_bundles, plan
from trimtab.server.engine import op
from trimtab.server.engine.edit_state import EditState
from trimtab.server.engine.tables import Tables

__all__ = ["step_milliseconds"]

N_WARM, N_STEPS, N_PROMPT = 20, 200, 16


def step_milliseconds() -> dict[str, dict[str, float]]:
    """Median CPU milliseconds of the calling thread, by requests at once and edit; each request has a plan of its own."""
    torch.set_num_threads(1)
    op.define()
    edits = {"idle": None, "add": "add", "clamp8": "clamp8", "gated": "gated", "add30": "add30"}
    return {f"{n} at once": {name: _one(n, edit) for name, edit in edits.items()} for n in (1, 16, 64)}


def _one(n: int, edit: str | None) -> float:
    tables = Tables(torch.device("cpu"), 4096)
    for bundle in all_bundles().values():
        tables.load(bundle)
    state = EditState(list(range(N_LAYERS)), tables)
    state.token_ids = torch.zeros(n, dtype=torch.int32)
    op.bind(state)
    requests = [f"r{i}" for i in range(n)]
    if edit is not None:
        for i, request in enumerate(requests):
            state.arrive(request, plan(edit, i).wire(), N_PROMPT)
    hidden, residual = torch.randn(2, N_LAYERS, n, D_MODEL)
    took = []
    for step in range(N_WARM + N_STEPS):
        start = time.thread_time()
        state.prepare(requests, [N_PROMPT + step] * n, [1] * n)
        for layer in range(N_LAYERS):
            op.call(hidden[layer], residual[layer], layer)
        pickle.dumps(state.collect()())
        took.append(1e3 * (time.thread_time() - start))
    op.bind(None)
    return statistics.median(took[N_WARM:])
