"""The HTTP service: vLLM's own OpenAI serving code behind an app of ours, which admits steering and checks that it was applied.

body ── decode ──► admission ── Plan ──► vLLM's request model and serving ──► witness ── samples ──► proof ──► the reply
"""
