"""Labels and uncertainty for new scans, from files or arrays."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from autofed.api.options import PredictKeywords, PredictOptions, takes
from autofed.data import Case, find_images
from autofed.data.images import PICTURE_SLICE_MM
from autofed.data.images import Geometry as FileGeometry
from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation.run_folder import GLOBAL, Run
from autofed.files import PathLike
from autofed.inference.postprocessing import NOTHING, Postprocessing
from autofed.inference.prediction_folder import PredictionFolder
from autofed.inference.predictor import Member, Prediction, Predictor
from autofed.plans import Plan
from autofed.training.devices import pick_device

_log = logging.getLogger(__name__)


@takes(PredictOptions)
def predict(
    runs: PathLike | Sequence[PathLike],
    images: PathLike | np.ndarray | Any,
    output: PathLike | None = None,
    **keywords: Unpack[PredictKeywords],
) -> Prediction | list[Path]:
    """Labels and uncertainty for new scans by the ensemble of one or more runs.

    Cases that were already predicted by the same weights are not predicted again. The ensemble is that of
    `Run.members`. `ValidationErrors`, before anything is written, if a scan or another file would be overwritten.

    Args:
        runs: A run's folder, or several, whose predictions are averaged.
        images: An array (channels first; Z, Y, X or Y, X after it; the channel axis may be left out if there is one
            channel) with its `spacing_mm`, or an image that nibabel has loaded: gives a `Prediction`, whose maps are
            (Z, Y, X). Or a folder or a file: writes labels, maps and a JSON per case, and gives the JSON files.
        output: The folder that these are written to.
        **keywords: The fields of `autofed.api.options.PredictOptions`.
    """
    options = PredictOptions(**keywords)
    folders = [Run(r) for r in ([runs] if isinstance(runs, Path | str) else runs)]
    members = [member for folder in folders for member in folder.members(options.model, options.folds)]
    raise_if_any("predict", [] if members else ["no run was given; name at least one"])
    for folder in folders:
        for status in folder.unfinished(options.model, options.folds):
            _log.warning("%s is not finished (%s): what predicts is an early model", folder.folder, status)
    load = partial(_load_predictor, members, folders, options)
    if not isinstance(images, Path | str):
        array, spacing = _array_of(images, options.spacing_mm)
        case = _case_of(array, spacing, members[0].plan)
        return load().predict(case, probabilities=options.save_probabilities)
    if output is None:
        raise ValidationErrors("predict", ["images in files need an output folder; name one, or pass an array"])
    cases = find_images(Path(images), len(members[0].plan.agreement.channels))
    predictions = PredictionFolder(output, probabilities=options.save_probabilities)
    predictions.refuse_clashes(cases)
    predictor, model = load(), options.model or GLOBAL
    finished = len(predictions.finished(cases, predictor))
    written = predictions.fill(cases, predictor, [folder.folder for folder in folders], model, options.progress)
    options.say(f"what predicts: {', '.join(member.name for member in members)}")
    unchanged = (
        f"; {finished} of them were predicted before by the same weights, and left as they are" if finished else ""
    )
    options.say(f"{output}: {len(written)} cases{unchanged}")
    return written


def _load_predictor(members: Sequence[Member], folders: Sequence[Run], options: PredictOptions) -> Predictor:
    postprocessing = NOTHING
    if options.postprocessing:
        postprocessing = reduce(Postprocessing.merged_with, [folder.postprocessing() for folder in folders])
    device = pick_device(options.device)
    return Predictor(members, device=device, mirroring=options.mirroring, postprocessing=postprocessing)


def _array_of(image: Any, spacing_mm: Sequence[float] | None) -> tuple[np.ndarray, Sequence[float] | None]:
    """The voxels and spacing (z, y, x) of an image in memory: an array with a spacing, or an image of nibabel."""
    if isinstance(image, np.ndarray):
        return image, spacing_mm
    if not (hasattr(image, "dataobj") and hasattr(image, "affine")):  # not an image of nibabel, either
        kind = f"{type(image).__module__}.{type(image).__qualname__}"
        problem = f"found a {kind}; expected an array of numpy, an image that nibabel loaded, a file or a folder"
        raise ValidationErrors("predict", [problem])
    if spacing_mm is not None:
        raise ValidationErrors("predict", ["an image of nibabel has a spacing of its own; leave out spacing_mm"])
    voxels = np.asarray(image.dataobj, dtype=np.float32)
    lengths = np.linalg.norm(np.asarray(image.affine, dtype=float)[:3, :3], axis=0)
    return voxels.T, [float(length) for length in reversed(lengths)]


def _case_of(array: np.ndarray, spacing_mm: Sequence[float] | None, plan: Plan) -> Case:
    """A case from an array (C, Z, Y, X) or (C, Y, X), without C if there is one channel."""
    dimension, channels = plan.agreement.dimension, len(plan.agreement.channels)
    image = np.asarray(array, dtype=np.float32)
    if image.ndim == dimension and channels == 1:
        image = image[None]
    if image.ndim != dimension + 1 or image.shape[0] != channels:
        expected = f"({channels}, {'Z, Y, X' if dimension == 3 else 'Y, X'})"
        raise ValidationErrors("predict", [f"the array has the shape {array.shape}; expected {expected}"])
    if dimension == 3 and (spacing_mm is None or len(spacing_mm) != 3):
        raise ValidationErrors("predict", ["an array of a volume needs spacing_mm=(z, y, x)"])
    if spacing_mm is not None and not (len(spacing_mm) in (2, 3) and all(0 < s < np.inf for s in spacing_mm)):
        raise ValidationErrors(
            "predict", [f"spacing_mm is {tuple(spacing_mm)}; expected numbers above 0 for (z, y, x)"]
        )
    given = tuple(float(s) for s in spacing_mm) if spacing_mm is not None else (1.0, 1.0)
    spacing = given if dimension == 3 else (PICTURE_SLICE_MM, *given[-2:])
    volume = image if dimension == 3 else image[:, None]
    origin = (0.0,) * dimension if spacing_mm is not None else ()
    geometry = FileGeometry(dimension, spacing, origin, tuple(np.eye(dimension).ravel().tolist()) if origin else ())  # type: ignore[arg-type]
    return Case("array", "array", volume, None, spacing, geometry)  # type: ignore[arg-type]
