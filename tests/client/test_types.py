"""Users' code that is right passes mypy --strict, and code that is wrong does not."""

import subprocess
import sys
from pathlib import Path

import pytest

USES = """
import asyncio

from trimtab.client import Arm, AsyncTrimtab, Latent, Steering, Trimtab, TrimtabError, require_applied

calm = Steering(edits=[Latent("calm", 7).clamp(0.0).during("completion")])


def ask(client: Trimtab) -> str | None:
    reply = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hi"}], temperature=0, steering=calm
    )
    n: int = reply.steering.completion_tokens
    norms: list[float] = [point.max_relative_norm for point in reply.steering.hook_points.values()]
    with client.completions.create(model="m", prompt="hi", stream=True, steering=calm.at(n / 2)) as stream:
        words: list[str] = [choice.text for chunk in stream for choice in chunk.choices]
    found = client.compare({"control": None, "calm": calm, "told": Arm(system_prompt="Be calm.")}, model="m", prompt="hi")
    seed: int = found.seed
    tokens: list[str] = [token.text for token in client.steering.inspect("calm", prompt="hi").tokens]
    stock = client.openai.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hi"}], **calm.openai()
    )
    plan: str | None = require_applied(stock).plan
    return reply.choices[0].message.content or (plan if seed and norms and words and tokens else None)


async def ask_too(url: str) -> str:
    async with AsyncTrimtab(url) as client:
        try:
            stream = await client.completions.create(model="m", prompt="hi", stream=True, steering=calm)
            return "".join([chunk.choices[0].text async for chunk in stream])
        except TrimtabError as e:
            return ", ".join(violation.field for violation in e.violations)


asyncio.run(ask_too("grpc://127.0.0.1:50051"))
"""

MISUSES = """
from trimtab.client import Latent, Steering, Trimtab

Latent("calm", 7).clamp("much")
Latent("calm", 7).during("prompt")
Steering(bundel="calm")
Trimtab("http://x").chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], steering="calm")
Trimtab("http://x").completions.create(model="m", prompt="hi").steering.tokens
"""


@pytest.mark.slow
def test_users_code_passes_mypy_strict(tmp_path: Path) -> None:
    (tmp_path / "uses.py").write_text(USES)
    (tmp_path / "misuses.py").write_text(MISUSES)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache")]
    run = subprocess.run([*command, "uses.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    run = subprocess.run([*command, "misuses.py"], cwd=tmp_path, capture_output=True, text=True)
    wrong = {line.split(":")[1] for line in run.stdout.splitlines() if ": error:" in line}
    assert wrong == {"4", "5", "6", "7", "8"}, run.stdout
