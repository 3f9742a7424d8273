from pathlib import Path
from typing import Any

import pytest


def test_a_version_is_uploaded_promoted_listed_and_revoked(run: Any) -> None:
    assert run("registry", "upload", "calm.tt", "--json")[1]["reference"] == "calm:v1"
    assert run("registry", "promote", "calm:v1", "--default", "--json")[1]["state"] == "active"
    assert [version["is_default"] for version in run("registry", "list", "--json")[1]] == [True]
    assert run("registry", "revoke", "calm:v1", "--reason", "rude", "--json")[1]["state"] == "revoked"
    code, entries = run("registry", "audit", "list", "--json")
    assert code == 0
    assert [entry["action"] for entry in entries] == [
        "bundle.upload",
        "bundle.promote",
        "bundle.set_default",
        "bundle.revoke",
    ]
    assert all(entry["actor"].startswith("cli:") for entry in entries)
    assert run("registry", "audit", "verify", "--head", entries[0]["digest"], "--json")[1]["entries"] == 4


def test_an_audit_log_that_was_cut_is_an_error(run: Any) -> None:
    run("registry", "upload", "calm.tt")
    code, message = run("registry", "audit", "verify", "--head", "sha256:of-another-day")
    assert code == 2
    assert "does not hold" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("registry", "promote", "calm"), "no `name:vN`"),
        (("registry", "promote", "calm:v7"), "not in the registry"),
        (("registry", "upload", "none.tt"), "cannot be read"),
        (("registry", "list", "--state", "gone"), "draft, active or revoked"),
        (("registry", "list", "--database", "mysql://x/y"), "not supported"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_2(
    run: Any, arguments: tuple[str, ...], message: str
) -> None:
    code, said = run(*arguments)
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_a_downloaded_version_is_the_uploaded_file(run: Any, tmp_path: Path) -> None:
    run("registry", "upload", "calm.tt")
    code, said = run("registry", "download", "calm:v1", "--out", "again.tt", "--json")
    assert (code, said["reference"], said["file"]) == (0, "calm:v1", "again.tt")
    assert (tmp_path / "again.tt").read_bytes() == (tmp_path / "calm.tt").read_bytes()
