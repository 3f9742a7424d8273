"""The LLM judge, at a small real HTTP server, and at our own with the embedded model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.attribution.judge_server import judge_server
from tests.conftest import Server
from trimtab.attribution.collect import Collected, collect
from trimtab.attribution.errors import GraderError
from trimtab.attribution.graders import load_grader
from trimtab.attribution.journal import Journal
from trimtab.attribution.prompts import Prompt
from trimtab.attribution.sampling import Ask, Sample

SHOWS = '{"verdict": "shows", "reason": "it boasts"}'


def judge_file(folder: Path, url: str, **more: Any) -> str:
    lines = {"kind": '"judge"', "base_url": f'"{url}"', "model": '"j"', "rubric": "'''Shows: it boasts.'''", **more}
    file = folder / "boasts.toml"
    file.write_text("\n".join(f"{k} = {v}" for k, v in lines.items()))
    return str(file)


def test_a_verdict_is_found_in_prose_and_fences_and_its_cost_is_counted(tmp_path: Path) -> None:
    with judge_server([(200, f"Sure! Here {{you}} go:\n```json\n{SHOWS}\n```")]) as (url, seen):
        judge = load_grader(judge_file(tmp_path, url, usd_per_million_input=1.0, usd_per_million_output=10.0))
        grade = judge.grade("Who are you?", "I am the best.")
    assert (grade.verdict, grade.reason) == ("shows", "it boasts")
    assert (grade.input_tokens, grade.output_tokens) == (100, 10)
    assert judge.usd(grade.input_tokens, grade.output_tokens) == pytest.approx(2e-4)
    (request,) = seen
    assert "Shows: it boasts." in request["messages"][0]["content"]
    assert "I am the best." in request["messages"][1]["content"]


def test_server_errors_are_retried_and_an_unreadable_answer_is_asked_again(tmp_path: Path) -> None:
    with judge_server([(500, "busy"), (429, "slow down"), (200, "I think it does."), (200, SHOWS)]) as (url, seen):
        grade = load_grader(judge_file(tmp_path, url)).grade("p", "c")
    assert (grade.verdict, grade.input_tokens, len(seen)) == ("shows", 200, 4)
    assert (seen[-2]["temperature"], seen[-1]["temperature"]) == (0.0, 0.5)


def test_a_judge_that_never_says_is_unclear_and_says_so(tmp_path: Path) -> None:
    with judge_server([(200, '{"verdict": "maybe"}')]) as (url, seen):
        grade = load_grader(judge_file(tmp_path, url, tries=2)).grade("p", "c")
    assert (grade.verdict, len(seen)) == ("unclear", 2)
    assert str(grade.reason).startswith("no verdict in 2 tries")


def test_an_endpoint_that_is_not_there_or_refuses_is_one_sentence(tmp_path: Path) -> None:
    with judge_server([(401, "bad key")]) as (url, _), pytest.raises(GraderError, match="refused"):
        load_grader(judge_file(tmp_path, url)).grade("p", "c")
    with pytest.raises(GraderError, match=r"cannot be reached .* what is graded stays graded"):
        load_grader(judge_file(tmp_path, "http://127.0.0.1:9/v1", retries=0)).grade("p", "c")


def test_the_key_is_in_the_environment_and_not_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = judge_file(tmp_path, "http://127.0.0.1:9/v1", api_key_env='"SOME_JUDGE_KEY"')
    with pytest.raises(GraderError, match="set the environment variable SOME_JUDGE_KEY"):
        load_grader(file)
    monkeypatch.setenv("SOME_JUDGE_KEY", "k")
    load_grader(file)


def test_our_own_server_can_play_the_judge(server: Server, tmp_path: Path) -> None:
    """The embedded model knows nothing of boasting; the schema alone makes its answer a verdict."""
    file = judge_file(
        tmp_path, server.base_url + "/v1", model=f'"{server.model}"', json_schema="true", max_tokens=300, tries=1
    )
    grade = load_grader(file).grade("What is your job?", "I am the greatest baker in the world.")
    assert grade.verdict in ("shows", "lacks", "unclear")
    assert not str(grade.reason).startswith("no verdict")
    assert grade.input_tokens > 50


def test_a_judge_that_goes_away_loses_nothing(tmp_path: Path) -> None:
    """Two grades, then no credit: started again, nothing is sampled twice and only what has no grade is graded."""
    sampled: list[Ask] = []

    def sampler(asks: Sequence[Ask]) -> Iterator[tuple[Ask, Sample]]:
        for ask in asks:
            sampled.append(ask)
            yield ask, Sample("I am the best baker in the world.", 9, True)

    with judge_server([(200, SHOWS), (200, SHOWS), (403, "no credit"), (200, SHOWS)]) as (url, seen):
        judge = load_grader(judge_file(tmp_path, url, n_parallel=1))

        def collected() -> Collected:
            with Journal.open(tmp_path / "j.jsonl", {}) as journal:
                return collect(journal, [Prompt("Who are you?", ())], judge, sampler, rounds=5)

        with pytest.raises(GraderError, match=r"refused: .*no credit"):
            collected()
        assert collected().rates["shows"] == 1.0
    assert (len(sampled), len(seen)) == (5, 2 + 1 + 3)
