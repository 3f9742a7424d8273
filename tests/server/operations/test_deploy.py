import json
import re
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from trimtab.server.service.metrics import Metrics

DEPLOY = Path(__file__).parents[3] / "server/deploy"


def series() -> set[str]:
    """The names of our own series."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.request_seconds.labels("none", "2xx").observe(1)
    metrics.exposures_dropped.labels("none")
    text = generate_latest(registry).decode()
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}


@pytest.mark.parametrize("name", ["alerts.yml", "grafana-dashboard.json"])
def test_every_series_of_ours_that_is_asked_for_is_there(name: str) -> None:
    asked = set(re.findall(r"trimtab_[a-z_]+(?=[{\[) ]|$)", (DEPLOY / name).read_text(), re.MULTILINE))
    assert asked
    assert asked <= series()


def test_the_dashboards_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", ["check rules alerts.yml", "test rules alerts_test.yml", "check config --syntax-only prometheus.yml"]
)
def test_promtool_finds_nothing_wrong(arguments: str) -> None:
    """It needs Debian's `prometheus`."""
    done = subprocess.run(["promtool", *arguments.split()], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
