"""Cases on the plan's grid: crop, normalise, resample, store so that a patch can be read alone, and the exact way back.

WORK/<site>/<digest>/ holds one folder per case. The digest names grid, normalisation and raw files, so changing rounds
or privacy prepares nothing again, and data prepared from other files is never taken for these.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autofed.case import Case, Dataset, open_dataset
from autofed.files import Record, digest, whole_folder, write_json
from autofed.fingerprints import crop_box
from autofed.images import Geometry as FileGeometry
from autofed.labels import ClassOrder, Labels, Values, mask, voxel_counts
from autofed.parallel import Progress, each, silent
from autofed.planner import ANISOTROPY
from autofed.plans import Channel, Geometry, Intensity, Local
from autofed.problems import Problems, refuse

if TYPE_CHECKING:
    import blosc2

LOCATIONS_PER_CLASS = 10_000
"""So many voxels of each class are remembered as centres for patches (nnU-Net)."""

ANNOTATED = 0
"""The key of voxels of any kind that were annotated, remembered where some may not be (nnU-Net)."""

_EPSILON = 1e-8
_POLE = math.sqrt(3) - 2  # of the filter that turns values into coefficients of a cubic B-spline
_SLAB = 1 << 20  # voxels that are resampled together

# At most so many voxels in a chunk and in a block along (z, y, x): a patch reads whole blocks; few chunks are soon
# written.
_CHUNK = {2: (1, 256, 256), 3: (64, 64, 64)}
_BLOCK = {2: (1, 128, 128), 3: (32, 32, 32)}


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
    cropped = case.image[(slice(None), *box)]
    mask = _filled(cropped) if intensity.inside_mask else None
    order = geometry.transpose
    spacing = [case.spacing_mm[axis] for axis in order]
    grid = _grid([cropped.shape[1:][axis] for axis in order], spacing, geometry)
    coarse = _coarse_axis(spacing, geometry)
    label = None
    if case.label is not None:
        label = case.label[box].astype(np.int16).transpose(order)
        label = np.ascontiguousarray(resample_labels(label, grid, coarse_axis=coarse))
    image = np.empty((len(cropped), *grid), np.float32)
    for part, voxels, channel in zip(image, cropped, intensity.channels, strict=True):
        part[...] = resample(
            normalise(voxels, channel, mask, about=case.id).transpose(order), grid, order=3, coarse_axis=coarse
        )
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
    return Prepared(image, label, way_back)


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


def restore_regions(probabilities: np.ndarray, way: WayBack, order: Sequence[int]) -> np.ndarray:
    """Regions (Z, Y, X), uint8 (uint16 above 255), from probabilities (K, *grid) that need not add up to 1.

    Where a region is more probable than not, it is painted with its value of `order`, later ones on top.
    """
    labels = np.zeros(way.shape, dtype=np.uint8 if max(order) < 256 else np.uint16)
    for probability, value in zip(probabilities, order, strict=True):
        labels[restore(probability, way) > 0.5] = value
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
            values -= channel.mean
            values /= max(channel.std, _EPSILON)
        case "zscore":
            inside = values if mask is None else values[mask]
            inside -= inside.mean()
            inside /= max(float(inside.std()), _EPSILON)
            if mask is not None:
                values[mask] = inside
        case "rescale_to_0_1":
            low, high = float(values.min()), float(values.max())
            values -= low
            values /= max(high - low, _EPSILON)
        case "rgb_to_0_1":
            refuse(about, _colour_problems(values))
            values /= 255
        case "nonorm":
            pass
    return values


def _filled(image: np.ndarray) -> np.ndarray:
    """Where some channel of (C, Z, Y, X) is not zero, and what such voxels enclose."""
    from scipy import ndimage

    return ndimage.binary_fill_holes((image != 0).any(axis=0))


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
    resampled = exact = values.astype(np.float32, copy=False)
    centres = [_centres(n, m) for n, m in zip(exact.shape, shape, strict=True)]
    orders = [0 if axis == coarse_axis else order for axis in range(3)]
    for axis in sorted(range(3), key=lambda axis: len(centres[axis]) / exact.shape[axis]):  # the smaller, the sooner
        if len(centres[axis]) != exact.shape[axis]:
            resampled = _along(resampled, axis, centres[axis], orders[axis])
    if order > 1:
        _clip(resampled, exact, None if coarse_axis is None else (coarse_axis, centres[coarse_axis]))
    return resampled


def resample_labels(label: np.ndarray, shape: Sequence[int], *, coarse_axis: int | None) -> np.ndarray:
    """A label map on another grid: each label linearly by itself, the strongest wins, of equals the last."""
    if tuple(label.shape) == tuple(shape):
        return label
    found = np.zeros(shape, dtype=label.dtype)
    present = _present(label)
    if not len(present):
        return found
    around, share = _share(label > 0, shape, coarse_axis)
    best = 1 - share  # of the background
    for value in present:
        box, share = _share(label == value, shape, coarse_axis)
        here = tuple(slice(b.start - a.start, b.stop - a.start) for a, b in zip(around, box, strict=True))
        found[box][share >= best[here]] = value
        np.maximum(best[here], share, out=best[here])
    return found


def _present(label: np.ndarray) -> np.ndarray:
    """The values above 0 of a label map."""
    return np.flatnonzero(voxel_counts(label)[1:]) + 1


def _share(
    mask: np.ndarray, shape: Sequence[int], coarse_axis: int | None
) -> tuple[tuple[slice, slice, slice], np.ndarray]:
    """The part of another grid where a mask that is not empty can be, and its share of each voxel there."""
    source, target, centres = [], [], []
    for axis, size in enumerate(shape):
        line = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        first, last = int(line[0]) - 1, int(line[-1]) + 1  # a linear share ends where the next voxel begins
        every = _centres(mask.shape[axis], size)
        near = slice(int(np.searchsorted(every, first, "right")), int(np.searchsorted(every, last, "left")))
        source.append(slice(max(first, 0), last + 1))
        target.append(near)
        centres.append(every[near] - max(first, 0))
    share = mask[tuple(source)].astype(np.float32)
    for axis in range(3):
        share = _along(share, axis, centres[axis], 0 if axis == coarse_axis else 1)
    return (target[0], target[1], target[2]), share


def _centres(count: int, size: int) -> np.ndarray:
    """Where the centres of `size` voxels lie among `count` voxels of the same extent, counted from the first centre."""
    return (np.arange(size) + 0.5) * (count / size) - 0.5


def _clip(resampled: np.ndarray, exact: np.ndarray, slices: tuple[int, np.ndarray] | None) -> None:
    """Take away, in place, what a spline overshoots: beyond the range of the volume, or of each slice by itself."""
    within = tuple(axis for axis in range(3) if slices is None or axis != slices[0])
    low, high = exact.min(axis=within, keepdims=True), exact.max(axis=within, keepdims=True)
    if slices is not None:
        low, high = (_along(bound, *slices, 0) for bound in (low, high))
    np.clip(resampled, low, high, out=resampled)


def _along(values: np.ndarray, axis: int, centres: np.ndarray, order: int) -> np.ndarray:
    """A map at other places along one axis: the nearest voxel (order 0), a line (1) or a cubic spline (3).

    In slabs, so that what is in between stays in the processor's cache and takes no memory to speak of.
    """
    if order == 0:
        return np.take(values, np.floor(centres + 0.5).astype(int), axis=axis)
    shape = [len(centres) if a == axis else n for a, n in enumerate(values.shape)]
    resampled = np.empty(shape, np.float32)
    across = 1 if axis == 0 else 0
    thick = max(1, _SLAB * values.shape[across] // max(values.size, 1))
    for start in range(0, values.shape[across], thick):
        slab = (slice(None),) * across + (slice(start, start + thick),)
        _interpolate(np.moveaxis(values[slab], axis, 0), np.moveaxis(resampled[slab], axis, 0), centres, order)
    return resampled


def _interpolate(values: np.ndarray, target: np.ndarray, centres: np.ndarray, order: int) -> None:
    """Write to `target` the values at other places along the first axis."""
    lines = np.concatenate([values[:1], values[:1], values, values[-1:], values[-1:]])  # edges repeated
    if order == 3:
        _to_coefficients(lines)
    first = np.floor(centres).astype(int)
    weights = (_cubic if order == 3 else _linear)(centres - first)
    total, part = np.empty_like(lines[0]), np.empty_like(lines[0])
    for at, line, shares in zip(range(len(target)), first + 2 - order // 2, weights.T.tolist(), strict=True):
        np.multiply(lines[line], shares[0], out=total)
        for step in range(1, order + 1):
            np.multiply(lines[line + step], shares[step], out=part)
            np.add(total, part, out=total)
        target[at] = total


def _to_coefficients(lines: np.ndarray) -> None:
    """A sixth of the coefficients of the cubic B-spline through lines that go on for ever as they end, in place.

    The recursions of Unser, Aldroubi and Eden, IEEE Trans. Signal Process. 41:834 (1993), figure 1; their start and
    turn are geometric series here, since the lines are constant beyond both ends.
    """
    beyond = lines[-1] / (1 - _POLE)
    lines[0] /= 1 - _POLE
    part = np.empty_like(lines[0])
    for before, line in pairwise(lines):
        line += np.multiply(before, _POLE, out=part)
    lines[-1] = -_POLE * (beyond / (1 - _POLE) + (lines[-1] - beyond) / (1 - _POLE**2))
    for after, line in pairwise(lines[::-1]):
        np.subtract(after, line, out=line)
        line *= _POLE


def _linear(t: np.ndarray) -> np.ndarray:
    return np.stack([1 - t, t])


def _cubic(t: np.ndarray) -> np.ndarray:
    """Six times the cubic B-spline over the four nearest voxels, at the share `t` of the way between the inner two."""
    return np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3])


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
    labels: dict[str, Values]
    regions_class_order: ClassOrder = ()
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
        return _open(self.folders[case] / "image.b2nd")

    def label(self, case: str) -> blosc2.NDArray:
        """The label map (*grid), on disk."""
        return _open(self.folders[case] / "label.b2nd")

    def only(self, patients: Collection[str]) -> Store:
        """The same data with some of the patients alone."""
        return Store(self.folders, {p: cases for p, cases in self.patients.items() if p in patients})

    @cached_property
    def _locations(self) -> dict[str, dict[int, np.ndarray]]:
        return {}

    def locations(self, case: str) -> dict[int, np.ndarray]:
        """For each class that the case has, some of its voxels (n, 3) on the grid; regions are numbered from 1.

        With an ignore label, the key ANNOTATED holds voxels that were annotated, whatever they are.
        """
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
        partial(_prepare_one, local, folder),
        [_alone(dataset, case) for case in missing],
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
        regions_class_order=dataset.regions_class_order,
        channels=dataset.channels,
        cases={case: dataset.patient(case) for case in dataset.cases},
        unlabelled=tuple(case for case, files in dataset.cases.items() if files.label is None),
    )


def _raw_digest(index: Index) -> str | None:
    """The digest of the raw files as they are now, or None if they are not here (prepared data may be moved alone)."""
    if not Path(index.raw).is_dir():
        return None
    try:
        return open_dataset(index.raw, headers=False).raw_digest()
    except Problems:
        return "unreadable"


def _alone(dataset: Dataset, case: str) -> Dataset:
    """A dataset of one of its cases: all that a worker is sent, however many cases there are."""
    return replace(dataset, cases={case: dataset.cases[case]}, patients={case: dataset.patient(case)})


def _prepare_one(local: Local, folder: Path, dataset: Dataset) -> None:
    (case,) = dataset.cases
    ready = prepare(dataset.read(case), local.geometry, local.intensity)
    with whole_folder(folder / case) as part:
        _write(part / "image.b2nd", ready.image)
        if ready.label is not None:
            _write(part / "label.b2nd", ready.label)
            locations: dict[str, Any] = dict(_find_locations(ready.label, Labels.of(dataset)))
            np.savez(part / "locations.npz", **locations)
        write_json(part / "case.json", ready.way_back.model_dump(mode="json"))


def _open(path: Path) -> blosc2.NDArray:
    import blosc2  # it takes longer to import than a small case to prepare, and whoever reads no array needs it not

    return blosc2.open(str(path), mode="r")


def _write(path: Path, array: np.ndarray) -> None:
    """Store ([C,] Z, Y, X) in chunks of blocks. Level 1: higher ones take much longer and make nothing smaller."""
    import blosc2

    blosc2.set_nthreads(1)
    flat = 2 if array.shape[-3] == 1 else 3
    chunks = [_even(n, most) for n, most in zip(array.shape[-3:], _CHUNK[flat], strict=True)]
    blocks = [_even(n, most) for n, most in zip(chunks, _BLOCK[flat], strict=True)]
    blosc2.asarray(
        array,
        urlpath=str(path),
        mode="w",
        chunks=(*array.shape[:-3], *chunks),
        blocks=(*array.shape[:-3], *blocks),
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 1, "nthreads": 1},
    )


def _even(size: int, most: int) -> int:
    """The length of the fewest equal pieces that are no longer than `most`."""
    return math.ceil(size / math.ceil(size / most))


def _find_locations(label: np.ndarray, labels: Labels) -> Iterator[tuple[str, np.ndarray]]:
    """Per class or region: all voxels if there are few, else 10 000 or 1 % of them, whichever is more (nnU-Net)."""
    generator = np.random.default_rng(1234)
    held = {number: mask(label, values) for number, (_, values) in enumerate(labels.structures, start=1)}
    if labels.ignore is not None:
        held[ANNOTATED] = label != labels.ignore
    for key, voxels in held.items():
        at = np.flatnonzero(voxels)
        if not len(at):
            continue
        wanted = max(LOCATIONS_PER_CLASS, len(at) // 100)
        if len(at) > wanted:
            at = generator.choice(at, wanted, replace=False)
        yield str(key), np.stack(np.unravel_index(at, label.shape), axis=1).astype(np.int32)
