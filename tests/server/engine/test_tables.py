"""Slots are a cache: bounded in number and in bytes, rebuilt alike, and never taken from a step that holds them."""

import pytest
import torch

from tests.bundles import random_bundle
from trimtab.server.engine import tables
from trimtab.server.engine.tables import Tables
from trimtab.server.plan import Segment, compile_plan
from trimtab.server.steering import parse_steering

BUNDLE = random_bundle()


def segment(amount: float, operation: str = "clamp") -> Segment:
    """Some edits of every latent of the bundle that no other amount shares."""
    edit = {"bundle": "calm", "operation": operation, "target" if operation == "clamp" else "amount": amount}
    edits = [edit | {"latent": latent.latent} for latent in BUNDLE.header.latents]
    (found,) = compile_plan(parse_steering({"edits": edits}), {"calm": BUNDLE}).segments(8)
    return found


@pytest.fixture
def table() -> Tables:
    found = Tables(torch.device("cpu"), 64)
    found.load(BUNDLE)
    return found


def test_bytes_are_those_of_the_rows(table: Tables) -> None:
    d, k = BUNDLE.header.model.d_model, len(BUNDLE.header.latents)
    (folded,) = table.slot(segment(1.0, "add")).values()
    assert folded.n_bytes == 4 * d
    (read,) = table.slot(segment(1.0)).values()
    assert read.n_bytes == 4 * (d + k * (2 * d + 4))


def test_slots_are_bounded_in_bytes_and_rebuilt_alike(table: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    first = table.slot(segment(1.0))
    monkeypatch.setattr(tables, "SLOT_BYTES", 3 * first[1].n_bytes)
    assert table.slot(segment(1.0)) is first
    for amount in (2.0, 3.0):
        table.slot(segment(amount))
    assert table.slot(segment(1.0)) is first, "three fit"
    for amount in (4.0, 5.0, 6.0):
        table.slot(segment(amount))
    again = table.slot(segment(1.0))
    assert again is not first
    torch.testing.assert_close(again[1].add_D, first[1].add_D)


def test_a_slot_larger_than_the_bound_is_given_all_the_same(table: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SLOT_BYTES", 1)
    a, b = table.slot(segment(1.0)), table.slot(segment(2.0))
    assert a[1].latents is not None
    assert b[1].latents is not None


def test_unloading_forgets_every_slot(table: Tables) -> None:
    before = table.slot(segment(1.0))
    table.unload("sha256:another")
    assert table.slot(segment(1.0)) is not before
