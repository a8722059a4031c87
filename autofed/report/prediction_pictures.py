"""A folder that `autofed predict` filled, and the pictures of its cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autofed.data import images, read_channels
from autofed.files import read_json, write_bytes
from autofed.parallel import Progress, each, silent
from autofed.report.overlays import overlay


@dataclass(frozen=True)
class Predicted:
    """A case of a folder of predictions, as the JSON file beside its maps describes it."""

    case: str
    images: tuple[Path, ...]
    labels: Mapping[str, Any]
    maps: Mapping[str, Path]

    @property
    def has_images(self) -> bool:
        """Whether all images are still where they were."""
        return all(path.is_file() for path in self.images)

    def draw(self, reference: Path | None = None, title: str = "") -> bytes:
        """Its picture as a PNG, with the outlines of a reference if there is one; see `overlay`."""
        image, geometry = read_channels(self.images)
        return overlay(
            image,
            images.read_labels(self.maps["labels"])[0],
            self.labels,
            geometry,
            reference=None if reference is None else images.read_labels(reference)[0],
            entropy=_read_share(self.maps.get("entropy")),
            mutual_information=_read_share(self.maps.get("mutual_information")),
            title=title,
        )


def read_folder(folder: Path) -> dict[str, Predicted]:
    """The cases of a folder of predictions by their names."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        value = read_json(path)
        if not isinstance(value, dict) or not {"case", "images", "labels", "files"} <= value.keys():
            continue  # a report or a plan that lies here too
        maps = {kind: folder / name for kind, name in value["files"].items() if name}
        if value.get("members") == 1:
            maps.pop("mutual_information", None)  # nobody to disagree with: a black panel
        found[value["case"]] = Predicted(value["case"], tuple(map(Path, value["images"])), value["labels"], maps)
    return found


def draw_predictions(folder: Path, progress: Progress = silent) -> list[Path]:
    """Draw every case of a folder that `autofed predict` filled into `pictures/{case}.png`; returns these paths.

    A case whose images are no longer where they were is passed over, and a picture that is newer than its prediction
    is left as it is.
    """
    folder = Path(folder)

    def picture(predicted: Predicted) -> Path:
        return folder / "pictures" / f"{predicted.case}.png"

    def is_drawn(predicted: Predicted) -> bool:
        path = picture(predicted)
        return path.is_file() and path.stat().st_mtime_ns >= (folder / f"{predicted.case}.json").stat().st_mtime_ns

    def draw(predicted: Predicted) -> None:
        write_bytes(picture(predicted), predicted.draw(title=predicted.case))

    shown = [predicted for predicted in read_folder(folder).values() if predicted.has_images]
    each(draw, [predicted for predicted in shown if not is_drawn(predicted)], stage="pictures", progress=progress)
    return [picture(predicted) for predicted in shown]


def _read_share(path: Path | None) -> np.ndarray | None:
    """A map of shares of 1; pictures hold them as 8 bit shares of 255. None if there is no such file."""
    if path is None or not path.is_file():
        return None
    array = images.read(path).array[0]
    return array / 255 if images.is_picture(path) else array
