"""The real model and the real SAE, loaded once for the tests of this room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from trimtab.attribution.embedded import EMBEDDED_MODEL

if TYPE_CHECKING:
    from trimtab.attribution.model import SplitModel
    from trimtab.attribution.pairs import Completion
    from trimtab.attribution.sae import SAE

LAYER = 14


@pytest.fixture(scope="session")
def model() -> SplitModel:
    """The embedded model, cut after the block that the shipped SAE reads."""
    from trimtab.attribution.model import SplitModel

    return SplitModel.load(EMBEDDED_MODEL, LAYER)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from trimtab.attribution.model import load_tokenizer

    return load_tokenizer(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def sae() -> SAE:
    from trimtab.attribution.sae import SAE, shipped_sae

    return SAE.load(shipped_sae())


@pytest.fixture(scope="session")
def completions(tokenizer: Any) -> list[Completion]:
    """Positive, negative, positive, negative, … of the first shipped pairs, of several lengths."""
    from trimtab.attribution.pairs import load_pairs, shipped_pairs, tokenise

    pairs = load_pairs(shipped_pairs()).pairs[:3]
    return [c for pair in pairs for c in tokenise(tokenizer, pair)]
