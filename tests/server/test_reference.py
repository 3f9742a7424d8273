from pathlib import Path

import pytest

from docs.reference import PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_reference_is_current(page: Path) -> None:
    assert page.read_text() == PAGES[page](), "the API differs from its reference; run `make reference`"
