"""Pictures of the cases of a folder that `autofed predict` wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from autofed.data import images, read_channels
from autofed.files import write_bytes
from autofed.inference.prediction_folder import PredictedCase, PredictionFolder
from autofed.parallel import Progress, each, silent
from autofed.report.overlays import overlay


def draw_case(case: PredictedCase, reference: Path | None = None, title: str = "") -> bytes:
    """The picture of a predicted case as a PNG, with the outlines of a reference if there is one; see `overlay`."""
    image, geometry = read_channels(case.images)
    return overlay(
        image,
        images.read_labels(case.maps["labels"])[0],
        case.labels,
        geometry,
        reference=None if reference is None else images.read_labels(reference)[0],
        entropy=_read_share(case.maps.get("entropy")),
        mutual_information=_read_share(case.maps.get("mutual_information")),
        title=title,
    )


def draw_predictions(folder: Path, progress: Progress = silent) -> list[Path]:
    """Draw every case of a folder that `autofed predict` wrote into `pictures/{case}.png`; returns these paths.

    A case whose images are no longer where they were is left out, and a picture that is newer than its prediction is
    not drawn again.
    """
    predictions = PredictionFolder(folder)

    def picture(case: PredictedCase) -> Path:
        return predictions.folder / "pictures" / f"{case.case}.png"

    def is_drawn(case: PredictedCase) -> bool:
        path = picture(case)
        return path.is_file() and path.stat().st_mtime_ns >= predictions.summary(case.case).stat().st_mtime_ns

    def draw(case: PredictedCase) -> None:
        write_bytes(picture(case), draw_case(case, title=case.case))

    drawable = [case for case in predictions.cases().values() if case.has_images]
    each(draw, [case for case in drawable if not is_drawn(case)], stage="pictures", progress=progress)
    return [picture(case) for case in drawable]


def _read_share(path: Path | None) -> np.ndarray | None:
    """A map of shares of 1; pictures hold them as 8 bit shares of 255. None if there is no such file."""
    if path is None or not path.is_file():
        return None
    share: np.ndarray = images.read(path).array[0]
    return share / 255 if images.is_picture(path) else share
