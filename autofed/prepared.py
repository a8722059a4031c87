"""Cases on the plan's grid: crop, normalise, resample, store so that a patch can be read alone, and the exact way back.

WORK/<site>/<digest>/ holds one folder per case. The digest names grid, normalisation and raw files, so changing rounds
or privacy prepares nothing again, and data prepared from other files is never taken for these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from scipy import ndimage

from autofed.case import Case, Dataset, open_dataset
from autofed.files import Record, digest, whole_folder, write_json
from autofed.fingerprints import crop_box
from autofed.images import Geometry as FileGeometry
from autofed.parallel import Progress, each, silent
from autofed.planner import ANISOTROPY
from autofed.plans import Channel, Geometry, Intensity, Local
from autofed.problems import Problems, refuse

LOCATIONS_PER_CLASS = 10_000
"""So many voxels of each class are remembered as centres for patches (nnU-Net)."""

_EPSILON = 1e-8
_CHUNK = {2: (1, 128, 128), 3: (32, 32, 32)}


class WayBack(Record):
    """How a case came onto the plan's grid: all that is needed to bring a map back onto the file's own grid.

    `shape` is the file's (z, y, x), `box` the crop in it, `grid` the prepared shape, in the plan's axis order;
    `coarse_axis` is the axis of the grid along which slices were taken as they are, if there is one.
    """

    shape: tuple[int, int, int]
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    grid: tuple[int, int, int]
    transpose: tuple[int, int, int]
    coarse_axis: int | None
    dimension: int
    spacing_mm: tuple[float, float, float]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    affine: tuple[float, ...]

    @property
    def geometry(self) -> FileGeometry:
        """Geometry of the file that the case came from."""
        return FileGeometry(self.dimension, self.spacing_mm, self.origin, self.direction, self.affine)


@dataclass(frozen=True)
class Prepared:
    """A case on the plan's grid: `image` float32 (C, *grid), `label` int16 (*grid) or None, and the way back."""

    image: np.ndarray
    label: np.ndarray | None
    way_back: WayBack


def prepare(case: Case, geometry: Geometry, intensity: Intensity) -> Prepared:
    """Crop to what is not zero, normalise, then resample onto the plan's grid (nnU-Net's order)."""
    box = crop_box(case.image)
    image = case.image[(slice(None), *box)]
    label = None if case.label is None else case.label[box]
    mask = ndimage.binary_fill_holes((image != 0).any(axis=0)) if intensity.inside_mask else None
    pairs = zip(image, intensity.channels, strict=True)
    image = np.stack([normalise(voxels, channel, mask, about=case.id) for voxels, channel in pairs])
    order = geometry.transpose
    image = image.transpose(0, *(axis + 1 for axis in order))
    spacing = [case.spacing_mm[axis] for axis in order]
    grid, coarse = _grid(image.shape[1:], spacing, geometry), _coarse_axis(spacing, geometry)
    image = np.stack([resample(voxels, grid, order=3, coarse_axis=coarse) for voxels in image])
    if label is not None:
        label = resample_labels(label.transpose(order), grid, coarse_axis=coarse).astype(np.int16)
    file = case.geometry
    way_back = WayBack(
        shape=case.image.shape[1:],
        box=tuple((s.start, s.stop) for s in box),
        grid=grid,
        transpose=order,
        coarse_axis=coarse,
        dimension=file.dimension,
        spacing_mm=file.spacing_mm,
        origin=file.origin,
        direction=file.direction,
        affine=file.affine,
    )
    return Prepared(image.astype(np.float32), label, way_back)


def restore(values: np.ndarray, way: WayBack, fill: float = 0.0) -> np.ndarray:
    """A map (*grid) of real values back on the file's grid (Z, Y, X), linearly; `fill` where it was cropped."""
    cropped = [stop - start for start, stop in way.box]
    there = resample(values, [cropped[axis] for axis in way.transpose], order=1, coarse_axis=way.coarse_axis)
    whole = np.full(way.shape, fill, dtype=values.dtype)
    whole[_slices(way)] = there.transpose(_inverse(way.transpose))
    return whole


def restore_labels(probabilities: np.ndarray, way: WayBack) -> np.ndarray:
    """The most probable class (Z, Y, X), uint8 (uint16 above 256 classes), from probabilities (K, *grid).

    Class by class with a running maximum, so that memory does not grow with the number of classes.
    """
    best = restore(probabilities[0], way, fill=1.0)
    labels = np.zeros(way.shape, dtype=np.uint8 if len(probabilities) <= 256 else np.uint16)
    for value in range(1, len(probabilities)):
        rival = restore(probabilities[value], way)
        labels[rival > best] = value
        np.maximum(best, rival, out=best)
    return labels


