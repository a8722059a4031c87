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

    `labels` is a folder of label files, or a folder of sites in raw layout, whose scores are then also given by site.
    """
    folder = Path(predictions)
    names = _label_names(folder, Path(labels))
    PredictionFolder(folder).refuse_unfinished()
    report = evaluate_folder(folder, Path(labels), names, processes=processes, progress=progress)
    if output is not None:
        report.save(Path(output))
    return report


def _label_names(predictions: Path, labels: Path) -> dict[str, Values]:
    """Names of the label values: from what predict wrote, or from the dataset.json of the references."""
    about = predictions / ABOUT
    beside = [labels / "dataset.json", labels.parent / "dataset.json", *sorted(labels.glob("*/dataset.json"))]
    source = next((p for p in (about, *beside) if p.is_file()), None)
    if source is None:
        missing = [p for p in (predictions, labels) if not p.is_dir()]
        raise ValidationErrors(
            "evaluate",
            [f"{p}: there is no such folder" for p in missing]
            or [f"nothing says what the label values mean; expected {about}, or a dataset.json beside {labels}"],
        )
    return declared_labels(source)
