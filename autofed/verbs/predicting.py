"""Labels and uncertainty for new scans, from files or arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from pathlib import Path

import numpy as np

from autofed.case import Case, find_images
from autofed.devices import pick_device
from autofed.files import PathLike
from autofed.images import PICTURE_SLICE_MM
from autofed.images import Geometry as FileGeometry
from autofed.inference import Prediction, Predictor
from autofed.parallel import Progress, silent
from autofed.plans import Plan
from autofed.postprocessing import NOTHING, Postprocessing
from autofed.predictions import Predictions
from autofed.problems import Problems, refuse
from autofed.runs import Run


def predict(
    runs: PathLike | Sequence[PathLike],
    images: PathLike | np.ndarray,
    output: PathLike | None = None,
    *,
    spacing_mm: Sequence[float] | None = None,
    model: str | None = None,
    folds: Sequence[str] = (),
    postprocessing: bool = True,
    mirroring: bool = True,
    save_probabilities: bool = False,
    device: str = "auto",
    progress: Progress = silent,
) -> Prediction | list[Path]:
    """Labels and uncertainty for new scans by the ensemble of one or more runs.

    `images` is an array (channels first; Z, Y, X or Y, X after it, the channel axis may be left out if there is one
    channel) with its `spacing_mm` (z, y, x): gives a `Prediction`. Or it is a folder or a file: writes labels, maps
    and a JSON per case to `output`, and gives the JSON files. Cases that were predicted before by the same weights
    are left as they are. The ensemble is that of `Run.members`: without `folds` the training on all patients, or else
    every fold that was trained. `postprocessing` is what the runs found to help on held-out cases. `Problems`, before
    anything is written, if a scan or a file of somebody else would be written over.
    """
    folders = [Run(r) for r in ([runs] if isinstance(runs, Path | str) else runs)]
    members = [member for folder in folders for member in folder.members(model, folds)]
    refuse("predict", [] if members else ["no run was given; name at least one"])
    found = reduce(Postprocessing.and_, [folder.postprocessing() for folder in folders]) if postprocessing else NOTHING
    load = partial(Predictor, members, device=pick_device(device), mirroring=mirroring, postprocessing=found)
    if isinstance(images, np.ndarray):
        case = _case_of(images, spacing_mm, members[0].plan)
        return load().predict(case, probabilities=save_probabilities)
    if output is None:
        raise Problems("predict", ["images in files need an output folder"])
    cases = find_images(Path(images), len(members[0].plan.agreement.channels))
    folder = Predictions(output, probabilities=save_probabilities)
    folder.refuse_clashes(cases)
    return folder.fill(cases, load(), folders, model, progress)


def _case_of(array: np.ndarray, spacing_mm: Sequence[float] | None, made: Plan) -> Case:
    """A case from an array in the shapes that people hold them in."""
    dimension, channels = made.agreement.dimension, len(made.agreement.channels)
    image = np.asarray(array, dtype=np.float32)
    if image.ndim == dimension and channels == 1:
        image = image[None]
    if image.ndim != dimension + 1 or image.shape[0] != channels:
        expected = f"({channels}, {'Z, Y, X' if dimension == 3 else 'Y, X'})"
        raise Problems("predict", [f"the array has the shape {array.shape}; expected {expected}"])
    if dimension == 3 and (spacing_mm is None or len(spacing_mm) != 3):
        raise Problems("predict", ["an array of a volume needs spacing_mm=(z, y, x)"])
    if spacing_mm is not None and not (len(spacing_mm) in (2, 3) and all(0 < s < np.inf for s in spacing_mm)):
        raise Problems("predict", [f"spacing_mm is {tuple(spacing_mm)}; expected numbers above 0 for (z, y, x)"])
    known = tuple(float(s) for s in spacing_mm) if spacing_mm is not None else (1.0, 1.0)
    spacing = known if dimension == 3 else (PICTURE_SLICE_MM, *known[-2:])
    shown = image if dimension == 3 else image[:, None]
    origin = (0.0,) * dimension if spacing_mm is not None else ()
    geometry = FileGeometry(dimension, spacing, origin, tuple(np.eye(dimension).ravel().tolist()) if origin else ())  # type: ignore[arg-type]
    return Case("array", "array", shown, None, spacing, geometry)  # type: ignore[arg-type]
