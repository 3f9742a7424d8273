"""The engine room: a vLLM plugin that edits the residual stream per request, and the proof of what it did.

    plugin        entry point: patches vLLM's classes once per process       pin        the one vLLM release it fits
    admission     front end: a plan is valid, its bundles are here           bundles    loading bundles into every worker
    prefix_cache  EngineCore: block keys carry the edit                      proof      what was applied, on the way to the reply
    worker        worker: install on a loaded model, RPC methods             layers     which layers can be hooked, and how
    runner_v1/v2  worker: which rows does this step run for which request    edit_state requests and the work of a step
    tables, work  worker: rows of the formula, and applying them             op         the opaque custom op on each layer
    handshake     front end: every worker proves that its hooks are called   wire       plans decoded and resolved (pure)

The life of a steered request: 1 `admission` refuses a plan that cannot be served. 2 the scheduler keys its blocks through
`prefix_cache`. 3 the runner adapter hands it to `EditState`, which resolves its segments. 4 each step `EditState.prepare` lists
the rows to edit per layer. 5 the op on each listed layer adds the delta and keeps ‖Δ‖/‖h‖. 6 after the step the counts are
attached to the runner's output. 7 `proof` puts them on the finishing output. 8 `EditState.finish` forgets the request.
"""
