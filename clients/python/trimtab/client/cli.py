"""The `trimtab` command: a shell that loads a room's commands when they are called, so that the base install stays light.

Rooms add commands by entry point (group `trimtab.commands`): a function that typer can run, or a Typer app. Arguments reach them
as they were typed, `--` and all.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["main"]

GROUP = "trimtab.commands"
_ABOUT = {
    "attribute": "Find the latents behind a behaviour, measure them, and write a bundle.",
    "bench": "Load a server with streams, unsteered and steered in turns, and say what steering costs there.",
    "bundle": "Build, show, compare and verify bundles.",
    "chat": "Chat with a served model, steered as you say, with the proof under each reply.",
    "collect": "Sample a model, grade the completions, and write pairs.",
    "compare": "One prompt with one seed under several steerings, side by side.",
    "config": "Settings: what they are, and where each came from.",
    "doctor": "What keeps a server from starting or steering here.",
    "experiment": "A/B tests of mitigations: create, ramp, watch, kill; results that are valid at every look.",
    "keys": "API keys: make, rotate, revoke, list.",
    "kill": "The kill switch: all steering off, on every replica.",
    "model": "Fetch and check the model that Trimtab carries.",
    "openapi": "The OpenAPI document of the HTTP API.",
    "registry": "Versions of bundles: upload, promote, revoke; who changed what.",
    "validate": "Steer with a bundle at several strengths on a server, grade the text, and choose what to recommend.",
    "report": "Write what was found and measured as one HTML file.",
    "serve": "Serve a model whose requests can be steered, over the OpenAI API.",
}
_EXTRA = {
    "trimtab.attribution": "trimtab[attribution]",
    "trimtab.client": "trimtab[reports]",
    "trimtab.server": "trimtab[cpu]",
}

# fmt: off
_HEAVY = frozenset({
    "accelerate", "alembic", "fastapi", "gguf", "jinja2", "limits", "matplotlib", "numpy", "platformdirs", "prometheus_client",
    "pyarrow", "pydantic_settings", "pythonjsonlogger", "safetensors", "scipy", "sqlalchemy", "torch", "transformers",
    "uvicorn", "vllm", "yaml",
})
# fmt: on
"""What the extras bring; the base install has none of it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line, that of the process unless given."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    if args and args[0] in commands:
        _run(commands[args[0]], args[1:])
    else:
        _shell(commands, _completing())(args=args, prog_name="trimtab")


def _completing() -> str | None:
    """The command whose options a shell wants to complete; None when it wants none, or that of the command itself."""
    words = os.environ.get("COMP_WORDS", "").split() if "_TRIMTAB_COMPLETE" in os.environ else []
    return words[1] if len(words) > 2 else None


def _run(entry: EntryPoint, args: list[str]) -> None:
    room = ".".join(entry.module.split(".")[:2])
    try:
        command = entry.load()
        if not isinstance(command, typer.Typer):
            function, command = command, typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
            command.command()(function)
        command(args=args, prog_name=f"trimtab {entry.name}")
    except ModuleNotFoundError as e:
        package = (e.name or "").split(".")[0]
        if room not in _EXTRA or package not in _HEAVY:
            raise
        hint = " (on an NVIDIA GPU 'trimtab[cuda]')" if room == "trimtab.server" else ""
        Console(stderr=True, soft_wrap=True).print(
            f"trimtab {entry.name} needs {package}, which is not installed: pip install '{_EXTRA[room]}'{hint}",
            markup=False,
            highlight=False,
        )
        raise SystemExit(2) from e


def _shell(commands: Mapping[str, EntryPoint], wanted: str | None) -> typer.Typer:
    """The app behind `--help`, `--version` and completion; it names the commands, and loads the one that is `wanted`."""
    app = typer.Typer(
        no_args_is_help=True,
        help="Find the latents that cause a behaviour, and steer them per request on vLLM, with proof in every reply.",
    )

    def shell(
        _: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
        ] = False,
    ) -> None:
        pass

    app.callback()(shell)
    for name, entry in sorted(commands.items()):
        about = _ABOUT.get(name, f"From {entry.module}.")
        command: Any = entry.load() if name == wanted else lambda: None
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name, help=about)(command)
    return app


def _version(asked: bool) -> None:
    if asked:
        Console(soft_wrap=True).print(f"trimtab {version('trimtab')}", markup=False, highlight=False)
        raise typer.Exit
