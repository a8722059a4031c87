"""Scores of a folder of predictions."""

from __future__ import annotations

from pathlib import Path

from autofed.data.labels import Values, declared_labels
from autofed.errors import ValidationErrors
from autofed.files import PathLike
from autofed.inference.prediction_folder import ABOUT, PredictionFolder
from autofed.inference.scores import Report, evaluate_folder
from autofed.parallel import Progress, silent


def evaluate(
    predictions: PathLike,
    labels: PathLike,
    output: PathLike | None = None,
    *,
    processes: int = 1,
    progress: Progress = silent,
) -> Report:
    """Dice, Jaccard and HD95 of a folder of predictions against reference labels, per case, class and site.

    Args:
        predictions: The folder that `predict` wrote, or any folder of label maps.
        labels: A folder of reference labels, or of sites in raw layout, whose scores are then also given by site.
        output: A JSON file to write the report to; nothing is written without.
        processes: How many processes score cases.
        progress: Called with a stage, how many cases are done, and how many there are.

    Raises:
        ValidationErrors: If a prediction has no reference or another grid, is incomplete, or label names are unknown.
    """
    folder = Path(predictions)
    names = _label_names(folder, Path(labels))
    PredictionFolder(folder).refuse_unfinished()
    report = evaluate_folder(folder, Path(labels), names, processes=processes, progress=progress)
    if output is not None:
        report.save(Path(output))
    return report


def _label_names(predictions: Path, labels: Path) -> dict[str, Values]:
    """Names of the label values: from prediction.json, or from the dataset.json of the references."""
    about = predictions / ABOUT
    beside = [labels / "dataset.json", labels.parent / "dataset.json", *sorted(labels.glob("*/dataset.json"))]
    source = next((p for p in (about, *beside) if p.is_file()), None)
    if source is None:
        missing_folders = [p for p in (predictions, labels) if not p.is_dir()]
        raise ValidationErrors(
            "evaluate",
            [f"{p}: there is no such folder" for p in missing_folders]
            or [f"the meaning of the label values is unknown; expected {about}, or a dataset.json beside {labels}"],
        )
    return declared_labels(source)
