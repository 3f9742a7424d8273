"""Makes the shipped SAE: `python -m trimtab.attribution.training`. Stop it when you like; run it again to go on."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trimtab.attribution.embedded import cache_dir, model_path
from trimtab.attribution.training.plan import LAYER, DataPlan, TrainPlan, data_folder, shipped_folder, train_folder

app = typer.Typer(add_completion=False)
console = Console(stderr=True)


class Stage(StrEnum):
    """The stages in order; each one's result is in the cache folder, and running it again goes on."""

    SAMPLES = "samples"
    ACTIVATIONS = "activations"
    TRAIN = "train"
    EXPORT = "export"
    ALL = "all"


def _bar(*extra: str) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    more = (TextColumn("{task.fields[figures]}"),) if extra else ()
    return Progress(*columns, *more, TimeElapsedColumn(), TimeRemainingColumn(), console=console, refresh_per_second=1)


def samples(data: DataPlan) -> None:
    """Let the model answer the prompts."""
    from trimtab.attribution.training.samples import prompts, sample
    from trimtab.attribution.training.sources import fetch

    openings = prompts(fetch(cache_dir() / "sae" / "packages"), data.n_samples, data.seed)
    folder = data_folder(data) / "samples"
    with _bar() as progress:
        task = progress.add_task("own samples", total=len(openings))
        for n in sample(openings, folder, str(model_path()), data.max_new_tokens, data.seed):
            progress.update(task, completed=n)


def activations(data: DataPlan) -> None:
    """Cache activations: held-out documents, text and dialogue, the model's own samples. Several processes may share it."""
    from trimtab.attribution.training.cache import LowerModel, fill, partition
    from trimtab.attribution.training.documents import documents

    model = LowerModel(str(model_path()), LAYER)
    with _bar() as progress:
        for name, chosen in documents(data).items():
            shards = partition(chosen)
            task = progress.add_task(f"activations: {name}", total=len(shards))
            for i in fill(data_folder(data) / "activations", name, shards, model):
                progress.update(task, completed=i + 1)


def train(data: DataPlan, plan: TrainPlan) -> None:
    """Fit the SAE."""
    from trimtab.attribution.training import train as training

    store = training.Store(data_folder(data) / "activations")
    with _bar("figures") as progress:
        task = progress.add_task("training", total=plan.steps, figures="")

        def report(run: training.Run, fvu: float, silent: int) -> None:
            figures = f"FVU {fvu:.3f}, {silent} silent, {store.n_tokens:,} tokens cached"
            progress.update(task, completed=run.step, figures=figures)
            if not console.is_terminal and run.step % 25 == 0:  # A log file shows no bar.
                console.print(f"step {run.step}: {figures}")

        training.train(plan, store, train_folder(data, plan), report)


def export(data: DataPlan, plan: TrainPlan, note: str) -> None:
    """Write the SAE folder from the last checkpoint: weights, statistics, measurements, card."""
    from trimtab.attribution.training.export import export as write

    with _bar() as progress:
        write(data, plan, shipped_folder(), note, progress)
    console.print(f"written: {shipped_folder()}")


@app.command()
def main(
    stage: Annotated[Stage, typer.Option(help="Run one stage only.")] = Stage.ALL,
    note: Annotated[str, typer.Option(help="What the card should say of this run beside its settings.")] = "",
) -> None:
    """Train the shipped SAE from nothing, or go on where the last run stopped."""
    data, plan = DataPlan(), TrainPlan()
    if stage in (Stage.SAMPLES, Stage.ALL):
        samples(data)
    if stage in (Stage.ACTIVATIONS, Stage.ALL):
        activations(data)
    if stage in (Stage.TRAIN, Stage.ALL):
        train(data, plan)
    if stage in (Stage.EXPORT, Stage.ALL):
        export(data, plan, note)


if __name__ == "__main__":
    app()
