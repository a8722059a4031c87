"""How well predictions agree with references: Dice, Jaccard and HD95 per case, structure and site (MONAI's metrics).

What is counted:

* The background is no structure. A region is all the values that it has.
* Voxels that the reference ignores count in neither map, since their label is unknown. Nor is a structure scored in
  cases of a site whose dataset.json says that it was not annotated there.
* A structure that is in neither map is not scored (None) and left out of every mean, as nnU-Net leaves out its NaN.
* A structure that is in only one of them has Dice 0 and Jaccard 0. It has no surface distance, so the HD95 means
  leave it out and look better than they should; `Report.notes` counts these cases.
* A mean over structures weighs every structure alike, as nnU-Net's foreground mean does, and not every case.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from monai.metrics.meaniou import compute_iou
from pydantic import Field
from scipy import ndimage

from autofed.data import images
from autofed.data.images import Geometry
from autofed.data.labels import Labels, Values, annotated_problems, describe_values, mask
from autofed.errors import ValidationErrors, raise_if_any
from autofed.files import Record, read_json
from autofed.parallel import Progress, each, silent

MAPS = ("_entropy", "_mutual_information")
"""Suffixes of files among the label maps that are maps of uncertainty instead."""

Unit = Literal["mm", "px"]

# Float headers differ in the last digits between tools; nnU-Net tolerates as much.
_TOLERANCE = 1e-3
# MONAI computes in float32; more digits than these are noise.
_DIGITS = 6


class Scores(Record):
    """Overlap (0 to 1) and the 95th percentile of the surface distance; None where there is nothing to score."""

    dice: float | None = None
    jaccard: float | None = None
    hd95_mm: float | None = None


class CaseScores(Record):
    """The scores of one case: of each structure that is scored or not, and their mean."""

    case: str
    site: str | None = None
    classes: dict[str, Scores]
    mean: Scores


class Report(Record):
    """Scores per structure, site and case. `distance_unit` is "px" for pictures, whose pixels have no size in mm."""

    mean: Scores
    classes: dict[str, Scores]
    sites: dict[str, Scores] = Field(default_factory=dict)
    cases: tuple[CaseScores, ...]
    notes: tuple[str, ...] = ()
    distance_unit: Unit = "mm"


@dataclass(frozen=True)
class _Pair:
    """A prediction and its reference, as sent to a worker process."""

    case: str
    site: str | None
    prediction: Path
    reference: Path
    labels: Mapping[str, Values]
    annotated: tuple[str, ...] = ()


def score_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    labels: Mapping[str, Values],
    spacing_mm: tuple[float, float, float],
    case: str = "",
    site: str | None = None,
    annotated: Iterable[str] = (),
) -> CaseScores:
    """Compare two label maps (Z, Y, X) of whole numbers, voxel by voxel.

    `labels` maps names to values as dataset.json does, background 0 included or not; `spacing_mm` is (z, y, x). A map
    of one slice is scored in 2D, and its slice distance is not used. `annotated` are the structures to score, if
    not all of them. `ValidationErrors` if the shapes differ or a map holds a value that `labels` does not declare; only
    the reference may hold that of `ignore`. HD95 is the larger of the two directed 95th percentiles (Taha and Hanbury,
    BMC Med Imaging 15:29, 2015; there is another definition that pools the distances of both directions first).

    Args:
        prediction: (Z, Y, X), whole numbers.
        reference: (Z, Y, X), whole numbers.
        labels: Values by name, as in dataset.json.
        spacing_mm: Of (z, y, x).
        case: Its name in the scores.
        site: Where it is from.
        annotated: The structures to score; empty for all.
    """
    declared = Labels.declared(labels).with_annotated(annotated)
    problems = [*_shape_problems(prediction, reference), *_value_problems(prediction, reference, labels)]
    raise_if_any(case or "the maps", problems)
    spacing = [float(s) for s in spacing_mm]
    if reference.shape[0] == 1:
        prediction, reference, spacing = prediction[0], reference[0], spacing[1:]
    if declared.ignore is not None:
        prediction = np.where(reference == declared.ignore, 0, prediction)
    classes = {
        name: _structure(mask(prediction, values), mask(reference, values), spacing)
        for name, values in declared.structures
        if declared.is_annotated(name)
    }
    return CaseScores(case=case, site=site, classes=classes, mean=_mean(classes.values()))


def summarise(cases: Iterable[CaseScores], distance_unit: Unit = "mm", notes: Iterable[str] = ()) -> Report:
    """The means of scored cases, per structure, per site and over all structures, with notes on what they leave out."""
    cases = tuple(cases)
    classes = _by_class(cases)
    by_site: dict[str, list[CaseScores]] = {}
    for scored in cases:
        if scored.site is not None:
            by_site.setdefault(scored.site, []).append(scored)
    return Report(
        mean=_mean(classes.values()),
        classes=classes,
        sites={site: _mean(_by_class(by_site[site]).values()) for site in sorted(by_site)},
        cases=cases,
        notes=(*_notes(cases, distance_unit), *notes),
        distance_unit=distance_unit,
    )


def evaluate_folder(
    predictions: Path,
    labels: Path | Mapping[str, Path],
    label_names: Mapping[str, Values],
    sites: Mapping[str, str] | None = None,
    processes: int = 1,
    progress: Progress = silent,
) -> Report:
    """Score a folder of predictions `{case}{ending}` against references of the same names.

    `labels` is a folder as `find_references` takes it, or what it gives; `sites` maps case to site, and is found in
    a folder of sites if it is not given; of a site whose dataset.json has `annotated`, these structures alone are
    scored. Maps of uncertainty among the predictions are passed over. One `ValidationErrors` names everything that
    is wrong: a prediction without a reference, a reference without a prediction (a case that is missing must not make
    the mean better), shapes or spacings that differ, values that `label_names` does not declare.

    Args:
        predictions: The folder of the predictions.
        labels: The folder of the references, or their paths by case.
        label_names: Values by name, as in dataset.json.
        sites: The site of each case.
        processes: How many score cases at a time.
        progress: Is called with what is being done, how many are done, and how many there are.
    """
    references, found_sites, problems = (
        (dict(labels), {}, []) if isinstance(labels, Mapping) else _references(Path(labels))
    )
    sites = found_sites if sites is None else sites
    pairs, pair_problems = _find_pairs(Path(predictions), references, label_names, sites)
    problems += pair_problems
    # Where the folders do not match nothing is scored, but the voxels are still checked: one run names all problems.
    work = _check_pair if problems else _score_pair
    try:
        scored = each(work, pairs, stage="evaluate", processes=processes, progress=progress)
    except ValidationErrors as error:
        problems += error.problems
    raise_if_any("evaluate", problems)
    cases = [case for case, _ in scored]
    notes = [*_annotation_notes(pairs), *_placement_notes(scored), *_site_notes(cases, sites)]
    return summarise(cases, _distance_unit(pairs), notes)


def find_references(labels: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The label maps by case, and the site of each case, of a folder of label maps or of sites (`SITE/labelsTr`).

    A site's own folder counts as a folder of one site, and a folder of label maps names no sites. `ValidationErrors` if
    there is no such folder, or if a case has two label maps.
    """
    maps, sites, problems = _references(Path(labels))
    raise_if_any(str(labels), problems)
    return maps, sites


