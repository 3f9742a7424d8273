"""`trimtab chat`, `trimtab compare` and `trimtab bench`: a server, from a terminal."""

import asyncio
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import openai
import typer
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trimtab.client.aio import AsyncTrimtab
from trimtab.client.comparison import Arm, Comparison
from trimtab.client.conversation import Conversation, parse_steering
from trimtab.client.errors import TrimtabError, UnsupportedError
from trimtab.client.http import Trimtab
from trimtab.client.load import Load, Round, measure
from trimtab.client.spec import Steering

__all__ = ["AsJson", "Key", "Server", "bench", "chat", "compare", "failures"]

FAILED = 1
REFUSED = 2
HELP = """/steer calm:0.8     steer with a bundle, or with the JSON of a `steering` field
/steer on|off       the same steering, or none
/strength 0.5       the same edits at another strength
/bundles            what the server has loaded
/system TEXT        what the model is told before the chat; without TEXT, nothing
/reset              begin anew
/quit               or end of input"""

Server = Annotated[
    str, typer.Option(envvar="TRIMTAB_SERVER", show_envvar=True, help="http(s)://host:port, or grpc(s)://host:port.")
]
Key = Annotated[str | None, typer.Option(envvar="TRIMTAB_API_KEY", show_envvar=True, help="The server's key.")]
Model = Annotated[str | None, typer.Option(help="The model; over HTTP, the server's first one by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of a reply at most.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; the model's own by default.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same draws.")]


