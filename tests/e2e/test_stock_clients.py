"""Other people's clients, unchanged: an alias as the model's name is all that they need to steer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import Server

ALIAS = "smollm2-135m-instruct@calm:0.8"
QUESTION = "Write one sentence about the sea."

LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI

chat = ChatOpenAI(
    model={alias!r}, base_url={base!r}, api_key="none", temperature=0, max_completion_tokens=8, include_response_headers=True
)
reply = chat.invoke({question!r})
pieces = [chunk.content for chunk in chat.stream({question!r})]
status = reply.response_metadata["headers"]["x-steering-status"]
json.dump({{"text": reply.content, "streamed": "".join(pieces), "status": status}}, sys.stdout)
"""


@pytest.fixture
def steered(client: openai.OpenAI) -> str:
    """What the `openai` SDK gets."""
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    reply: Any = client.chat.completions.create(model=ALIAS, messages=messages, temperature=0, max_completion_tokens=8)
    assert reply.steering["status"] == "applied"
    return str(reply.choices[0].message.content)


@pytest.mark.slow
def test_langchain(server: Server, steered: str) -> None:
    script = LANGCHAIN.format(alias=ALIAS, base=f"{server.base_url}/v1", question=QUESTION)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"text": steered, "streamed": steered, "status": "applied"}


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_the_llm_tool(server: Server, steered: str, tmp_path: Path, stream: bool) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: calm\n  model_name: {ALIAS}\n  api_base: {server.base_url}/v1\n  api_key_name: none\n"
    )
    command = [str(Path(sys.executable).with_name("llm")), "-m", "calm", "-n", "--key", "none", QUESTION]
    command += ["-o", "temperature", "0", "-o", "max_tokens", "8", *([] if stream else ["--no-stream"])]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == steered.strip()