def normalise(voxels: np.ndarray, channel: Channel, mask: np.ndarray | None, about: str = "the image") -> np.ndarray:
    """One channel's intensities by its scheme; z-scores inside `mask` only, if there is one.

    `Problems` about the image if its values are not those that the scheme is for.
    """
    values = voxels.astype(np.float32, copy=True)
    match channel.scheme:
        case "ct":
            assert channel.mean is not None and channel.std is not None
            np.clip(values, channel.percentile_00_5, channel.percentile_99_5, out=values)
            return (values - channel.mean) / max(channel.std, _EPSILON)
        case "zscore":
            inside = values if mask is None else values[mask]
            scaled = (inside - inside.mean()) / max(float(inside.std()), _EPSILON)
            if mask is None:
                return scaled
            values[mask] = scaled
            return values
        case "rescale_to_0_1":
            low, high = float(values.min()), float(values.max())
            return (values - low) / max(high - low, _EPSILON)
        case "rgb_to_0_1":
            refuse(about, _colour_problems(values))
            return values / 255
        case "nonorm":
            return values


def _colour_problems(values: np.ndarray) -> list[str]:
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 255:
        return []
    return [
        f"a channel named rgb_to_0_1 holds values from {low:g} to {high:g}, expected 0 to 255; "
        "give the channel another name in dataset.json (rescale_to_0_1 takes any values)"
    ]


def resample(values: np.ndarray, shape: Sequence[int], *, order: int, coarse_axis: int | None) -> np.ndarray:
    """A map on another grid of the same extent: spline of `order`, edges repeated, no overshoot.

    With a `coarse_axis`, the slices along it are resampled by themselves and the nearest slice is taken, since between
    slices that lie far apart a spline invents anatomy.
    """
    if tuple(values.shape) == tuple(shape):
        return values
    exact = values.astype(np.float32, copy=False)
    factor = [n / m for n, m in zip(shape, values.shape, strict=True)]
    if coarse_axis is None:
        resampled = _zoom(exact, factor, order)
    else:
        within = [f for axis, f in enumerate(factor) if axis != coarse_axis]
        planes = [_zoom(plane, within, order) for plane in np.moveaxis(exact, coarse_axis, 0)]
        across = [f if axis == coarse_axis else 1 for axis, f in enumerate(factor)]
        resampled = _zoom(np.stack(planes, coarse_axis), across, 0)
    return np.clip(resampled, exact.min(), exact.max()) if order > 1 else resampled


def resample_labels(label: np.ndarray, shape: Sequence[int], *, coarse_axis: int | None) -> np.ndarray:
    """A label map on another grid: each label linearly by itself, the strongest wins."""
    if tuple(label.shape) == tuple(shape):
        return label
    found = np.zeros(shape, dtype=label.dtype)
    best = np.zeros(shape, dtype=np.float32)
    for value in np.unique(label):
        share = resample((label == value).astype(np.float32), shape, order=1, coarse_axis=coarse_axis)
        found[share > best] = value
        np.maximum(best, share, out=best)
    return found


def _zoom(values: np.ndarray, factor: Sequence[float], order: int) -> np.ndarray:
    return ndimage.zoom(values, factor, order=order, mode="nearest", grid_mode=True)


def _grid(shape: Sequence[int], spacing: Sequence[float], geometry: Geometry) -> tuple[int, int, int]:
    target = list(geometry.spacing_mm)
    if geometry.configuration == "2d":
        target[0] = spacing[0]  # slices stay where they are
    new = [max(1, round(n * s / t)) for n, s, t in zip(shape, spacing, target, strict=True)]
    return (new[0], new[1], new[2])


def _coarse_axis(spacing: Sequence[float], geometry: Geometry) -> int | None:
    """The axis along which slices lie so far apart that they are not mixed (nnU-Net's rule); both in the plan's order.

    The case's own spacing decides if it is anisotropic, else the plan's; two axes alike are no slices.
    """
    if geometry.configuration == "2d":
        return 0
    for candidate in (spacing, geometry.spacing_mm):
        coarsest = max(candidate)
        if coarsest > ANISOTROPY * min(candidate):
            axes = [axis for axis, mm in enumerate(candidate) if math.isclose(mm, coarsest, rel_tol=1e-3)]
            return axes[0] if len(axes) == 1 else None
    return None


def _slices(way: WayBack) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in way.box)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(3), key=lambda axis: order[axis])


# --- the store -------------------------------------------------------------------------------------------------------


class Index(Record):
    """What a folder of prepared data is, written last: a folder without it is not whole."""

    site: str
    raw: str
    raw_digest: str
    preparation: str
    labels: dict[str, int]
    channels: tuple[str, ...]
    cases: dict[str, str]
    unlabelled: tuple[str, ...]


@dataclass(frozen=True)
class Store:
    """The prepared data of one site (or, for the pooled baseline, of several)."""

    folders: Mapping[str, Path]
    patients: Mapping[str, tuple[str, ...]]

    def image(self, case: str) -> blosc2.NDArray:
        """The image (C, *grid), on disk; indexing reads only the part asked for."""
        return blosc2.open(str(self.folders[case] / "image.b2nd"), mode="r")

    def label(self, case: str) -> blosc2.NDArray:
        """The label map (*grid), on disk."""
        return blosc2.open(str(self.folders[case] / "label.b2nd"), mode="r")

    @cached_property
    def _locations(self) -> dict[str, dict[int, np.ndarray]]:
        return {}

    def locations(self, case: str) -> dict[int, np.ndarray]:
        """For each class that the case has, some of its voxels (n, 3) on the grid."""
        if case not in self._locations:
            with np.load(self.folders[case] / "locations.npz") as found:
                self._locations[case] = {int(value): found[value] for value in found.files}
        return self._locations[case]