def chat(
    server: Server = "http://127.0.0.1:8000",
    api_key: Key = None,
    model: Model = None,
    steer: Annotated[
        str | None, typer.Option(help="A bundle, `calm` or `calm:0.8`, or the JSON of `steering`.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="Said to the model before the chat.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Chat with a model, steered as you say; under each reply stands the proof of what was applied. /help lists the commands."""
    out = Console(soft_wrap=True, highlight=False)
    with failures(), Trimtab(server, api_key=api_key) as client:
        conversation = Conversation(
            client,
            model or _first_model(client),
            steering=None if steer is None else parse_steering(steer),
            system_prompt=system,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        for line in _lines(out, as_json):
            try:
                if line.startswith("/"):
                    if not _command(line, conversation, client, out):
                        break
                else:
                    _turn(line, conversation, out, as_json)
            except (TrimtabError, openai.APIStatusError) as e:
                _say(str(e))
                if as_json:
                    _print_json(out, {"error": str(e), "code": getattr(e, "code", None)})


def _lines(out: Console, as_json: bool) -> Iterator[str]:
    """What is typed, or piped in."""
    asks = sys.stdin.isatty() and not as_json
    while True:
        try:
            line = input("› ") if asks else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return
        if not asks and not line:
            return
        if line.strip():
            yield line.strip()


def _turn(line: str, conversation: Conversation, out: Console, as_json: bool) -> None:
    if as_json:
        text = "".join(conversation.say(line))
        applied = conversation.applied
        _print_json(out, {"content": text, "steering": None if applied is None else applied.to_dict()})
        return
    for piece in conversation.say(line):
        out.print(piece, end="", markup=False)
    out.print()
    out.print(Text(str(conversation.applied), style="dim"))


def _command(line: str, conversation: Conversation, client: Trimtab, out: Console) -> bool:
    """Whether the chat goes on."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    match name, rest:
        case (("quit" | "exit"), _):
            return False
        case "reset", _:
            conversation.forget()
            _say("begun anew")
        case "steer", "off":
            conversation.is_on = False
            _say("steering is off")
        case "steer", ("on" | "") if conversation.steering is None:
            _say("nothing to steer with yet: /steer NAME, /steer NAME:STRENGTH, or /steer {JSON}")
        case "steer", ("on" | ""):
            conversation.is_on = True
            _say(f"steering is on: {json.dumps(_shown(conversation))}")
        case "steer", text:
            wanted = parse_steering(text)
            client.steering.validate(wanted)
            conversation.steering, conversation.is_on = wanted, True
            _say(f"steering is on: {json.dumps(_shown(conversation))}")
        case "strength", number if conversation.steering is not None:
            try:
                strength = float(number)
            except ValueError:
                _say(f"{number!r} is no strength; /strength 0.5")
                return True
            conversation.steering, conversation.is_on = conversation.steering.at(strength), True
            _say(f"steering is on: {json.dumps(_shown(conversation))}")
        case "bundles", _:
            for bundle in client.steering.bundles():
                _say(f"{bundle.name}: {bundle.behaviour} ({bundle.n_latents} latents at {bundle.hook_point})")
        case "system", text:
            conversation.system_prompt = text or None
            _say("the model is told so" if text else "the model is told nothing")
        case _:
            _say(HELP)
    return True


def _shown(conversation: Conversation) -> dict[str, Any]:
    return {} if conversation.steering is None else conversation.steering.to_dict()


def compare(
    prompt: Annotated[str, typer.Argument(help="What the user says to each arm.")],
    steer: Annotated[
        list[str] | None, typer.Option(help="An arm: `calm`, `calm:0.8`, or the JSON of `steering`; once for each.")
    ] = None,
    prompted: Annotated[
        list[str] | None, typer.Option(help="An arm that is told this as its system prompt, unsteered.")
    ] = None,
    server: Server = "http://127.0.0.1:8000",
    api_key: Key = None,
    model: Model = None,
    text: Annotated[
        bool, typer.Option("--text", help="Continue the prompt as it is, without a chat template.")
    ] = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Ask one prompt with one seed under several steerings, side by side, beside an unsteered control."""
    out = Console(highlight=False)
    with failures(), Trimtab(server, api_key=api_key) as client:
        arms = {"control": Arm()}
        arms |= {what: Arm(parse_steering(what)) for what in steer or ()}
        arms |= {f"told: {what}": Arm(system_prompt=what) for what in prompted or ()}
        messages: Any = None if text else [{"role": "user", "content": prompt}]
        with client.compare_stream(
            arms,
            model=model or _first_model(client),
            messages=messages,
            prompt=prompt if text else None,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        ) as stream:
            if as_json:
                for _ in stream:
                    pass
                _print_json(out, _document(stream.comparison))
                return
            said = dict.fromkeys(arms, "")
            with Live(_columns(said), console=out, transient=True) as live:
                for piece in stream:
                    said[piece.arm] += piece.text
                    live.update(_columns(said))
            found = stream.comparison
            for name, arm in found.arms.items():
                proof = Text(str(arm.steering), style="dim")
                out.print(Panel(Text.assemble(arm.text.strip(), "\n", proof), title=Text(name), title_align="left"))
            out.print(Text(f"seed {found.seed}", style="dim"))


def bench(
    steer: Annotated[
        list[str] | None, typer.Option(help="`calm`, `calm:0.8`, or the JSON of `steering`; once for each.")
    ] = None,
    server: Server = "http://127.0.0.1:8000",
    api_key: Key = None,
    model: Model = None,
    streams: Annotated[int, typer.Option(min=1, max=1024, help="Streams at a time.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each; one more, first, is not counted.")] = 3,
    max_tokens: MaxTokens = 64,
    prompt_words: Annotated[int, typer.Option(min=1, max=10_000, help="Random words in each prompt.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Load a server with streams, unsteered and steered in turns, and say what steering costs there; every reply is proven."""
    out = Console(highlight=False)
    with failures():
        if model is None:
            with Trimtab(server, api_key=api_key) as client:
                model = _first_model(client)
        wanted = {"unsteered": None} | {what: parse_steering(what) for what in steer or ()}
        load = Load(model, streams, max_tokens, prompt_words)
        found = dict(zip(wanted, asyncio.run(_measured(server, api_key, load, wanted, rounds)), strict=True))
    rows = [_row(name, mine, found["unsteered"]) for name, mine in found.items()]
    if as_json:
        _print_json(out, {"streams": streams, "rounds": rounds, "max_tokens": max_tokens, "results": rows})
        return
    table = Table(
        caption=f"medians of {rounds} rounds of {streams} streams; ratios to the unsteered ones of the same round"
    )
    for heading in rows[0]:
        table.add_column(heading.replace("_", " "), justify="left" if heading == "steering" else "right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.3f}" for value in row.values()))
    out.print(table)


async def _measured(
    server: str, api_key: str | None, load: Load, wanted: dict[str, Steering | None], rounds: int
) -> list[list[Round]]:
    async with AsyncTrimtab(server, api_key=api_key, max_retries=0) as client:
        return await measure(client, load, list(wanted.values()), rounds)


def _row(name: str, mine: list[Round], base: list[Round]) -> dict[str, str | float]:
    pairs = list(zip(mine, base, strict=True))
    return {
        "steering": name,
        "tokens_per_second": statistics.median(r.tokens_per_second for r in mine),
        "first_token_seconds": statistics.median(r.median_first for r in mine),
        "time_ratio": statistics.median(m.seconds / b.seconds for m, b in pairs),
        "first_token_ratio": statistics.median(m.median_first / b.median_first for m, b in pairs),
    }


def _columns(said: dict[str, str]) -> Columns:
    return Columns([Panel(Text(text), title=Text(name)) for name, text in said.items()], equal=True, expand=True)


def _document(comparison: Comparison) -> dict[str, Any]:
    arms = [
        {"name": name, "text": arm.text, "finish_reason": arm.finish_reason, "steering": arm.steering.to_dict()}
        for name, arm in comparison.arms.items()
    ]
    return {"seed": comparison.seed, "arms": arms}


def _first_model(client: Trimtab) -> str:
    try:
        names = [card.id for card in client.openai.models.list()]
    except UnsupportedError:
        raise UnsupportedError("over gRPC the model has to be named: --model NAME") from None
    return names[0]


@contextmanager
def failures() -> Iterator[None]:
    """Errors that end a command, as one sentence."""
    try:
        yield
    except (TrimtabError, openai.APIStatusError, ValueError) as e:
        _say(str(e))
        raise typer.Exit(REFUSED) from None
    except openai.APIConnectionError as e:
        _say(f"no server answers there ({e}); start one with `trimtab serve`, or give --server")
        raise typer.Exit(FAILED) from None


def _print_json(out: Console, document: dict[str, Any]) -> None:
    """One line of JSON."""
    out.print(json.dumps(document, ensure_ascii=False), markup=False, soft_wrap=True)


def _say(line: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(line, markup=False)
