"""The engine room: a vLLM plugin that edits the residual stream per request, and the proof of what it did.

    every process  plugin: the entry point        pin: the one vLLM release it fits      wire: plans decoded and resolved
    front end      admission: plans are checked   bundles: loaded into every worker      handshake: every worker proves its hooks
    EngineCore     prefix_cache: block keys carry the edit   ranks: one report of all    proof: from the worker to the reply
    worker         worker: install, RPC methods   layers: which can be hooked, and how   op: the opaque operator on each layer
                   runner_v1, runner_v2: which rows does this step run, for whom         edit_state: requests, and a step's work
                   tables: rows of the formula    work: applied to a step's rows         device_path: the same in a CUDA graph

The life of a steered request: 1 `admission` refuses a plan that cannot be served. 2 The scheduler keys its blocks through
`prefix_cache`. 3 The runner adapter hands it to `EditState`, which resolves its segments. 4 Each step `EditState.prepare` lists
the rows to edit per layer. 5 The operator on each listed layer adds Δ and keeps ‖Δ‖/‖h‖. 6 After the step the counts are attached
to the runner's output. 7 `proof` puts them on the finishing output. 8 `EditState.finish` forgets the request.
"""
