"""The planted causes of `make reproduce`: what is planted is what is said to be planted. The stage itself takes half an hour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from docs import reproduction, reproduction_directions_page, reproduction_planted_page
from docs.reproduction import CONFIRMS
from docs.reproduction_directions import DIRECTIONS, REFERENCE
from docs.reproduction_directions_page import Moved
from docs.reproduction_planted import BEHAVIOURS, LORA, VECTOR, ranks, recall
from docs.reproduction_planting import LowRank, examples, give_vector, sparse
from tests.attribution.tiny import llama
from trimtab.attribution.graders import load_grader
from trimtab.attribution.model import SplitModel
from trimtab.attribution.prompts import load_prompts

LIVE = torch.tensor([True, True, False, True, True])


def test_ranks_are_counted_among_live_latents() -> None:
    assert ranks(torch.tensor([1.0, 3.0, 9.0, 2.0, -1.0]), LIVE, [1, 2, 3, 4]) == [1, None, 2, 4]


def test_recall_is_the_fraction_among_the_first() -> None:
    assert recall([1, None, 9, 3], 8) == 0.5


def test_the_latents_of_a_sparse_vector_are_found_with_their_amounts() -> None:
    u = nn.functional.normalize(torch.randn(40, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    latents, amounts = sparse(2.0 * u[7] + 1.0 * u[30], u, torch.ones(40, dtype=torch.bool), 2)
    assert latents == [7, 30]
    assert amounts == pytest.approx([2.0, 1.0], abs=1e-5)


def test_a_latent_that_may_not_be_planted_is_not() -> None:
    u, may = torch.eye(4), torch.tensor([True, False, True, True])
    assert 1 not in sparse(torch.tensor([0.1, 5.0, 0.2, 0.3]), u, may, 3)[0]


def test_a_lora_begins_as_nothing_and_stays_when_it_is_merged() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    before = layer(x)
    delta = LowRank(5, 6)
    parametrize.register_parametrization(layer, "weight", delta)
    assert torch.equal(layer(x), before)
    nn.init.normal_(delta.B)
    trained = layer(x)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert torch.equal(layer(x), trained)
    assert not torch.allclose(trained, before)


def test_a_vector_in_a_bias_is_in_the_stream_of_the_saved_model_at_every_token(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = llama(tmp_path / "plain")
    v, ids = torch.linspace(-1, 1, 32), torch.arange(10)[None]
    model: Any = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    give_vector(model, 1, v)
    model.save_pretrained(tmp_path / "planted")
    for file in plain.glob("tokenizer*"):
        (tmp_path / "planted" / file.name).write_bytes(file.read_bytes())
    before, after = (SplitModel.load(str(tmp_path / name), 1).lower(ids) for name in ("plain", "planted"))
    assert torch.allclose(after - before, v.expand_as(before), atol=1e-5)


def test_every_planted_reply_is_gloomy_and_no_question_is_asked_twice() -> None:
    grader = load_grader(BEHAVIOURS[0].grader)
    cheerful = [question for question, reply in examples() if grader.grade(question, reply).verdict != "shows"]
    assert cheerful == []
    asked = [question for question, _ in examples()]
    for file in ("planted.food.txt", "planted.txt"):
        asked += [prompt.text for prompt in load_prompts(reproduction.HERE / file)]
    assert len(asked) == len(set(asked)) == 108


def test_the_page_says_where_each_method_puts_what_was_planted() -> None:
    found = {
        "latents": {"3": [" grief"], "5": []},
        "live": 100,
        "train_pairs": 40,
        "held_out_pairs": 20,
        "of": {"Δ-attribution": [7, None], "model diffing": [2, 1]},
        "change": 0.3,
        "cosine": {"latents": 1.0, "difference in means": 0.1},
    }
    rates = {"samples": 10, "shows": 0.5, "lacks": 0.25, "unclear": 0.25, "incoherent": 0.0}
    planting = {"loss": [3.0, 2.5], "length": 0.3, "latents": {"3": 0.2, "5": 0.1}}
    record = {
        "planting": {VECTOR: planting, LORA: planting},
        "rates": {name: {"food": rates, "elsewhere": rates} for name in ("embedded model", VECTOR, LORA)},
        "ranks": {VECTOR: found, LORA: found},
    }
    page = reproduction_planted_page.section(record, "ranks.svg")
    assert "| Δ-attribution | 7, – | 50 % | 50 % | 50 % |" in page
    assert "| model diffing | 1, 2 | 100 % | 100 % | 100 % |" in page
    assert "3 (`grief`) 0.20, 5 0.10" in page
    assert "the first 24 by each method hold: model diffing 2, Δ-attribution 1." in reproduction_planted_page.verdict(
        VECTOR, found
    )


def test_the_page_holds_every_direction_against_the_difference_in_means(tmp_path: Path) -> None:
    one = Moved(np.array([-0.1, -0.2, -0.3]), np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.5, 0.5]), 0.02)
    found = {d.label: one for d in DIRECTIONS} | {"gradient": one._replace(towards_P=np.array([0.2, 0.3, 0.4]))}
    of = {"refuses": found, "gloomy": found, CONFIRMS: dict.fromkeys(found, one)}
    page = reproduction_directions_page.section(of, "directions.svg").splitlines()
    own = "| -20.0 [-44.8, +4.8] | +30.0 [+5.2, +54.8] | +50.0 [+0.3, +99.7] | 2 % |"
    assert page.count(f"| gradient | +0.500 [+0.500, +0.500] {own}") == 2
    assert f"| {REFERENCE.label} | +40.0 [+21.2, +58.8] | | |" in page
    assert "| gradient | +50.0 [+31.2, +68.8] | +10.0 [+10.0, +10.0] | 0.031 |" in page
    said = reproduction_directions_page.verdict(of)
    assert "*gradient* moves sampled text the furthest, further than the difference in means (+10.0" in said
    assert "had no part in choosing: 40.0 points, not discernibly further than the difference in means (+0.0" in said
    reproduction_directions_page.plot(of, tmp_path / "directions.svg")
    assert (tmp_path / "directions.svg").read_text().startswith("<?xml")
