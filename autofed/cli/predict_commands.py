"""What a model is for: predict, evaluate; and the demo, which does it all."""

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
        Path, typer.Option("-o", "--output", metavar="OUT", help="Where labels, uncertainty maps and pictures go.")
    ],
    model: Model = None,
    fold: TheseFolds = None,
    mirroring: Mirroring = True,
    postprocessing: PostprocessingOption = True,
    save_probabilities: SaveProbabilities = False,
    device: DeviceOption = DeviceName.auto,
) -> None:
    """Labels with maps of uncertainty for new scans, on the scans' own grid."""
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
    output: Annotated[Path | None, typer.Option("-o", "--output", help="report.json; a page goes beside it.")] = None,
    processes: Processes = 0,
) -> None:
    """Dice, Jaccard and HD95 per case, class and site, and a page to look at."""
    from autofed import api

    target = output or predictions / "report.json"
    with terminal.progress() as progress:
        found = api.evaluate(predictions, labels, target, processes=count(processes), progress=progress)
        page = _write_page(found, predictions, labels, target)
    for name, scores in [*found.classes.items(), ("mean", found.mean)]:
        typer.echo(
            f"{name:<20} Dice {terminal.number(scores.dice)}  Jaccard {terminal.number(scores.jaccard)}  "
            f"HD95 {terminal.number(scores.hd95_mm, 2)} {found.distance_unit}"
        )
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"written to {target}; look at {page}")


def _write_page(scores: Any, predictions: Path, labels: Path, target: Path) -> Path:
    from autofed import report
    from autofed.inference.prediction_folder import PredictionFolder

    page = target.with_suffix(".html")
    report.page(scores, predictions, labels, PredictionFolder(predictions).runs(), page)
    return page


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where everything goes.")] = Path("demo-autofed"),
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