def _structure(prediction: np.ndarray, reference: np.ndarray, spacing: list[float]) -> Scores:
    """The scores of one structure from two masks of two or three axes."""
    union = prediction | reference
    if not union.any():
        return Scores()
    box = ndimage.find_objects(union.astype(np.uint8))[0]  # the rest of the volume cannot change any score
    p, r = (torch.from_numpy(np.ascontiguousarray(mask[box]))[None, None] for mask in (prediction, reference))
    hd95 = _hd95(p, r, spacing) if p.any() and r.any() else None
    # ignore_empty=False: MONAI would otherwise leave out a structure that is only in the prediction.
    return Scores(
        dice=_number(compute_dice(p, r, ignore_empty=False)),
        jaccard=_number(compute_iou(p, r, ignore_empty=False)),
        hd95_mm=None if hd95 is None else _number(hd95),
    )


def _hd95(prediction: torch.Tensor, reference: torch.Tensor, spacing: list[float]) -> torch.Tensor:
    with warnings.catch_warnings():
        # MONAI 1.6 calls itself with an argument that it has deprecated.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        return compute_hausdorff_distance(
            prediction, reference, include_background=True, percentile=95, spacing=spacing
        )


def _number(metric: torch.Tensor) -> float:
    return round(float(metric.item()), _DIGITS)


def _mean(scores: Iterable[Scores]) -> Scores:
    """The mean of each score over those that have it."""
    scores = list(scores)
    means = {}
    for name in Scores.model_fields:
        values = [v for s in scores if (v := getattr(s, name)) is not None]
        means[name] = round(math.fsum(values) / len(values), _DIGITS) if values else None
    return Scores(**means)


def _by_class(cases: Iterable[CaseScores]) -> dict[str, Scores]:
    by_class: dict[str, list[Scores]] = {}
    for scored in cases:
        for name, scores in scored.classes.items():
            by_class.setdefault(name, []).append(scores)
    return {name: _mean(scores) for name, scores in by_class.items()}


