"""Two replicas on one PostgreSQL, with keys: what one is told the other goes by within a second, and what each caller may do.

Slow: two engines. It needs Debian's `postgresql`.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bundles import random_bundle
from tests.conftest import STOP_SECONDS, TRIMTAB, address
from tests.e2e.test_operations import comm, until
from tests.postgresql import Cluster, cluster
from tests.processes import descendants
from trimtab.attribution.bundle import ModelIdentity

pytestmark = pytest.mark.slow
MODEL = "smollm2-135m-instruct"
OPERATOR = "the-operators-own-key-of-the-test"
STALE_SECONDS = 2.0
WITHIN = 1.0
N_REQUESTS = 6
"""That a replica takes on at a time."""


@dataclass(frozen=True)
class Replica:
    """One server of the two."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, method: str, path: str, document: Any = None, key: str = OPERATOR, **options: Any) -> httpx.Response:
        """The reply to a request with a key."""
        headers = {"authorization": f"Bearer {key}", **options.pop("headers", {})}
        return httpx.request(method, self.url + path, json=document, headers=headers, timeout=60, **options)

    def generate(self, steering: Any = None, key: str = OPERATOR, **fields: Any) -> httpx.Response:
        """The reply to a completion."""
        ask = {"model": MODEL, "prompt": "The sea is", "max_tokens": 2, "temperature": 0, **fields}
        return self.ask("POST", "/v1/completions", ask if steering is None else {**ask, "steering": steering}, key)

    @contextmanager
    def stream(self, steering: Any, n_tokens: int = 900, **fields: Any) -> Iterator[Callable[[], Any]]:
        """A reply that is being read; the call gives its last event, and when that came."""
        ask = {
            "model": MODEL,
            "prompt": "The sea is",
            "max_tokens": n_tokens,
            "ignore_eos": True,
            "stream": True,
            **fields,
        }
        document = ask if steering is None else {**ask, "steering": steering}
        headers = {"authorization": f"Bearer {OPERATOR}"}
        with (
            httpx.stream("POST", f"{self.url}/v1/completions", json=document, headers=headers, timeout=60) as response,
            ThreadPoolExecutor(1) as pool,
        ):
            lines = response.iter_lines()
            next(lines)

            def rest() -> tuple[Any, float]:
                last = [line for line in lines if line][-1].removeprefix("data: ")
                return last if last == "[DONE]" else json.loads(last), time.monotonic()

            yield pool.submit(rest).result


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Cluster]:
    with cluster() as running:
        yield running


@pytest.fixture(scope="module")
def environment(postgresql: Cluster) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRIMTAB_") or k == "TRIMTAB_CACHE"}
    return kept | {
        "TRIMTAB_DATABASE": postgresql.url,
        "TRIMTAB_SECRET": "s" * 64,
        "TRIMTAB_STALE_AFTER_SECONDS": str(STALE_SECONDS),
    }


