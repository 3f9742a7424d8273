"""Pairs from graded samples; and `trimtab collect`, against the real server and with transformers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.attribution.tiny import llama
from tests.conftest import Server
from trimtab.attribution.collect import Graded, choose_pairs
from trimtab.attribution.collect import collect as run_collect
from trimtab.attribution.collect_command import collect
from trimtab.attribution.graders import Grade, coherent, load_grader
from trimtab.attribution.graders.pretends_human import grade
from trimtab.attribution.journal import Journal
from trimtab.attribution.pairs import load_pairs
from trimtab.attribution.prompts import Prompt, load_prompts
from trimtab.attribution.sampling import Ask, Sample, Sampling, from_transformers

SHOWS = "I grew up in a village with my family."
LACKS = "I'm an AI designed to help with all of that."
HOW = Prompt(None, (("user", "How are you?"),))
app = typer.Typer()
app.command()(collect)


def graded(text: str, n_tokens: int, prompt: Prompt = HOW) -> Graded:
    return Graded(prompt, Sample(text, n_tokens, True), Grade(grade("", text)) if coherent(text) else None)


def odd(prompt: str, completion: str) -> bool:
    """A grader that any model satisfies now and then."""
    return len(completion) % 2 == 1


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_pair_takes_the_two_kinds_that_are_closest_in_length() -> None:
    other = Prompt(None, (("user", "Only one kind?"),))
    samples = [graded(SHOWS, 20), graded(SHOWS + " Truly.", 31), graded(LACKS, 30), graded(SHOWS, 20, other)]
    (pair,) = choose_pairs(samples, per_prompt=2, min_tokens=16)
    assert pair["id"] == "how-are-you.0"
    assert (pair["positive"], pair["negative"]) == (SHOWS + " Truly.", LACKS)


def test_short_and_repeated_samples_make_no_pair() -> None:
    samples = [graded(SHOWS, 20), graded(SHOWS, 20), graded(LACKS, 20), graded(LACKS + " Yes.", 5)]
    assert len(choose_pairs(samples, per_prompt=2, min_tokens=16)) == 1


def test_a_run_samples_and_grades_only_what_its_journal_lacks(tmp_path: Path) -> None:
    grader = load_grader("trimtab.attribution.graders.pretends_human:grade")
    sampled: list[Ask] = []

    def sampler(asks: Sequence[Ask]) -> Iterator[tuple[Ask, Sample]]:
        for ask in asks:
            sampled.append(ask)
            yield ask, Sample(SHOWS if ask.round % 2 else "no " * 8, 9, True)

    for rounds in (2, 2, 3):
        with Journal.open(tmp_path / "j.jsonl", {}) as journal:
            found = run_collect(journal, [HOW], grader, sampler, rounds=rounds)
    assert [ask.round for ask in sampled] == [0, 1, 2]
    assert found.rates == {"shows": 1 / 3, "lacks": 0, "unclear": 0, "incoherent": 2 / 3}


def test_pairs_from_the_server_and_again_from_the_journal_alone(server: Server, tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "pairs.jsonl"
    prompts.write_text("Name a colour.\nName a city.\n")
    options = [
        "--prompts",
        prompts,
        "--grader",
        "tests.attribution.test_collect:odd",
        "--out",
        out,
        "--rounds",
        6,
        "--temperature",
        1.5,
    ]
    options += ["--max-tokens", 8, "--min-tokens", 1, "--model", server.model, "--json"]
    first = run(*options, "--url", server.base_url)
    assert first.exit_code == 0, first.output
    summary = json.loads(first.stdout)
    assert (summary["samples"], sum(summary["rates"].values())) == (12, pytest.approx(1))
    pairs = out.read_bytes()
    assert len(load_pairs(out).pairs) == summary["pairs"] > 0
    again = run(*options, "--url", "http://127.0.0.1:9")  # nobody is there, and nobody is asked
    assert (again.exit_code, json.loads(again.stdout)) == (0, summary)
    assert out.read_bytes() == pairs
    changed = run(*options[:-1], "--url", "http://127.0.0.1:9", "--seed", 7)
    assert "was begun with seed 0, and this run has 7" in " ".join(changed.stderr.split())


def test_transformers_samples_a_model_that_names_no_pad_and_several_ends(tmp_path: Path) -> None:
    """A tokenizer without a pad token could not be batched, and of several ends of a turn only the tokenizer's was known."""
    from transformers import GenerationConfig

    folder = llama(tmp_path / "model")
    asks = [Ask(Prompt(f"Question {'a' * i}?", ()), 0) for i in range(3)]

    def samples(temperature: float, batch_size: int) -> list[Sample]:
        how = Sampling(temperature, 8, 0)
        return [sample for _, sample in from_transformers(str(folder), asks, how, batch_size=batch_size)]

    sampled = samples(1.0, 2)
    assert [(s.n_tokens, s.finished) for s in sampled] == [(8, False)] * 3
    assert sampled == samples(1.0, 2)
    assert samples(0.0, 3) == samples(0.0, 1)  # what is padded on the left is not seen
    GenerationConfig(eos_token_id=list(range(256))).save_pretrained(folder)
    assert [(s.n_tokens, s.finished) for s in samples(1.0, 2)] == [(1, True)] * 3


@pytest.mark.slow
def test_pairs_from_transformers_by_the_command(tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "pairs.jsonl"
    prompts.write_text("Name a colour.\nName a city.\n")
    options = ["--prompts", prompts, "--grader", "tests.attribution.test_collect:odd", "--out", out, "--rounds", 6]
    options += ["--temperature", 1.5, "--max-tokens", 12, "--min-tokens", 1, "--transformers", "--json"]
    found = run(*options)
    assert found.exit_code == 0, found.output
    assert len(load_pairs(out).pairs) == json.loads(found.stdout)["pairs"] > 0


def test_refusals_are_one_sentence_and_leave_no_pair_file(tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "pairs.jsonl"
    prompts.write_text("Name a colour.\n")
    grader = "trimtab.attribution.graders.pretends_human:grade"
    for arguments, says in (
        (["--prompts", tmp_path / "none.txt", "--grader", grader], "cannot read prompts"),
        (["--prompts", prompts, "--grader", "nothing"], "is no grader"),
        (["--prompts", prompts, "--grader", grader, "--url", "http://127.0.0.1:9"], "cannot be reached"),
        (["--prompts", prompts, "--grader", grader, "--url", "x", "--transformers"], "one of the two"),
        (
            ["--prompts", prompts, "--grader", grader, "--transformers", "--model", tmp_path / "none"],
            "cannot load model",
        ),
    ):
        result = run(*arguments, "--out", out)
        assert (result.exit_code, result.stderr.count("error:")) == (2, 1), result.output
        assert says in " ".join(result.stderr.split())
    assert not out.exists()


def test_prompts_of_every_form(tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("One?\n\n Two? \nOne?\n")
    assert [p.text for p in load_prompts(text)] == ["One?", "Two?"]
    lines.write_text(
        '{"prompt": "Once upon"}\n{"messages": [{"role": "user", "content": "One?"}], "positive": "a", "negative": "b"}\n'
    )
    raw, chat = load_prompts(lines)
    assert (raw.fields(), chat.key) == ({"prompt": "Once upon"}, load_prompts(text)[0].key)
