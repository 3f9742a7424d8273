"""`trimtab experiment` and the SDK through the life of an experiment, against the real server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from tests.client.test_commands import trimtab
from tests.conftest import Server
from trimtab.client import ExperimentStateError, InvalidExperimentError, Outcome, StaleRevisionError, Trimtab
from trimtab.client.experiment_commands import experiment

KEY = "from-a-terminal"
HARM = {"key": "harm", "outcome": "harm", "kind": "proportion", "direction": "decrease"}
DEFINITION: dict[str, Any] = {
    "key": KEY,
    "hypothesis": "The bundle lowers harm.",
    "arms": [
        {"key": "control", "weight": 0.4},
        {"key": "calm", "weight": 0.4, "steering": {"bundle": "calm", "strength": 0.5}},
        {"key": "told", "weight": 0.2, "system_prompt": "Stay calm."},
    ],
    "unit": "user",
    "targeting": {"test": "terminal"},
    "primary": HARM,
    "guardrails": [{"metric": {"key": "length", "outcome": "length"}, "margin": 5}],
    "minimum_effect": 0.1,
    "ramp": [{"coverage": 0.5}, {"coverage": 1.0, "approval": True}],
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Trimtab]:
    with Trimtab(server.base_url, max_retries=0) as client:
        yield client
        for one in client.experiments.list():
            if one.key.startswith(KEY) and one.state in ("running", "paused"):
                client.experiments.stop(one.key, reason="the test is over")


def run(server: Server, *args: str, code: int = 0) -> str:
    """What a command prints, run in this process: a new one takes seconds to import what it needs."""
    done = CliRunner().invoke(experiment, [*args, "--server", server.base_url], env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def test_an_experiment_from_its_file_to_its_report(server: Server, client: Trimtab, tmp_path: Path) -> None:
    """Created from YAML, started, ramped, seen by its users, told of, read, written out and killed."""
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(DEFINITION))
    created = trimtab("experiment", "create", str(file), "--reason", "a try", "--server", server.base_url)
    assert (created.returncode, "draft" in created.stdout, created.stderr) == (0, True, "")
    changed = DEFINITION | {"minimum_effect": 0.2}
    file.write_text(yaml.safe_dump(changed))
    run(server, "create", str(file), "--reason", "larger", "--edit")
    run(server, "start", KEY, "--reason", "go")
    run(server, "ramp", KEY, "1.0", "--reason", "all of it")
    assert "is paused at coverage 1" in run(server, "pause", KEY, "--reason", "wait")
    run(server, "resume", KEY, "--reason", "on")

    arms, ids = {}, []
    for i in range(12):
        reply = client.openai.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "Hello!"}],
            max_tokens=4,
            user=f"terminal-{i}",
            extra_headers={"X-Trimtab-Attributes": '{"test": "terminal"}'},
        )
        told = (reply.model_extra or {})["steering"]
        arms[f"terminal-{i}"] = told["experiment"]["arm"]
        assert (told["status"] == "applied") == (told["experiment"]["arm"] == "calm")
        ids.append(reply.id)
    assert set(arms.values()) == {"control", "calm", "told"}
    assert client.outcomes.record(ids[0], "harm", 1).recorded == 1
    assert client.outcomes.record(ids[0], "harm", 1).duplicate == 1
    told_of = client.outcomes.record_all(
        [*(Outcome("length", 4, response=i) for i in ids), Outcome("x", 1, unit={"user": "u"})]
    )
    assert told_of.recorded == 13

    health = _written(client, 12)
    assert (health.healthy, health.dropped, health.crossovers) == (True, 0, 0)
    assert {arm.key: arm.units for arm in health.arms} == {
        arm: list(arms.values()).count(arm) for arm in set(arms.values())
    }
    assert "healthy" in run(server, "health", KEY)
    results = client.experiments.results(KEY)
    assert sum(results.units.values()) == 12
    assert set(results.verdicts.values()) == {"collecting"}
    assert results.effect("calm").low is None
    assert client.experiments.looks(KEY, n_looks=3)[-1].units == results.units
    assert json.loads(run(server, "results", KEY, "--json"))["units"] == dict(results.units)
    assert "collecting" in run(server, "results", KEY, "--all")

    assert "12 exposures" in run(server, "export", KEY, "exposures", "--out", str(tmp_path / "e.parquet"))
    assert sorted(pq.read_table(tmp_path / "e.parquet")["response_id"].to_pylist()) == sorted(
        i.removeprefix("chatcmpl-") for i in ids
    )
    assert "13 outcomes" in run(server, "export", KEY, "outcomes", "--out", str(tmp_path / "o.csv"))
    run(server, "report", KEY, "--out", str(tmp_path / "report.html"))
    assert KEY in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["results"]["units"] == dict(results.units)

    assert "is stopped" in run(server, "kill", KEY, "--reason", "seen enough")
    watched = json.loads(run(server, "watch", KEY, "--json"))
    assert (watched["results"]["state"], watched["health"]["written"]) == ("stopped", 12)
    assert "seen enough" in run(server, "watch", KEY) + run(server, "show", KEY)
    history = [(change.action, change.reason) for change in client.experiments.get(KEY).history]
    assert history[:2] == [("create", "a try"), ("edit", "larger")]
    assert history[-1] == ("kill", "seen enough")
    assert KEY in run(server, "list", "--state", "stopped")
    assert "0 texts" in run(server, "export", KEY, "texts", "--out", str(tmp_path / "t.jsonl"))
    run(server, "archive", KEY, "--reason", "done")
    assert "is purged" in run(server, "purge", KEY, "--reason", "a year is over")
    assert "was purged on" in run(server, "results", KEY, code=2)


def test_what_is_refused_says_why_and_what_is_allowed(server: Server, client: Trimtab, tmp_path: Path) -> None:
    bad = {**DEFINITION, "key": f"{KEY}-2", "arms": [{"key": "a", "weight": 0.7}, {"key": "b", "weight": 0.7}]}
    with pytest.raises(InvalidExperimentError, match="sum to 1"):
        client.experiments.create(bad, reason="x")
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    assert "sum to 1" in run(server, "create", str(tmp_path / "bad.json"), "--reason", "x", code=2)
    assert "no experiment 'nobody'" in run(server, "results", "nobody", code=2)
    made = client.experiments.create({**DEFINITION, "key": f"{KEY}-2"}, reason="x")
    with pytest.raises(ExperimentStateError, match="it allows edit, start, archive"):
        client.experiments.ramp(made.key, 0.5, reason="x")
    client.experiments.start(made.key, reason="x")
    with pytest.raises(StaleRevisionError):
        client.experiments.pause(made.key, reason="x", revision=made.revision)
    run(server, "approve", made.key, "--reason", "x")
    run(server, "stop", made.key, "--reason", "x")


def _written(client: Trimtab, n: int) -> Any:
    for _ in range(200):
        health = client.experiments.health(KEY)
        if health.written >= n:
            return health
    raise AssertionError(health)