@pytest.fixture(scope="module")
def fleet(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory, embedded_identity: ModelIdentity
) -> Iterator[list[Replica]]:
    folder = tmp_path_factory.mktemp("replicas")
    with ExitStack() as stack:
        replicas = []
        for i in range(2):
            log = folder / f"{i}.log"
            command = [str(TRIMTAB), "serve", MODEL, "--port", "0", "--max-requests", str(N_REQUESTS)]
            flags = ["--", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16"]
            process = subprocess.Popen(
                [*command, *flags],
                stdout=stack.enter_context(log.open("wb")),
                stderr=subprocess.STDOUT,
                env=environment | {"TRIMTAB_API_KEY": OPERATOR},
                start_new_session=True,
            )
            stack.callback(_gone, process)
            replicas.append((process, log))
        yield [Replica(address(process, log), process, log) for process, log in replicas]


def _gone(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        process.terminate()
        process.wait(STOP_SECONDS)


@pytest.fixture(scope="module")
def calm(fleet: list[Replica], embedded_identity: ModelIdentity) -> str:
    """`calm:v1`, active on both replicas."""
    return published(fleet, random_bundle(embedded_identity, layer=14).to_bytes())


def published(fleet: list[Replica], data: bytes) -> str:
    """A new version, uploaded to the first replica and active on both."""
    headers = {"authorization": f"Bearer {OPERATOR}", "content-type": "application/octet-stream"}
    made = httpx.post(f"{fleet[0].url}/admin/v1/bundles", content=data, headers=headers, timeout=30).json()
    reference = str(made["reference"])
    fleet[0].ask("POST", f"/admin/v1/bundles/{reference}/promote", {"default": True})
    until(lambda: all(replica.generate({"bundle": reference}).status_code == 200 for replica in fleet))
    return reference


def test_two_replicas_serve_one_registry(fleet: list[Replica], calm: str) -> None:
    replies = [replica.generate({"bundle": "calm"}).json() for replica in fleet]
    assert [reply["steering"]["bundles"] for reply in replies] == [[calm], [calm]]
    assert replies[0]["steering"]["plan"] == replies[1]["steering"]["plan"]
    assert replies[0]["choices"] == replies[1]["choices"]


def test_a_version_that_one_replica_revokes_stops_on_the_other_within_a_second(
    fleet: list[Replica], embedded_identity: ModelIdentity, record_property: Callable[[str, Any], None]
) -> None:
    reference = published(fleet, random_bundle(embedded_identity, name="rude", layer=9, seed=8).to_bytes())
    with fleet[1].stream({"bundle": reference}) as rest:
        start = time.monotonic()
        assert fleet[0].ask("POST", f"/admin/v1/bundles/{reference}/revoke", {"reason": "rude"}).status_code == 200
        assert fleet[0].generate({"bundle": reference}).status_code == 410
        until(lambda: validate(fleet[1], reference) == 410)
        stopped = time.monotonic() - start
        last, ended = rest()
    assert last["error"]["code"] == "bundle_revoked"
    record_property("revocation_seconds", [stopped, ended - start])
    assert max(stopped, ended - start) < WITHIN


def validate(replica: Replica, reference: str) -> int:
    return replica.ask("POST", "/v1/steering/validate", {"steering": {"bundle": reference}}).status_code


def test_the_kill_switch_at_a_terminal_reaches_both_within_a_second_even_one_whose_engine_hangs(
    fleet: list[Replica], calm: str, environment: dict[str, str], record_property: Callable[[str, Any], None]
) -> None:
    hung = [pid for pid in descendants(fleet[1].process.pid) if "EngineCore" in comm(pid)]
    assert hung
    with fleet[0].stream({"bundle": calm}) as first, fleet[1].stream({"bundle": calm}) as second:
        for pid in hung:
            os.kill(pid, signal.SIGSTOP)
        try:
            command = [str(TRIMTAB), "kill", "on", "--reason", "a test", "--json"]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            thrown = json.loads(done.stdout)
            now = time.time()
            start = time.monotonic() - (now - _seconds(thrown["at"]))
            ends = [first(), second()]
            assert [last["error"]["code"] for last, _ in ends] == ["steering_killed", "steering_killed"]
            record_property("kill_seconds", [ended - start for _, ended in ends])
            assert max(ended - start for _, ended in ends) < WITHIN
        finally:
            for pid in hung:
                os.kill(pid, signal.SIGCONT)
    assert [replica.generate({"bundle": calm}).headers["x-steering-status"] for replica in fleet] == ["killed"] * 2
    fleet[1].ask("DELETE", "/admin/v1/kill")
    until(lambda: fleet[0].generate({"bundle": calm}).headers["x-steering-status"] == "applied")


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


def test_replicas_assign_alike_and_a_kill_at_one_ends_replies_of_the_other_within_a_second(
    fleet: list[Replica], calm: str, record_property: Callable[[str, Any], None]
) -> None:
    definition = {
        "key": "two-replicas",
        "hypothesis": "They agree.",
        "unit": "user",
        "arms": [{"key": "control", "weight": 0.5}, {"key": "calm", "weight": 0.5, "steering": {"bundle": calm}}],
        "primary": {"key": "harm", "outcome": "harm"},
        "minimum_effect": 0.1,
    }
    url = "/admin/v1/experiments"
    assert fleet[0].ask("POST", url, {"definition": definition, "reason": "new"}).status_code == 201
    assert fleet[0].ask("POST", f"{url}/two-replicas/start", {"reason": "go"}).status_code == 200
    until(lambda: "experiment" in fleet[1].generate(user="user-0").json()["steering"])
    arms = [
        [replica.generate(user=f"user-{i}", max_tokens=1).json()["steering"]["experiment"]["arm"] for i in range(20)]
        for replica in fleet
    ]
    assert arms[0] == arms[1]
    treated = f"user-{arms[0].index('calm')}"
    with fleet[1].stream(None, user=treated) as rest:
        start = time.monotonic()
        assert fleet[0].ask("POST", f"{url}/two-replicas/kill", {"reason": "rude"}).status_code == 200
        last, ended = rest()
    assert last["error"]["code"] == "steering_killed"
    record_property("experiment_kill_seconds", ended - start)
    assert ended - start < WITHIN

    def written() -> int:
        health = [replica.ask("GET", f"{url}/two-replicas/health").json() for replica in fleet]
        assert [one["exposures"]["dropped"] for one in health] == [0, 0]
        return min(int(one["exposures"]["written"]) for one in health)

    until(lambda: written() == 42)


def test_a_key_does_what_its_policy_says_and_no_more(fleet: list[Replica], calm: str) -> None:
    policy = {"bundles": ["calm"], "strength": [0.0, 1.0]}
    asked = {"label": "app", "scopes": ["infer"], "policy": policy}
    made = fleet[0].ask("POST", "/admin/v1/keys", asked).json()
    key = made["key"]
    until(lambda: fleet[1].ask("GET", "/v1/models", key=key).status_code == 200)
    edits = {"edits": [{"bundle": "calm", "latent": 7, "operation": "ablate"}]}
    for replica in fleet:
        assert replica.generate({"bundle": "calm"}, key).json()["steering"]["status"] == "applied"
        assert replica.generate({"bundle": "calm", "strength": 1.5}, key).status_code == 400
        assert replica.generate(edits, key).status_code == 403
        for path in ("/admin/v1/keys", "/metrics", "/admin/v1/audit"):
            assert replica.ask("GET", path, key=key).status_code == 403
        assert replica.ask("GET", "/v1/models", key=key[:-1] + "x").status_code == 401
        assert httpx.get(f"{replica.url}/v1/models").status_code == 401
    assert key not in "".join(replica.log.read_text() for replica in fleet)
    start = time.monotonic()
    fleet[0].ask("POST", f"/admin/v1/keys/{made['id']}/revoke", {"reason": "over"})
    until(lambda: fleet[1].ask("GET", "/v1/models", key=key).status_code == 401)
    assert time.monotonic() - start < WITHIN


def test_a_default_may_not_be_left_out_but_by_a_key_that_may(fleet: list[Replica], calm: str) -> None:
    keys = [
        fleet[0].ask("POST", "/admin/v1/keys", {"label": "x", "scopes": ["infer"], "policy": {"opt_out": may}}).json()
        for may in (False, True)
    ]
    bound, free = (key["key"] for key in keys)
    path = f"/admin/v1/defaults/key/{keys[0]['id']}"
    assert fleet[0].ask("PUT", path, {"steering": {"bundle": calm, "strength": 0.5}}).status_code == 200
    reply = fleet[0].generate(None, bound).json()
    assert (reply["steering"]["status"], reply["steering"]["source"]) == ("applied", "key")
    for steering in ({"opt_out": True}, {"bundle": calm}):
        assert fleet[0].generate(steering, bound).json()["error"]["code"] == "forbidden"
    assert fleet[0].generate({"opt_out": True}, free).json()["steering"]["status"] == "not_requested"
    assert fleet[0].generate(None, free).json()["steering"]["status"] == "not_requested"


def test_limits_are_a_429_of_the_callers_and_a_503_of_the_server(fleet: list[Replica]) -> None:
    def make(**policy: int) -> str:
        made = fleet[0].ask("POST", "/admin/v1/keys", {"label": "x", "scopes": ["infer"], "policy": policy})
        return str(made.json()["key"])

    often = make(requests_per_minute=3)
    replies = [fleet[0].generate(None, often) for _ in range(4)]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429]
    assert 1 <= int(replies[3].headers["retry-after"]) <= 61

    def at_once(key: str, n: int) -> list[httpx.Response]:
        with ThreadPoolExecutor(n) as pool:
            # Long enough that none is over before the last one has come, on an idle machine too.
            asked = [pool.submit(fleet[0].generate, None, key, max_tokens=240, ignore_eos=True) for _ in range(n)]
            return [reply.result() for reply in asked]

    two = at_once(make(concurrent_requests=2), 5)
    assert sorted(reply.status_code for reply in two) == [200, 200, 429, 429, 429]
    full = at_once(OPERATOR, N_REQUESTS + 4)
    assert sorted(reply.status_code for reply in full) == [200] * N_REQUESTS + [503] * 4
    refused = next(reply for reply in full if reply.status_code == 503)
    assert (refused.json()["error"]["code"], refused.headers["retry-after"]) == ("overloaded", "5")


def test_a_replica_without_its_database_steers_nothing_it_cannot_check(
    fleet: list[Replica], calm: str, postgresql: Cluster
) -> None:
    postgresql.stop()
    try:
        until(lambda: fleet[0].ask("GET", "/readyz").status_code == 503)
        assert fleet[0].ask("GET", "/readyz").json() == {"status": "stale"}
        steered = fleet[0].generate({"bundle": calm})
        assert (steered.status_code, steered.json()["error"]["code"]) == (503, "unavailable")
        assert fleet[0].generate(None).status_code == 200
        assert fleet[0].ask("POST", "/admin/v1/kill", {"reason": "x"}).status_code == 503
        assert fleet[0].ask("GET", "/livez").status_code == 200
    finally:
        postgresql.start()
    until(lambda: fleet[0].ask("GET", "/readyz").status_code == 200)
    assert fleet[0].generate({"bundle": calm}).json()["steering"]["status"] == "applied"


def test_a_second_signal_does_not_wait_for_streams(fleet: list[Replica], calm: str) -> None:
    """The first lets them finish, as the shared server shows at its end. The engine takes its own time to end, afterwards."""
    replica = fleet[1]
    with replica.stream({"bundle": calm}) as rest:
        replica.process.terminate()
        until(lambda: replica.ask("GET", "/readyz").json() == {"status": "draining"})
        assert replica.process.poll() is None
        start = time.monotonic()
        replica.process.terminate()
        with pytest.raises(httpx.RemoteProtocolError):
            rest()
        assert time.monotonic() - start < 5
    assert replica.process.wait(STOP_SECONDS) == 0
    assert fleet[0].generate({"bundle": calm}).status_code == 200
