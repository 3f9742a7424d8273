"""A trial: what a bundle's edits do to sampled text, every arm × strength × prompt × seed as one continuous batch of a server.

    arms     what is tried: each candidate alone, all together, dense vectors, rival bundles, a system message
    cells    one reply each, with its proof: sampled, graded, and read again by the unsteered model
    doses    per arm and strength: rates with intervals over prompts, coherence, side effects; the strengths that are safe
    forced   log-probability margins of given pairs under an edit, by the same server
    choice   the few edits to recommend, by greedy forward selection on the margins
    run      all of it, resumable from a journal, to a result that a bundle and a report take

Nothing here needs torch: the model may be of any size, on another machine.
"""
