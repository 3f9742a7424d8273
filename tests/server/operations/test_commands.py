from pathlib import Path
from typing import Any

import pytest

from trimtab.server.database.database import Database


def test_config_show_says_where_each_value_came_from(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("port = 9000\n")
    monkeypatch.setenv("TRIMTAB_DATABASE", "postgresql://me:hunter2@db/trimtab")
    monkeypatch.setenv("TRIMTAB_API_KEY", "open-sesame-open")
    code, rows = run("config", "show", "--config", "t.toml", "--json")
    by_name = {row["setting"]: row for row in rows}
    assert code == 0
    assert (by_name["port"]["value"], by_name["port"]["from"]) == (9000, "t.toml")
    assert (by_name["database"]["value"], by_name["database"]["from"]) == (
        "postgresql://me:***@db/trimtab",
        "environment",
    )
    assert (by_name["host"]["value"], by_name["host"]["from"]) == ("127.0.0.1", "default")
    assert "sesame" not in str(rows)


def test_doctor_finds_a_healthy_machine_healthy(run: Any, tmp_path: Path) -> None:
    run("registry", "upload", "calm.tt")
    run("registry", "promote", "calm:v1", "--default")
    code, found = run("doctor", "--json")
    by_check = {finding["check"]: finding for finding in found}
    assert code == 0
    assert {finding["status"] for finding in found} <= {"ok", "warning"}
    assert by_check["registry"]["message"] == "1 active versions, every one whole and signed as asked"
    assert by_check["audit log"]["message"].startswith("whole, 3 entries")
    assert by_check["vllm"]["status"] == by_check["plugin"]["status"] == "ok"


def test_doctor_finds_what_is_wrong(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run("registry", "upload", "calm.tt")
    run("registry", "promote", "calm:v1")
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE audit SET actor = 'nobody' WHERE sequence = 1")
        connection.exec_driver_sql("UPDATE blob SET data = x'00'")
    database.close()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("TRIMTAB_SIGNATURES", "strict")
    code, found = run("doctor", "--json")
    wrong = {finding["check"] for finding in found if finding["status"] == "error"}
    assert code == 2
    assert wrong == {"plugin", "audit log", "registry", "signatures"}


def test_a_database_that_does_not_answer_is_a_finding(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_DATABASE", "postgresql://me:hunter2@127.0.0.1:1/trimtab")
    code, found = run("doctor", "--json")
    assert code == 2
    assert "does not answer" in next(finding["message"] for finding in found if finding["check"] == "database")
    assert "hunter2" not in str(found)


def test_doctor_of_a_new_machine_warns_and_makes_nothing(run: Any, tmp_path: Path) -> None:
    code, _ = run("doctor", "--json")
    assert code == 0
    assert not (tmp_path / "trimtab.db").exists()
