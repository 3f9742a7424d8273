"""`trimtab chat`, `trimtab compare` and `trimtab bench`, as they are typed, against the real server."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Server

TRIMTAB = str(Path(sys.executable).with_name("trimtab"))
GREEDY = ("--temperature", "0", "--max-tokens", "8")


def trimtab(*args: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run([TRIMTAB, *args], input=typed, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_a_chat_is_steered_as_it_is_told_turn_by_turn(server: Server, transport: str) -> None:
    typed = (
        "What is the sea?\n/steer calm:4\n/reset\nWhat is the sea?\n/strength 0\n/reset\nWhat is the sea?\n/steer off\n"
    )
    typed += "/reset\nWhat is the sea?\n/quit\nnever said\n"
    address = server.base_url if transport == "http" else f"grpc://{server.grpc}"
    run = trimtab("chat", "--server", address, "--model", server.model, *GREEDY, "--json", typed=typed)
    assert run.returncode == 0, run.stderr
    turns = [json.loads(line) for line in run.stdout.splitlines()]
    assert [turn["steering"]["status"] for turn in turns] == ["not_requested", "applied", "applied", "not_requested"]
    assert turns[0]["content"] == turns[2]["content"] == turns[3]["content"] != turns[1]["content"]
    assert turns[1]["steering"]["completion_tokens"] > 0
    assert 'steering is on: {"bundle": "calm", "strength": 4.0}' in run.stderr


def test_the_proof_stands_under_each_reply(server: Server) -> None:
    edits = json.dumps({"edits": [{"bundle": "calm", "latent": 7, "operation": "add", "amount": 30.0}]})
    typed = f"/bundles\n/steer {edits}\nHello!\nAnd then?\n"
    run = trimtab("chat", "--server", server.base_url, *GREEDY, typed=typed)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("applied sha256:") == 2
    assert "at blocks.14.resid_post" in run.stdout
    assert "calm: random rows, for tests (3 latents at blocks.14.resid_post)" in run.stderr


def test_a_turn_that_is_refused_is_told_and_the_chat_goes_on(server: Server) -> None:
    typed = "/steer clam\n/steer\n/strength x\n/what\nHello!\n"
    run = trimtab("chat", "--server", server.base_url, *GREEDY, typed=typed)
    assert run.returncode == 0
    assert "bundle 'clam' is not loaded" in run.stderr
    assert "nothing to steer with yet" in run.stderr
    assert "/steer calm:0.8" in run.stderr
    assert "not_requested" in run.stdout


def test_a_terminal_is_asked(server: Server) -> None:
    """Over a pseudo-terminal: the prompt, a reply, and the end of input."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [TRIMTAB, "chat", "--server", server.base_url, "--steer", "calm", *GREEDY],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "dumb", "NO_COLOR": "1"},
    )
    os.close(follower)
    seen = _until(leader, "› ")
    os.write(leader, b"Hello!\n")
    seen = _until(leader, "largest")
    assert "applied sha256:" in seen
    os.write(leader, b"/quit\n")
    assert process.wait(60) == 0
    os.close(leader)


def _until(terminal: int, text: str) -> str:
    seen = ""
    deadline = time.monotonic() + 60
    while text not in seen:
        assert time.monotonic() < deadline, seen
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


def test_arms_are_compared(server: Server) -> None:
    arms = ["--steer", "calm:4", "--steer", "calm:0", "--prompted", "Be calm."]
    run = trimtab("compare", "What is the sea?", *arms, "--server", server.base_url, "--seed", "3", *GREEDY, "--json")
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    assert found["seed"] == 3
    said = {arm["name"]: arm for arm in found["arms"]}
    assert list(said) == ["control", "calm:4", "calm:0", "told: Be calm."]
    assert said["control"]["text"] == said["calm:0"]["text"] != said["calm:4"]["text"]
    assert said["calm:4"]["steering"]["completion_tokens"] > 0
    run = trimtab("compare", "The sea is", *arms[:2], "--text", "--server", server.base_url, *GREEDY)
    assert run.returncode == 0, run.stderr
    assert "applied sha256:" in run.stdout
    assert "control" in run.stdout


@pytest.mark.parametrize("transport", ["http", pytest.param("grpc", marks=pytest.mark.slow)])
def test_a_server_is_loaded_steered_and_not_in_turns(server: Server, transport: str) -> None:
    address = server.base_url if transport == "http" else f"grpc://{server.grpc}"
    load = ["--streams", "3", "--rounds", "1", "--max-tokens", "4", "--model", server.model, "--steer", "calm"]
    run = trimtab("bench", "--server", address, *load, "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert [row["steering"] for row in found["results"]] == ["unsteered", "calm"]
    assert (found["results"][0]["time_ratio"], found["results"][0]["first_token_ratio"]) == (1.0, 1.0)
    assert all(row["tokens_per_second"] > 0 and row["first_token_seconds"] > 0 for row in found["results"])


@pytest.mark.parametrize(
    ("args", "said", "code"),
    [
        (("chat", "--steer", "calm:much"), "'much' is no strength", 2),
        (("compare", "hi", "--steer", "clam"), "bundle 'clam' is not loaded", 2),
        (("bench", "--steer", "clam"), "bundle 'clam' is not loaded", 2),
        (("chat", "--steer", '{"edits": 1}'), "is no `steering` field", 2),
    ],
)
def test_what_cannot_be_done_is_one_sentence(server: Server, args: tuple[str, ...], said: str, code: int) -> None:
    run = trimtab(*args, "--server", server.base_url)
    assert (run.returncode, said in run.stderr) == (code, True), run.stderr
    assert "Traceback" not in run.stderr


def test_no_server_is_one_sentence() -> None:
    run = trimtab("chat", "--server", "http://127.0.0.1:9", typed="hi\n")
    assert run.returncode == 1
    assert "no server answers there" in run.stderr
    run = trimtab("chat", "--server", "127.0.0.1:9", typed="hi\n")
    assert (run.returncode, "give the server's root" in run.stderr) == (2, True)


def test_commands_and_their_options_are_completed() -> None:
    def completed(*words: str) -> str:
        environment = {
            **os.environ,
            "_TRIMTAB_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        return subprocess.run([TRIMTAB], capture_output=True, text=True, env=environment).stdout

    assert completed("trimtab", "ch").split() == ["chat"]
    assert "--temperature" in completed("trimtab", "chat", "--te").split()
