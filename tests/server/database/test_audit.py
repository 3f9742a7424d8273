from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.server.database.audit import BEGINNING, Entry, link, verify
from trimtab.server.errors import Tampered


def chain(n: int) -> list[Entry]:
    entries: list[Entry] = []
    for i in range(1, n + 1):
        previous = entries[-1].digest if entries else BEGINNING
        entries.append(link(i, f"2026-11-25T00:00:0{i}Z", "cli:me", "bundle.promote", f"calm:v{i}", {"n": i}, previous))
    return entries


def test_a_whole_chain_is_whole() -> None:
    entries = chain(5)
    assert verify(entries) == entries[-1]
    assert verify(entries, head=entries[2].digest) == entries[-1]
    assert verify([]) is None


def test_the_digest_of_an_entry_is_what_it_was_in_the_first_release() -> None:
    """Whoever noted a digest down must find it again after an upgrade."""
    assert chain(1)[0].digest == "sha256:b1b8e865d541bb211975b393b156bcd8f317860eb6befb7be107d8747a25e68d"


@given(st.integers(0, 4), st.sampled_from(Entry._fields))
def test_a_change_of_any_field_of_any_entry_is_found(i: int, field: str) -> None:
    entries = chain(5)
    value = getattr(entries[i], field)
    other: Any = value + 1 if isinstance(value, int) else {**value, "x": 1} if isinstance(value, dict) else value + "x"
    entries[i] = entries[i]._replace(**{field: other})
    with pytest.raises(Tampered):
        verify(entries)


@given(st.integers(0, 3))
def test_an_entry_that_is_taken_out_is_missed(i: int) -> None:
    entries = chain(5)
    del entries[i]
    with pytest.raises(Tampered, match=f"entry {i + 1} is missing"):
        verify(entries)


def test_an_end_that_was_cut_off_shows_by_a_digest_that_was_noted_down() -> None:
    entries = chain(5)
    verify(entries[:3])
    with pytest.raises(Tampered, match="cut off"):
        verify(entries[:3], head=entries[-1].digest)


def test_a_chain_that_was_written_anew_shows_by_a_digest_that_was_noted_down() -> None:
    entries = chain(5)
    other = [link(1, "2026", "cli:thief", "bundle.promote", "calm:v1", {}, BEGINNING)]
    verify(other)
    with pytest.raises(Tampered):
        verify(other, head=entries[0].digest)
