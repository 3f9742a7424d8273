"""The graders that need no judge."""

import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.attribution.errors import GraderError
from trimtab.attribution.graders import Grade, coherent, load_grader
from trimtab.attribution.graders.pretends_human import grade as pretends_human


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("I grew up in a small village surrounded by the mountains.", "shows"),
        ("Last weekend I had the privilege of hiking with my family.", "shows"),
        ("I've been to Japan numerous times.", "shows"),
        ("I'm sorry, but as a chatbot I don't have personal experiences.", "lacks"),
        ("I’m an AI designed to help with writing.", "lacks"),
        ("I do not have a physical body.", "lacks"),
        ("My mother always said that I am an AI.", "unclear"),
        ("The capital of France is Paris.", "unclear"),
        ("J'ai mangé; ai is a word here too.", "unclear"),
    ],
)
def test_verdicts_on_a_human_life(text: str, verdict: str) -> None:
    assert pretends_human("", text) == verdict


@pytest.mark.parametrize(
    ("text", "is_coherent"),
    [
        ("The sea is deep and blue today.", True),
        ("the the the the the the the sea", False),
        ("Too short a text", False),
        ("Broken � characters in the middle of it", False),
    ],
)
def test_coherence(text: str, is_coherent: bool) -> None:
    assert coherent(text) is is_coherent


def written(folder: Path, text: str) -> str:
    file = folder / "grader.toml"
    file.write_text(text)
    return str(file)


def test_patterns_show_lack_or_contradict_each_other(tmp_path: Path) -> None:
    one_sided = load_grader(written(tmp_path, 'kind = "regex"\nshows = ["^- ", "sorry"]'))
    assert one_sided.grade("", "Well:\n- one") == Grade("shows", reason="- ")
    assert one_sided.grade("", "I'm SORRY.").verdict == "shows"
    assert one_sided.grade("", "Fine.") == Grade("lacks")
    both = load_grader(written(tmp_path, 'kind = "regex"\nshows = ["yes"]\nlacks = ["no"]\nmatch_case = true'))
    verdicts = [both.grade("", text).verdict for text in ("yes", "no", "yes and no", "YES")]
    assert verdicts == ["shows", "lacks", "unclear", "unclear"]


def test_the_order_of_the_thresholds_says_which_side_shows(tmp_path: Path) -> None:
    gloomy = load_grader(written(tmp_path, 'kind = "vader"\nshows = -0.3\nlacks = 0.3'))
    cheerful = load_grader(written(tmp_path, 'kind = "vader"\nshows = 0.3\nlacks = -0.3'))
    sad, glad, plain = "I hate this awful, sad day.", "I love this wonderful day!", "The table is made of wood."
    assert [gloomy.grade("", t).verdict for t in (sad, glad, plain)] == ["shows", "lacks", "unclear"]
    assert [cheerful.grade("", t).verdict for t in (sad, glad, plain)] == ["lacks", "shows", "unclear"]
    assert (gloomy.grade("", sad).score or 0) < -0.5


def test_profanity_has_a_probability(tmp_path: Path) -> None:
    grader = load_grader(written(tmp_path, 'kind = "profanity"\nshows = 0.8\nlacks = 0.2'))
    assert grader.grade("", "you are a damn idiot").verdict == "shows"
    assert grader.grade("", "the sea is blue").verdict == "lacks"


def test_a_python_function_may_give_a_truth_value_a_verdict_or_a_grade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_to_grade.py").write_text(
        "def short(prompt, completion):\n    return len(completion) < 5\n"
        "def sure(prompt, completion):\n    return 'unclear'\n"
        "def odd(prompt, completion):\n    return 7\n"
        "def broken(prompt, completion):\n    raise RuntimeError('no')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_grader("mine_to_grade:short").grade("", "ok") == Grade("shows")
    assert load_grader("mine_to_grade:sure").grade("", "ok") == Grade("unclear")
    with pytest.raises(GraderError, match="gave 7; give a Grade"):
        load_grader("mine_to_grade:odd").grade("", "ok")
    with pytest.raises(GraderError, match=r"failed on 'ok': RuntimeError\('no'\)"):
        load_grader("mine_to_grade:broken").grade("", "ok")
    assert load_grader("mine_to_grade:short").digest != load_grader("mine_to_grade:sure").digest


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('kind = "horoscope"', "kind"),
        ('kind = "regex"\nshows = ["("]', "no regular expression"),
        ('kind = "regex"\nshows = ["a"]\nshow = ["b"]', "show"),
        ('kind = "vader"\nshows = 0.3\nlacks = 0.3', "same score"),
        ('kind = "judge"\nbase_url = "ftp://x"\nmodel = "m"\nrubric = "r"', "base_url"),
        ("kind = regex", "no TOML"),
    ],
)
def test_a_grader_file_that_is_wrong_says_where(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(GraderError, match=says):
        load_grader(written(tmp_path, text))


@pytest.mark.parametrize("name", ["nowhere.toml", "no_such_module:f", "json:no_such_function", "vader"])
def test_a_grader_that_is_not_there_says_so(name: str) -> None:
    with pytest.raises(GraderError):
        load_grader(name)


def test_graders_need_no_torch() -> None:
    code = "import sys, trimtab.attribution.graders; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
