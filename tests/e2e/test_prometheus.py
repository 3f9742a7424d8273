"""A real Prometheus scrapes the server. Slow; it needs Debian's `prometheus`."""

import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Server

ROOT = Path(__file__).parents[2]
EXPECTED = (
    'trimtab_requests_total{status="applied"}',
    "trimtab_steering_mismatch_total",
    "trimtab_bundles_loaded",
    "trimtab_kill_switch",
    "trimtab_database_change",
    'trimtab_edited_tokens_total{scope="completion"}',
    "trimtab_request_seconds_bucket",
    "trimtab_admission_seconds_bucket",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:num_requests_waiting",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
)


@pytest.mark.slow
def test_prometheus_scrapes_our_series_and_vllms_and_takes_the_alerts(server: Server, tmp_path: Path) -> None:
    assert shutil.which("prometheus"), "Prometheus is not installed: apt-get install prometheus"
    server.post(
        "/v1/completions", {"model": server.model, "prompt": "hi", "max_tokens": 2, "steering": {"bundle": "calm"}}
    )
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    target = server.base_url.removeprefix("http://")
    (tmp_path / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{ROOT / 'server/deploy/alerts.yml'}]\n"
        f"scrape_configs: [{{job_name: trimtab, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}/api/v1"

        def value(query: str) -> Any:
            try:
                return httpx.get(f"{url}/query", params={"query": query}).json()["data"]["result"]
            except httpx.HTTPError:
                return []

        deadline = time.monotonic() + 60
        while not value('up{job="trimtab"} == 1'):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.5)
        time.sleep(3)
        assert [query for query in EXPECTED if not value(query)] == []
        groups = httpx.get(f"{url}/rules").json()["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) == 9
        assert {rule["health"] for rule in rules} == {"ok"}
        firing = [rule["name"] for rule in rules if rule["state"] == "firing"]
        assert firing == []
    finally:
        process.terminate()
        process.wait(30)
