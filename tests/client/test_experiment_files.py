"""What is written and read of experiments: definitions, exports, the report, the terminal's views."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.browser import laid_out
from tests.client import experiment_documents as documents
from trimtab.client import experiment_views as views
from trimtab.client.definition_file import read_definition
from trimtab.client.experiment_report import document, page
from trimtab.client.experiments import read_experiment, read_health, read_looks, read_results
from trimtab.client.export import What, write

EXPERIMENT, HEALTH = read_experiment(documents.EXPERIMENT), read_health(documents.HEALTH)
RESULTS, LOOKS = read_results(documents.RESULTS), read_looks(documents.LOOKS)


def shown(view: Any, width: int = 160) -> str:
    console = Console(width=width, record=True, color_system=None, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view)
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"key": "a", "alpha": 0.05}'),
        ("a.toml", 'key = "a"\nalpha = 0.05\n'),
        ("a.yaml", "key: a\nalpha: 0.05\n"),
    ],
)
def test_a_definition_is_read_from_json_toml_and_yaml(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_definition(tmp_path / name) == {"key": "a", "alpha": 0.05}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.yaml", "key: [", "cannot be read"),
        ("a.yaml", "- a", "must hold an object, not list"),
        ("a.ini", "", "a .json, .toml or .yaml file"),
        ("missing.json", None, "No such file"),
    ],
)
def test_a_file_that_is_no_definition_is_one_sentence(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_definition(tmp_path / name)


@pytest.mark.parametrize(
    ("what", "rows"),
    [("exposures", documents.EXPOSURES), ("outcomes", documents.OUTCOMES), ("texts", documents.TEXTS)],
)
def test_rows_are_exported_as_csv_json_lines_and_parquet(
    tmp_path: Path, what: What, rows: list[dict[str, Any]]
) -> None:
    for suffix in ("csv", "jsonl", "parquet"):
        assert write(tmp_path / f"rows.{suffix}", what, rows) == len(rows)
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [list(row.values()) for row in csv.DictReader(file)] == [[str(v) for v in row.values()] for row in rows]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.column_names == list(rows[0])
    assert table["at"].to_pylist()[0].isoformat() == "2026-11-25T12:00:00+00:00"
    times = [name for name in rows[0] if name in ("at", "received_at", "until")]
    assert table.drop(times).to_pylist() == [
        {name: value for name, value in row.items() if name not in times} for row in rows
    ]


def test_no_rows_are_an_empty_file_with_its_columns(tmp_path: Path) -> None:
    assert write(tmp_path / "none.parquet", "exposures", []) == 0
    assert pq.read_table(tmp_path / "none.parquet").column_names[0] == "response_id"
    assert write(tmp_path / "none.csv", "outcomes", []) == 0


def test_rows_that_break_off_leave_the_file_that_was_there(tmp_path: Path) -> None:
    def breaks() -> Any:
        yield documents.EXPOSURES[0]
        raise RuntimeError("gone")

    (tmp_path / "rows.csv").write_text("before")
    with pytest.raises(RuntimeError):
        write(tmp_path / "rows.csv", "exposures", breaks())
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("rows.csv", "before")]
    with pytest.raises(ValueError, match=r"\.csv, \.jsonl or \.parquet"):
        write(tmp_path / "rows.xlsx", "exposures", [])


def test_a_report_is_one_page_with_every_number_in_its_json() -> None:
    found = json.loads(json.dumps(document(EXPERIMENT, HEALTH, RESULTS, LOOKS)))
    html = page(found)
    assert (
        "calm is better than the control on harm: 0.31 → 0.2, -0.11 [-0.2, -0.02] (500 and 300 units)."
        in found["summary"]
    )
    assert html.count("<svg") == 3  # two sequences, the guardrails
    assert "3 exposures were lost" in html
    assert "is reported of 90%" in html
    for loaded in ("<script", "<link", "<img", "@import", "url(http"):
        assert loaded not in html


def test_a_report_of_an_experiment_that_nobody_is_in_yet_says_so() -> None:
    empty = {**documents.RESULTS, "effects": [], "guardrails": [], "verdicts": {}, "notes": []}
    found = document(EXPERIMENT, HEALTH, read_results(empty), ())
    assert "<svg" not in page(found)
    nobody = [documents.effect(arm=arm, n_control=0, n_treated=0, control=None, treated=None, estimate=None, low=None, high=None)
              for arm in ("calm", "prompt")]  # fmt: skip
    results = read_results({**documents.RESULTS, "effects": nobody})
    assert "cannot be told" in "".join(document(EXPERIMENT, HEALTH, results, LOOKS[:1])["summary"])
    assert page(document(EXPERIMENT, HEALTH, results, LOOKS[:1])).count("<svg") == 3


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_lays_a_report_out_without_scrolling_sideways(tmp_path: Path, width: int) -> None:
    excess, shown = laid_out(page(document(EXPERIMENT, HEALTH, RESULTS, LOOKS)), tmp_path, width)
    assert excess <= 0
    assert shown.count("<svg") == 3


def test_what_a_report_quotes_is_escaped() -> None:
    hostile = {
        **documents.EXPERIMENT,
        "definition": {**documents.EXPERIMENT["definition"], "hypothesis": "<script>x</script>"},
    }
    html = page(document(read_experiment(hostile), HEALTH, RESULTS, LOOKS))
    assert "<script>" not in html


def test_results_are_shown_with_their_verdicts_and_sequences() -> None:
    text = shown(views.results_view(RESULTS))
    assert "better" in text
    assert "-0.11 [-0.2, -0.02]" in text
    assert "├" in text
    assert "3.5 days left" in text
    assert "per protocol" not in text
    assert "per protocol" in shown(views.results_view(RESULTS, every_population=True))


def test_a_narrow_terminal_has_the_numbers_and_not_the_drawings() -> None:
    """Symptom: at 80 columns the drawings took the place, and every other column was one letter wide."""
    text = shown(views.results_view(RESULTS), width=80)
    assert "├" not in text
    for whole in ("metric", "control", "treated", "-0.11 [-0.2, -0.02]", "better"):
        assert whole in text


def test_what_is_wrong_is_shown() -> None:
    text = shown(views.health_view(HEALTH))
    assert "not healthy" in text
    assert "3 exposures were lost" in text
    assert "coverage 50%" in text
    live = shown(views.watch_view(RESULTS, HEALTH, LOOKS, at="12:00"))
    assert "width of calm's sequence so far" in live
    assert "width of prompt's" not in live


@pytest.mark.parametrize(
    ("low", "high", "estimate", "line"),
    [
        (-1.0, 1.0, 0.0, "├───●───┤"),
        (None, None, None, "····│····"),
        (0.25, 0.75, 0.5, "····│├●┤·"),
        (-9.0, 9.0, 0.5, "──────●──"),
    ],
)
def test_a_sequence_is_a_bar(low: float | None, high: float | None, estimate: float | None, line: str) -> None:
    assert views.bar(low, high, estimate, 1.0, width=9) == line


def test_lists_and_histories_are_shown() -> None:
    assert "control, calm, prompt" in shown(views.list_view([EXPERIMENT]))
    assert "ann" in shown(views.history_view(EXPERIMENT))