# Folders


def _find_pairs(
    predictions: Path, references: Mapping[str, Path], label_names: Mapping[str, Values], sites: Mapping[str, str]
) -> tuple[list[_Pair], list[str]]:
    maps, problems = _label_maps(predictions)
    if predictions.is_dir() and not maps:
        problems.append(f"{predictions} holds no label maps; expected files such as case.nii.gz or case.png")
    if predictions.is_dir() and references:
        problems += [f"{c}: there is a prediction, but no reference for it" for c in maps if c not in references]
        missing = [c for c in references if c not in maps]
        problems += [f"{c}: there is a reference, but no prediction in {predictions}" for c in missing]
    annotated, declaration_problems = _annotated(references.values(), label_names)
    problems += declaration_problems
    pairs = [
        _Pair(c, sites.get(c), p, references[c], label_names, annotated.get(references[c].parent, ()))
        for c, p in maps.items()
        if c in references
    ]
    pictures = [p.case for p in pairs if _is_picture(p)]
    if 0 < len(pictures) < len(pairs):
        problems.append(f"pictures and volumes are mixed ({', '.join(pictures[:5])} are pictures); distances in pixels "
                        "and in mm have no common mean, so evaluate them apart")  # fmt: skip
    return pairs, problems


def _references(folder: Path) -> tuple[dict[str, Path], dict[str, str], list[str]]:
    """`find_references` with its problems, so that they can be raised together with others."""
    maps, problems = _label_maps(folder)
    label_folders = [p for p in (folder / "labelsTr", *sorted(folder.glob("*/labelsTr"))) if p.is_dir()]
    if maps or problems:
        return maps, {}, problems
    sites: dict[str, str] = {}
    for label_folder in label_folders:
        site = label_folder.resolve().parent.name
        site_maps, site_problems = _label_maps(label_folder)
        problems += site_problems
        problems += [
            f"{c}: both {sites[c]} and {site} have a case of this name; rename one" for c in site_maps if c in maps
        ]
        maps |= site_maps
        sites |= dict.fromkeys(site_maps, site)
    if not maps:
        problems.append(f"{folder} holds no label maps; expected files such as case.nii.gz, or sites with labelsTr")
    return maps, sites, problems


def _annotated(
    references: Iterable[Path], label_names: Mapping[str, Values]
) -> tuple[dict[Path, tuple[str, ...]], list[str]]:
    """What was annotated, by folder of label maps of a site in raw layout, where its dataset.json says it; problems."""
    structures: dict[Path, tuple[str, ...]] = {}
    problems = []
    for folder in sorted({path.parent for path in references}):
        path_of_json = folder.parent / "dataset.json"
        description = read_json(path_of_json) if folder.name.startswith("labels") and path_of_json.is_file() else {}
        if isinstance(description, dict) and "annotated" in description:
            mistakes = annotated_problems(description["annotated"], label_names)
            problems += [f"{path_of_json}: {problem}" for problem in mistakes]
            structures[folder] = () if mistakes else tuple(description["annotated"])
    return structures, problems


