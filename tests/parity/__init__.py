"""Steered vLLM equals steered transformers. A package, so that the engine fixture ends with the last test in here."""
