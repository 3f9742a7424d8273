"""The whole way in one run (`make demo`): pairs → latents → bundle → server → steered replies with their proof.

1. `trimtab attribute` finds the latents behind a behaviour of the embedded model and writes a bundle;
2. `trimtab serve` serves the model with it;
3. the *stock* `openai` client asks, all at once: unsteered, steered, over-steered, and a prompt that must not change;
4. the server stops, and plain vLLM, in a process without the plugin, answers the unsteered prompts again.

It exits 0 only if every steered reply was applied as its proof says and differs, and every other reply is plain vLLM's.
"""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
from rich.console import Console

from trimtab.client import Applied, NotAppliedError, Steering, require_applied

MODEL = "smollm2-135m-instruct"
OUT = Path("build/demo")
BUNDLE = OUT / "pretends-human.safetensors"
ATTRIBUTE = ["trimtab", "attribute", "--out", str(BUNDLE)]
DATABASE = f"sqlite:///{OUT / 'trimtab.db'}"
ENGINE_FLAGS = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager"]
READY_SECONDS = 300


class Ask(NamedTuple):
    """One question to the server."""

    title: str
    prompt: str
    strength: float | None
    """Strength of the bundle's recommended edits; None asks unsteered."""
    changes: bool = False
    """Whether the reply must differ from the unsteered one, and not merely carry its proof."""


SHOWS = "What did you do last weekend?"
OTHER = "What is the capital of France?"
ASKS = (
    Ask("unsteered", SHOWS, None),
    Ask("steered", SHOWS, 1.0, changes=True),
    Ask("over-steered", SHOWS, 8.0, changes=True),
    Ask("another prompt, unsteered", OTHER, None),
    Ask("another prompt, steered: must not change", OTHER, 1.0),
)
N_TOKENS = 48
console = Console(highlight=False, soft_wrap=True)
WIDTH = 104


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def main() -> int:
    """Runs the demo; 0 if everything that it claims is true."""
    start = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    _say("1  Which latents make the model claim a human life? Attribution on the shipped pairs:")
    _run(ATTRIBUTE)
    _say("2  Serving the model with that bundle (vLLM, unforked) …")
    with _server() as base_url:
        _say("3  Asking with the stock OpenAI client, all five at once:")
        replies = _ask_all(base_url)
    for ask, reply in zip(ASKS, replies, strict=True):
        _show(ask, reply)
    _say("4  The server has stopped. The unsteered prompts again, on vLLM without the plugin …")
    failures = _failures(replies, _plain([SHOWS, OTHER]))
    for failure in failures:
        _say(f"FAILED: {failure}")
    if not failures:
        proven = sum(ask.strength is not None for ask in ASKS)
        _say(
            f"Found the latents behind one behaviour and wrote {BUNDLE} ({BUNDLE.stat().st_size:,} bytes);\n"
            f"served five requests in one mixed batch, {proven} of them steered, each with counted proof;\n"
            "steering changed the reply that shows the behaviour, more strength changed it more than is good,\n"
            "and left the other prompt's reply as it was, token for token;\n"
            f"unsteered replies are those of vLLM without the plugin. {time.monotonic() - start:.0f} s in all."
        )
    return 1 if failures else 0


def _run(command: list[str]) -> None:
    done = subprocess.run([Path(sys.executable).parent / command[0], *command[1:]])
    if done.returncode:
        raise DemoError(f"`{' '.join(command)}` exited with {done.returncode}")


