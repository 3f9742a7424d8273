"""Pair files: what is read, what is refused and where, how prompts are split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.attribution.errors import PairsError, SelectionError
from trimtab.attribution.pairs import Pair, load_pairs, shipped_pairs, split, tokenise

GOOD = {"prompt": "Q:", "positive": " yes", "negative": " no"}


def write(folder: Path, *lines: Any) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "Q:", "positive"', "Expecting ':' delimiter"),
        ("[1, 2]", "a pair is a JSON object, not list"),
        ({**GOOD, "postive": "x"}, "unknown field 'postive'"),
        ({"prompt": "Q:", "positive": " yes"}, "`negative` is missing"),
        ({**GOOD, "messages": [{"role": "user", "content": "hi"}]}, "exactly one of `prompt` and `messages`"),
        ({"positive": "a", "negative": "b"}, "exactly one of `prompt` and `messages`"),
        ({**GOOD, "positive": ""}, "`positive` must be a non-empty string"),
        ({**GOOD, "positive": 7}, "`positive` must be a non-empty string"),
        ({**GOOD, "negative": " yes"}, "are the same text"),
        ({"messages": [], "positive": "a", "negative": "b"}, "`messages` must be a non-empty list"),
        ({"messages": [{"role": "user"}], "positive": "a", "negative": "b"}, "exactly `role` and `content`"),
        ({**GOOD, "id": "first"}, "id 'first' is taken by line 1"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: Any, says: str) -> None:
    file = write(tmp_path, {**GOOD, "id": "first"}, "", line)
    with pytest.raises(PairsError) as error:
        load_pairs(file)
    assert f"{file}, line 3: " in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(text)
    with pytest.raises(PairsError, match="holds no pairs"):
        load_pairs(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="cannot read pairs"):
        load_pairs(tmp_path / "none.jsonl")


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps({**GOOD, "positive": "a\u2028b"}, ensure_ascii=False))
    assert load_pairs(file).pairs[0].positive == "a\u2028b"


def test_the_split_is_by_prompt_and_keeps_its_sides_when_the_file_grows() -> None:
    def pair(prompt: int, i: int) -> Pair:
        return Pair(id=f"{prompt}.{i}", prompt=f"prompt {prompt}", messages=(), positive="a", negative="b")

    pairs = tuple(pair(prompt, i) for prompt in range(40) for i in range(2))
    train, held_out = split(pairs, 0.3)
    assert {p.prompt for p in train}.isdisjoint(p.prompt for p in held_out)
    assert len(train) + len(held_out) == len(pairs)
    assert 0.15 < len(held_out) / len(pairs) < 0.45
    more_train, more_held_out = split((*pairs, *(pair(prompt, 0) for prompt in range(40, 60))), 0.3)
    assert set(train) <= set(more_train)
    assert set(held_out) <= set(more_held_out)


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(SelectionError, match="1 prompts cannot be split"):
        split((Pair("a", "Q:", (), "x", "y"),), 0.3)


def test_the_shipped_pairs_are_many_and_over_many_prompts() -> None:
    file = load_pairs(shipped_pairs())
    assert len(file.pairs) >= 60
    assert file.n_prompts >= 40


def test_both_completions_start_with_the_ids_that_a_server_makes_of_the_prompt(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "How are you?"}]
    pair = Pair("a", None, (("user", "How are you?"),), "Fine.", "\n\nI am software.")
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    positive, negative = tokenise(tokenizer, pair)
    assert positive.ids[: positive.n_prompt] == negative.ids[: negative.n_prompt] == prompt
    assert tokenizer.decode(positive.ids[positive.n_prompt :]) == "Fine."
    assert tokenizer.decode(negative.ids[negative.n_prompt :]) == "\n\nI am software."


def test_a_completion_that_would_merge_into_the_prompt_is_tokenised_alone(tokenizer: Any) -> None:
    positive, _ = tokenise(tokenizer, Pair("a", "The colour is blu", (), "e", "nt"))
    assert positive.n_completion == 1
    assert list(positive.ids[: positive.n_prompt]) == tokenizer("The colour is blu")["input_ids"]
