"""The steering server: plans (pure), the vLLM plugin (`engine`), and the HTTP service (`service`)."""