@contextmanager
def _server() -> Iterator[str]:
    """A running server; yields its base URL, and stops it whatever happens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = ["serve", MODEL, "--bundle", str(BUNDLE), "--port", str(port), "--database", DATABASE]
    serve += ["--", *ENGINE_FLAGS]
    log = OUT / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen([Path(sys.executable).parent / "trimtab", *serve], stdout=out, stderr=out)
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}/readyz", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = "\n".join(log.read_text().splitlines()[-15:])
            raise DemoError(f"the server exited with {process.returncode}; the end of {log}:\n{tail}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass  # Not listening yet, or not ready; the deadline tells.
        time.sleep(0.5)
    raise DemoError(f"the server was not ready after {READY_SECONDS} s; see {log}")


def _ask_all(base_url: str) -> list[Any]:
    client = openai.OpenAI(base_url=base_url, api_key="none")

    def ask(one: Ask) -> Any:
        steering: Any = {} if one.strength is None else Steering(bundle=BUNDLE.stem, strength=one.strength).openai()
        return client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": one.prompt}],
            max_tokens=N_TOKENS,
            temperature=0,
            **steering,
        )

    with client, ThreadPoolExecutor(len(ASKS)) as pool:
        return list(pool.map(ask, ASKS))


def _plain(prompts: list[str]) -> list[str]:
    """The greedy replies of vLLM in a process where no plugin is loaded."""
    environment = {**os.environ, "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    log, replies = OUT / "plain.log", OUT / "plain.json"
    replies.unlink(missing_ok=True)
    with log.open("w") as out:
        done = subprocess.run(
            [sys.executable, __file__, "--plain", *prompts], stdout=out, stderr=out, env=environment, check=False
        )
    if done.returncode or not replies.exists():
        raise DemoError(f"plain vLLM exited with {done.returncode}; see {log}")
    texts: list[str] = json.loads(replies.read_text())
    return texts


def _plain_main(prompts: list[str]) -> None:
    from vllm import LLM, SamplingParams

    from trimtab.attribution.embedded import resolve
    from trimtab.server.engine.plugin import registered

    engine = LLM(resolve(MODEL), dtype="float32", max_model_len=2048, max_num_seqs=8, enforce_eager=True)
    if registered():
        raise DemoError("this vLLM is not plain: the plugin is loaded")
    chats: Any = [[{"role": "user", "content": prompt}] for prompt in prompts]
    outputs = engine.chat(chats, SamplingParams(temperature=0, max_tokens=N_TOKENS), use_tqdm=False)
    (OUT / "plain.json").write_text(json.dumps([output.outputs[0].text for output in outputs]))


def _text(reply: Any) -> str:
    return str(reply.choices[0].message.content)


def _failures(replies: list[Any], plain: list[str]) -> list[str]:
    """What of the demo's claims is not true."""
    unsteered = {ask.prompt: _text(reply) for ask, reply in zip(ASKS, replies, strict=True) if ask.strength is None}
    failures = [
        f"unsteered, {prompt!r} is answered {unsteered[prompt]!r}, and by plain vLLM {text!r}"
        for prompt, text in zip((SHOWS, OTHER), plain, strict=True)
        if unsteered[prompt] != text
    ]
    for ask, reply in zip(ASKS, replies, strict=True):
        if ask.strength is None:
            continue
        try:
            require_applied(reply)
        except NotAppliedError as e:
            failures.append(f"{ask.title}: {e}")
        if (_text(reply) != unsteered[ask.prompt]) != ask.changes:
            failures.append(f"{ask.title}: the reply {'did not change' if ask.changes else 'changed'}")
    return failures


def _say(text: str) -> None:
    console.print(f"\n{text}", style="bold", markup=False)


def _show(ask: Ask, reply: Any) -> None:
    console.print(f"\n{ask.title}" + (f", strength {ask.strength:g}" if ask.strength is not None else ""), style="cyan")
    console.print(f"    {ask.prompt}", markup=False)
    console.print(_wrapped(f"→ {' '.join(_text(reply).split())}"), markup=False)
    console.print(_wrapped(str(Applied.of(reply))), style="dim", markup=False)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="    ", subsequent_indent="      ")


def _guarded(run: Callable[[], int]) -> int:
    try:
        return run()
    except DemoError as e:
        console.print(f"\nerror: {e}", style="bold red", markup=False)
    except KeyboardInterrupt:
        console.print("\nstopped")
    return 1


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if sys.argv[1:2] == ["--plain"]:
        _plain_main(sys.argv[2:])
    else:
        sys.exit(_guarded(main))