def _label_maps(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The label maps of a folder by case, and what is wrong with their names."""
    if not folder.is_dir():
        return {}, [f"{folder}: there is no such folder"]
    maps: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.iterdir()):
        ending = images.ending_of(path)
        case = path.name[: -len(ending)] if ending else ""
        if not case or case.startswith(".") or case.endswith(MAPS) or not path.is_file():
            continue
        if case in maps:
            problems.append(f"{case}: found {maps[case].name} and {path.name} in {folder}; keep one of them")
        maps[case] = path
    return maps, problems


def _check_pair(pair: _Pair) -> tuple[CaseScores, bool]:
    """Find what is wrong with a pair, and score nothing."""
    _read_pair(pair)
    return CaseScores(case=pair.case, classes={}, mean=Scores()), True


def _score_pair(pair: _Pair) -> tuple[CaseScores, bool]:
    """The scores, and whether the headers of both maps give the same place in the patient."""
    prediction, reference, geometry, is_same_place = _read_pair(pair)
    spacing_mm = geometry.spacing_mm
    scored = score_case(prediction, reference, pair.labels, spacing_mm, pair.case, pair.site, pair.annotated)
    return scored, is_same_place


def _read_pair(pair: _Pair) -> tuple[np.ndarray, np.ndarray, Geometry, bool]:
    prediction, geometry = images.read_labels(pair.prediction)
    reference, reference_geometry = images.read_labels(pair.reference)
    problems = [
        *_shape_problems(prediction, reference),
        *_spacing_problems(geometry, reference_geometry, is_flat=reference.shape[0] == 1),
        *_value_problems(prediction, reference, pair.labels),
    ]
    raise_if_any(pair.case, problems)
    return prediction, reference, reference_geometry, _is_same_place(geometry, reference_geometry)


def _shape_problems(prediction: np.ndarray, reference: np.ndarray) -> Iterator[str]:
    if prediction.shape != reference.shape:
        yield f"the prediction has the shape {prediction.shape}, the reference {reference.shape} (z, y, x)"


def _spacing_problems(prediction: Geometry, reference: Geometry, is_flat: bool) -> Iterator[str]:
    first = 1 if is_flat else 0  # one slice has no distance to the next; what is written there is a convention
    a, b = prediction.spacing_mm[first:], reference.spacing_mm[first:]
    both = prediction.in_millimetres and reference.in_millimetres
    if both and not np.allclose(a, b, rtol=_TOLERANCE):
        yield f"the prediction has the spacing {a} mm, the reference {b} mm; write both on the grid of the image"


def _value_problems(prediction: np.ndarray, reference: np.ndarray, labels: Mapping[str, Values]) -> Iterator[str]:
    names = Labels.declared(labels)
    ignored = set() if names.ignore is None else {names.ignore}
    if names.ignore is not None and (prediction == names.ignore).any():
        yield f"the prediction holds the value {names.ignore}, which only a reference may ignore; predict every voxel"
    for what, array in (("prediction", prediction), ("reference", reference)):
        unknown = _unknown_values(array, names.values | ignored)
        if unknown:
            yield f"the {what} holds the values {unknown[:10]}, but only {describe_values(labels)} are declared"


def _unknown_values(array: np.ndarray, declared: set[int]) -> list[int]:
    if array.size and declared == set(range(len(declared))) and array.min() >= 0 and array.max() < len(declared):
        return []  # np.unique sorts every voxel, which takes longer than all the metrics
    return sorted({int(v) for v in np.unique(array)} - declared)


def _is_same_place(a: Geometry, b: Geometry) -> bool:
    if len(a.origin) != len(b.origin) or len(a.direction) != len(b.direction):
        return a.in_millimetres != b.in_millimetres  # a picture has no place, so there is nothing to compare
    tolerance = max(_TOLERANCE, 0.1 * min(a.spacing_mm))
    return bool(np.allclose(a.origin, b.origin, atol=tolerance) and np.allclose(a.direction, b.direction, atol=0.01))


def _is_picture(pair: _Pair) -> bool:
    return images.is_picture(pair.reference)


def _distance_unit(pairs: list[_Pair]) -> Unit:
    return "px" if _is_picture(pairs[0]) else "mm"


# Notes


def _notes(cases: tuple[CaseScores, ...], distance_unit: str) -> Iterator[str]:
    if distance_unit == "px":
        yield "HD95 is in pixels: pictures do not say how large a pixel is in mm."
    one_sided: Counter[str] = Counter()
    absent: Counter[str] = Counter()
    for scored in cases:
        for name, scores in scored.classes.items():
            one_sided[name] += scores.dice is not None and scores.hd95_mm is None
            absent[name] += scores.dice is None
    for name, count in one_sided.items():
        if count:
            yield (f"{name}: in {_cases(count)} only one of prediction and reference holds it. Dice and Jaccard count "
                   "as 0 there; there is no distance, so the HD95 mean leaves them out.")  # fmt: skip
    for name, count in absent.items():
        if count:
            yield f"{name}: in {_cases(count)} neither prediction nor reference holds it; it is not scored there."


def _annotation_notes(pairs: list[_Pair]) -> Iterator[str]:
    partial = [Labels.declared(pair.labels).with_annotated(pair.annotated) for pair in pairs]
    for name in partial[0].names:
        count = sum(not labels.is_annotated(name) for labels in partial)
        if count:
            yield f"{name}: {_cases(count)} come from sites that did not annotate it; it is not scored there."


def _placement_notes(scored: list[tuple[CaseScores, bool]]) -> Iterator[str]:
    displaced = [case.case for case, is_same_place in scored if not is_same_place]
    if displaced:
        names = ", ".join(displaced[:5]) + (", ..." if len(displaced) > 5 else "")
        yield (f"In {_cases(len(displaced))} ({names}) the headers of prediction and reference give another origin or "
               "orientation; they were compared voxel by voxel.")  # fmt: skip


def _site_notes(cases: list[CaseScores], sites: Mapping[str, str]) -> Iterator[str]:
    without_site = sum(scored.site is None for scored in cases) if sites else 0
    if without_site:
        yield f"No site is known for {_cases(without_site)}; no site's mean holds them."


def _cases(count: int) -> str:
    return "1 case" if count == 1 else f"{count} cases"
