"""Using a model: predict, evaluate; and the demo of the whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autofed.cli import terminal
from autofed.cli.options import (
    DemoTask,
    DeviceName,
    DeviceOption,
    LabelsArgument,
    Mirroring,
    Model,
    PostprocessingOption,
    PredictionsArgument,
    Processes,
    RunsArgument,
    SaveProbabilities,
    TheseFolds,
    count,
)


def predict(
    runs: RunsArgument,
    images: Annotated[Path, typer.Option("-i", "--images", help="A folder of scans, or one file.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="OUT", help="The folder for labels, uncertainty maps and pictures."),
    ],
    model: Model = None,
    fold: TheseFolds = None,
    mirroring: Mirroring = True,
    postprocessing: PostprocessingOption = True,
    save_probabilities: SaveProbabilities = False,
    device: DeviceOption = DeviceName.auto,
) -> None:
    """Predict labels and uncertainty maps for new scans, on the scans' own grid."""
    from autofed import api, report

    with terminal.progress() as progress:
        api.predict(
            runs,
            images,
            output,
            model=model,
            folds=fold or [],
            mirroring=mirroring,
            postprocessing=postprocessing,
            device=device.value,
            save_probabilities=save_probabilities,
            progress=progress,
            say=typer.echo,
        )
        pictures = report.draw_predictions(output, progress)
    if pictures:
        typer.echo(f"look at the pictures in {pictures[0].parent}")


def evaluate(
    predictions: PredictionsArgument,
    labels: LabelsArgument,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A JSON file, and the page beside it; default OUT/report.json."),
    ] = None,
    processes: Processes = 0,
) -> None:
    """Score predictions: Dice, Jaccard and HD95 per case, class and site, and an HTML page."""
    from autofed import api

    target = output or predictions / "report.json"
    with terminal.progress() as progress:
        scores = api.evaluate(predictions, labels, target, processes=count(processes), progress=progress)
        page = _write_page(scores, predictions, labels, target)
    for name, row in [*scores.classes.items(), ("mean", scores.mean)]:
        typer.echo(
            f"{name:<20} Dice {terminal.number(row.dice)}  Jaccard {terminal.number(row.jaccard)}  "
            f"HD95 {terminal.number(row.hd95_mm, 2)} {scores.distance_unit}"
        )
    for note in scores.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"written to {target}; look at {page}")


def _write_page(scores: Any, predictions: Path, labels: Path, target: Path) -> Path:
    from autofed import report
    from autofed.inference.prediction_folder import PredictionFolder

    page = target.with_suffix(".html")
    report.page(scores, predictions, labels, PredictionFolder(predictions).runs(), page)
    return page


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder for everything.")] = Path("demo-autofed"),
    task: Annotated[
        DemoTask, typer.Option(help="3d: hippocampus in MRI; 2d: nuclei in microscopy.")
    ] = DemoTask.volumes,
    minutes: Annotated[float, typer.Option(help="Training time to plan for.")] = 2.5,
) -> None:
    """Run the whole pipeline on example scans that come with autofed: plan, preprocess, train, predict, evaluate."""
    from autofed.api import demo as shipped

    with terminal.progress() as progress:
        result = shipped.run(output, task.value, minutes=minutes, progress=progress)
    typer.echo(f"mean Dice on {result.cases} scans that no site has seen: {terminal.number(result.dice)}")
    typer.echo(f"pictures: {result.pictures}")
    typer.echo(f"page:     {result.page}")