def preprocess(
    dataset: Dataset, local: Local, work: Path, *, processes: int = 1, progress: Progress = silent
) -> tuple[Path, int]:
    """Prepare a site's cases that are not prepared yet; gives the folder and how many cases were new.

    An interrupted run goes on where it was; `Problems` names every case that cannot be prepared.
    """
    index = _index(dataset, local)
    folder = work / dataset.name / digest([index.preparation, index.raw_digest])[:16]
    known = folder / "index.json"
    if known.is_file() and Index.load(known) == index:
        return folder, 0
    missing = [case for case in dataset.cases if not (folder / case / "case.json").is_file()]
    each(
        partial(_prepare_one, dataset, local, folder),
        missing,
        stage=f"preparing {dataset.name}",
        processes=processes,
        progress=progress,
    )
    index.save(known)
    return folder, len(missing)


def open_store(work: Path, site: str, local: Local) -> Store:
    """The prepared data of a site for this plan; `Problems` if there is none, or if the raw files changed since."""
    candidates = [Index.load(p) for p in sorted((work / site).glob("*/index.json"))]
    fitting = [i for i in candidates if i.preparation == local.preparation_digest()]
    if not fitting:
        found = "only data prepared for another plan" if candidates else "nothing"
        raise Problems(str(work / site), [f"found {found}; run `autofed preprocess plan.json SITE... -o {work}`"])
    current = [i for i in fitting if _raw_digest(i) in (None, i.raw_digest)]
    if not current:
        changed = f"the files in {fitting[0].raw} changed since they were prepared; run `autofed preprocess` again"
        raise Problems(str(work / site), [changed])
    index = current[-1]
    folder = work / site / digest([index.preparation, index.raw_digest])[:16]
    by_patient: dict[str, list[str]] = {}
    for case, patient in index.cases.items():
        if case not in index.unlabelled:
            by_patient.setdefault(patient, []).append(case)
    return Store({c: folder / c for c in index.cases}, {p: tuple(cs) for p, cs in sorted(by_patient.items())})


def pool(stores: Mapping[str, Store]) -> Store:
    """Several sites' data as one, in the order of their names; a case or patient is named with its site."""
    by_name = sorted(stores.items())
    return Store(
        {f"{site}/{case}": path for site, store in by_name for case, path in store.folders.items()},
        {
            f"{site}/{patient}": tuple(f"{site}/{case}" for case in cases)
            for site, store in by_name
            for patient, cases in store.patients.items()
        },
    )


def prepared_sites(work: Path) -> list[str]:
    """The sites that have prepared data in a folder."""
    return sorted(p.parent.parent.name for p in Path(work).glob("*/*/index.json"))


def _index(dataset: Dataset, local: Local) -> Index:
    return Index(
        site=dataset.name,
        raw=str(dataset.folder),
        raw_digest=dataset.raw_digest(),
        preparation=local.preparation_digest(),
        labels=dict(dataset.labels),
        channels=dataset.channels,
        cases={case: dataset.patient(case) for case in dataset.cases},
        unlabelled=tuple(case for case, files in dataset.cases.items() if files.label is None),
    )


def _raw_digest(index: Index) -> str | None:
    """The digest of the raw files as they are now, or None if they are not here (prepared data may be moved alone)."""
    if not Path(index.raw).is_dir():
        return None
    try:
        return open_dataset(index.raw).raw_digest()
    except Problems:
        return "unreadable"


def _prepare_one(dataset: Dataset, local: Local, folder: Path, case: str) -> None:
    blosc2.set_nthreads(1)
    ready = prepare(dataset.read(case), local.geometry, local.intensity)
    chunk = _CHUNK[2 if ready.image.shape[1] == 1 else 3]
    with whole_folder(folder / case) as part:
        chunks = [min(n, c) for n, c in zip(ready.image.shape[1:], chunk, strict=True)]
        blosc2.asarray(ready.image, urlpath=str(part / "image.b2nd"), mode="w", chunks=(len(ready.image), *chunks))
        if ready.label is not None:
            blosc2.asarray(ready.label, urlpath=str(part / "label.b2nd"), mode="w", chunks=tuple(chunks))
            locations: dict[str, Any] = dict(_find_locations(ready.label))
            np.savez(part / "locations.npz", **locations)
        write_json(part / "case.json", ready.way_back.model_dump(mode="json"))


def _find_locations(label: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    """Per class: all voxels if there are few, else 10 000 or 1 % of them, whichever is more (nnU-Net)."""
    generator = np.random.default_rng(1234)
    for value in np.unique(label[label > 0]):
        at = np.argwhere(label == value).astype(np.int32)
        wanted = max(LOCATIONS_PER_CLASS, len(at) // 100)
        yield str(value), at if len(at) <= wanted else generator.choice(at, wanted, replace=False, axis=0)
