"""A journal keeps what was done, whatever happened to the run."""

import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.attribution.errors import JournalError
from trimtab.attribution.journal import Journal

ASKED = {"model": "m", "temperature": 0.7}


def test_a_run_that_starts_again_finds_its_records(tmp_path: Path) -> None:
    file = tmp_path / "new" / "j.jsonl"
    with Journal.open(file, ASKED) as journal:
        journal.add("a", {"text": "héllo\nthere"})
    with Journal.open(file, ASKED) as journal:
        assert "a" in journal
        assert journal["a"] == {"text": "héllo\nthere"}
        journal.add("b", {"n": 1})
    with Journal.open(file, ASKED) as journal:
        assert len(journal) == 2


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    with Journal.open(file, ASKED) as journal:
        journal.add("a", {"n": 1})
    with file.open("ab") as f:
        f.write(b'{"key": "b", "n"')
    with Journal.open(file, ASKED) as journal:
        assert ("a" in journal, "b" in journal) == (True, False)
        journal.add("b", {"n": 2})
    with Journal.open(file, ASKED) as journal:
        assert journal["b"] == {"n": 2}


def test_a_journal_of_something_else_is_refused_by_the_field_that_differs(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j.jsonl", ASKED):
        pass
    with (
        pytest.raises(JournalError, match=r"begun with temperature 0.7, and this run has 1.0"),
        Journal.open(tmp_path / "j.jsonl", {**ASKED, "temperature": 1.0}),
    ):
        pass


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    with Journal.open(file, ASKED) as journal:
        journal.add("a", {"n": 1})
    file.write_text(file.read_text() + "no json\n")
    with pytest.raises(JournalError, match="line 3 is no line of a journal"), Journal.open(file, ASKED):
        pass


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    with (
        Journal.open(tmp_path / "j.jsonl", ASKED),
        pytest.raises(JournalError, match="being written by another run"),
        Journal.open(tmp_path / "j.jsonl", ASKED),
    ):
        pass


def test_a_full_disk_is_one_sentence_and_keeps_what_was_written(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the disk's: the write fails half-way, as it does on a full disk."""
    code = (
        "import resource, signal, sys, pathlib\n"
        "from trimtab.attribution.errors import JournalError\n"
        "from trimtab.attribution.journal import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "with Journal.open(pathlib.Path(sys.argv[1]), {}) as journal:\n"
        "    journal.add('a', {'text': 'x' * 100})\n"
        "    try:\n"
        "        journal.add('b', {'text': 'x' * 1000})\n"
        "    except JournalError as e:\n"
        "        print(e)\n"
    )
    file = tmp_path / "j.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert "make room and start again, it goes on from here" in done.stdout
    with Journal.open(file, {}) as journal:
        assert ("a" in journal, "b" in journal) == (True, False)
